"""The benchmark of coupled losses: all ways but the loop have the full batch's gradient."""

from collections.abc import Iterator

import pytest
import torch
from benchmarks.contrastive import GOAL, TINY, WAYS, Desk, as_markdown, relative_error


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: the towers are so small that a second one only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_way_but_the_loop_has_the_full_batchs_gradient() -> None:
    desks = {way: Desk(way, 8, size=2, form=TINY) for way in WAYS}
    gradients = {way: desk.gradient() for way, desk in desks.items()}
    errors = {way: relative_error(gradient, gradients["full"]) for way, gradient in gradients.items()}
    assert errors.pop("loop") > 0.1
    assert max(errors.values()) < 1e-5
    assert all(desk.seconds() > 0 for desk in desks.values())
    peaks = {way: desk.peak_bytes() for way, desk in desks.items()}
    assert peaks["twice"] < peaks["keep"]


def test_the_table_says_whether_the_goal_is_met() -> None:
    def entry(way: str, ratio: float) -> dict[str, object]:
        return {
            "way": way,
            "seconds": [0.1 * ratio] * 3,
            "against_loop": ratio,
            "against_full": ratio,
            "gradient_error": 1e-7,
            "peak_bytes": 1 << 20,
        }

    record = {
        "date": "2026-01-01",
        "hardware": {"cpu": "some"},
        "versions": {"torch": "2"},
        "threads": 1,
        "rows": 8,
        "microbatch_size": 2,
        "parameters": 10,
        "entries": [entry("loop", 1.0), entry("twice", GOAL - 0.01)],
    }
    assert as_markdown(record).endswith("met.\n")
    record["entries"] = [entry("loop", 1.0), entry("twice", GOAL + 0.01)]
    assert as_markdown(record).endswith("missed.\n")
    record["entries"] = [entry("loop", 1.0) | {"seconds": [0.1, 0.2, 0.3]}, entry("twice", 1.0)]
    assert "another job" in as_markdown(record)
