"""Signals while a run ends."""

import signal
from collections.abc import Iterator

import pytest

from microbatch.train.stop import StopRequest


@pytest.fixture
def before() -> Iterator[object]:
    handler = signal.getsignal(signal.SIGTERM)
    yield handler
    signal.signal(signal.SIGTERM, handler)


def test_one_of_several_ranks_survives_sigterm_until_it_has_reported_an_error(before: object) -> None:
    stop = StopRequest(ranks=2)
    with pytest.raises(ValueError, match="lost"), stop:
        raise ValueError("lost")
    signal.raise_signal(signal.SIGTERM)  # would end the process
    assert stop.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) != before


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_handlers_are_put_back_after_a_run_that_ended_well(ranks: int, before: object) -> None:
    with StopRequest(ranks=ranks):
        pass
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_process_of_its_own_puts_them_back_after_an_error_too(before: object) -> None:
    with pytest.raises(ValueError, match="lost"), StopRequest():
        raise ValueError("lost")
    assert signal.getsignal(signal.SIGTERM) == before
