"""Law F1: Ctrl-C at any line of a step leaves everything as before the step, or as after it. F8: one thread."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.interrupts import at_ends, sweep
from tests.kinds import Job, differences, make

import microbatch as mb
from microbatch import interrupts
from microbatch.errors import WindowError, WindowOpenError
from microbatch.step import saved_state
from microbatch.step.parts import batch_norm
from microbatch.step.window import Window

# A kind, and how many lines lie between two interrupts: a prime number, so that loops are interrupted everywhere.
KINDS = {"plain": 61, "window": 149, "windows": 173, "coupled": 191, "exact": 509, "momentum": 151, "checkpoint": 151}


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """Put the handler of Ctrl-C back; a shell may have started the tests without one."""
    gc.collect()  # windows that another test has left open
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(120)  # a test that waits for ever fails
    yield
    signal.alarm(0)
    signal.signal(signal.SIGINT, before)


def too_long(*_: object) -> None:
    raise TimeoutError("the test waits for ever")


@pytest.mark.parametrize("kind", KINDS)
def test_f1_everything_is_as_before_or_as_after(kind: str) -> None:
    lines, outcomes = sweep(kind, stride=KINDS[kind])
    assert lines > 1000
    assert [outcome for outcome in outcomes if outcome.wrong] == []
    assert {outcome.outcome for outcome in outcomes} == {"before", "after"}


@pytest.mark.parametrize("kind", ["windows", "coupled", "exact", "spill", "checkpoint", "by_row", "momentum"])
def test_f1_at_the_end_of_a_with_statement_what_it_switched_on_is_off(kind: str) -> None:
    # Python has left the block there, and has not called __exit__: modes, grad mode, hooks and locks are still on.
    outcomes = at_ends(kind)
    assert len(outcomes) > 3
    assert [outcome for outcome in outcomes if outcome.wrong] == []


def test_f1_modes_that_stay_on_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # The negative control: modes are not restored.
    mine = saved_state.Modes()
    monkeypatch.setattr(saved_state.Modes, "restore", lambda self: None)
    found = at_ends("by_row")
    monkeypatch.undo()
    mine.restore()
    assert "function modes" in {name for outcome in found if outcome.wrong for name in outcome.left}


def test_f1_an_error_at_the_line_itself_is_not_half_a_step_either() -> None:
    # No handler can postpone this one: it is raised inside the parts where a signal waits.
    lines, outcomes = sweep("plain", stride=53, raising=True)
    assert lines > 1000
    assert [outcome for outcome in outcomes if outcome.wrong] == []


# Buffers that move once a window, and so not where each microbatch is; and statistics of the whole batch.
BUFFERS = {"pooled": 23, "once": 23, "mean": 23, "exact": 31, "gradient": 23, "skipped": 23, "skipped_momentum": 23}


@pytest.mark.parametrize("kind", BUFFERS)
def test_f1_an_error_at_any_of_the_last_lines_leaves_buffers_that_go_with_the_weights(kind: str) -> None:
    _, outcomes = sweep(kind, stride=BUFFERS[kind], last=900, raising=True)
    assert [outcome for outcome in outcomes if outcome.outcome not in {"before", "after"}] == []
    assert {outcome.outcome for outcome in outcomes} == {"before", "after"}


def test_f1_buffers_that_move_after_the_step_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # The negative control: running statistics move when the step is over.
    monkeypatch.setattr(batch_norm.PooledNorms, "check", lambda self, window: None)
    monkeypatch.setattr(batch_norm.PooledNorms, "done", lambda self, window, step: self._pooled.finish())
    _, outcomes = sweep("pooled", stride=23, last=900, raising=True)
    assert "buffer norm.running_mean" in {name for each in outcomes if each.wrong for name in each.left}


def test_f1_without_waiting_a_step_is_left_half_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # The negative control: signals are never held back, and weights that were written are not looked at.
    monkeypatch.setattr(interrupts, "_must_return", lambda frame: False)
    never = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(interrupts.Interrupts, "held", never, raising=False)
    monkeypatch.setattr("microbatch.step.optimizer_step.Versions.untouched", property(lambda self: True))
    _, outcomes = sweep("plain", stride=5, last=250)
    assert "mixed" in {outcome.outcome for outcome in outcomes}


class Interrupted(torch.optim.SGD):
    """Signal in the middle of the step, after the first weight."""

    signals: tuple[signal.Signals, ...] = (signal.SIGINT,)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take the step by hand."""
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                parameter.sub_(parameter.grad, alpha=group["lr"])
                if index == 0:
                    for each in self.signals:
                        signal.raise_signal(each)


def interrupted() -> tuple[torch.nn.Module, Interrupted, mb.Accumulator]:
    model = torch.nn.Linear(2, 1)
    optimizer = Interrupted(model.parameters(), lr=0.5)
    return model, optimizer, mb.Accumulator(model, optimizer, microbatch_size=2)


def mean(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).mean()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_f1_a_signal_waits_until_the_optimizer_is_through(number: signal.Signals) -> None:
    class Stop(Exception):  # noqa: N818 - a signal of the user
        pass

    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(number, stop)
    try:
        model, optimizer, it = interrupted()
        optimizer.signals = (number,)
        weights = [each.detach().clone() for each in model.parameters()]
        with pytest.raises(Stop):
            it.step(torch.ones(4, 2), mean)
        assert signal.getsignal(number) is stop
        assert it.state_dict()["windows"] == 1
        # The gradient of the mean over ones is 1 for every weight and for the bias.
        assert all(torch.equal(now, was - 0.5) for was, now in zip(weights, model.parameters(), strict=True))
        assert all(each.grad is None for each in model.parameters())
    finally:
        signal.signal(number, before)


def test_f1_a_handler_of_the_user_that_does_not_raise_is_called_once() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    _, _, it = interrupted()
    assert it.step(torch.ones(4, 2), mean).applied
    assert seen == [signal.SIGINT]


def test_f1_a_handler_outside_of_python_is_left_alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, _, it = interrupted()
    assert it.step(torch.ones(4, 2), mean).applied
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_f1_windows_that_overlap_put_the_handler_back_once() -> None:
    one, other = make("window"), make("window")
    first, second = one.accumulator.window(), other.accumulator.window()
    for window in (first, second):
        window.__enter__()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    for window, job in ((first, one), (second, other)):
        for x in window.split(job.batch):
            window.backward(job.model(x).mean())
        window.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_f1_an_error_after_the_weights_were_written_says_so() -> None:
    job = make("plain")

    def fails(*_: object) -> None:
        message = "a hook"
        raise ValueError(message)

    job.optimizer.register_step_post_hook(fails)
    with pytest.raises(ValueError, match="a hook") as caught:
        job.step()
    assert "weights may be partly updated" in caught.value.__notes__[0]
    state, twin = job.state(), make("plain")
    twin.step()
    assert differences(twin.state(), state) == []  # as after the step: buffers and random state, too


def test_f1_a_listener_that_raises_after_the_step_says_that_it_was_taken() -> None:
    def listen(event: object) -> None:
        if isinstance(event, mb.StepDone):
            message = "a listener"
            raise LookupError(message)  # noqa: TRY004 - any error

    job = make("plain")
    job.accumulator.options.listeners.append(listen)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(LookupError, match="a listener") as caught:
        job.step()
    assert "after the step had been taken" in caught.value.__notes__[0]
    state, twin = job.state(), make("plain")
    twin.step()
    assert differences(twin.state(), state) == []
    assert job.accumulator.state_dict() == twin.accumulator.state_dict()


# -- F8 ---------------------------------------------------------------------------------------------------------------


def in_thread(work: Any) -> list[BaseException]:
    """Run a function in a thread named "other", and return its error."""
    found: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            found.append(error)

    thread = threading.Thread(target=run, name="other")
    thread.start()
    thread.join()
    return found


def test_f8_a_second_thread_is_refused_at_once_and_by_name() -> None:
    job = make("plain")
    refused: list[BaseException] = []

    def loss_fn(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not refused:
            refused.extend(in_thread(job.step))
        return model(x).square().mean()

    job.accumulator.step(job.batch, loss_fn)
    assert isinstance(refused[0], WindowOpenError)
    assert all(word in str(refused[0]) for word in ("'MainThread'", "'other'", "for each thread"))
    state, twin = job.state(), make("plain")
    twin.step()
    assert differences(twin.state(), state) == []  # the first thread's step is as if it had been alone


def test_f8_one_of_many_threads_that_begin_together_gets_the_window() -> None:
    job, count = make("window"), 8
    barrier, opened, refused = threading.Barrier(count, timeout=60), list[Window](), list[BaseException]()

    def work() -> None:
        window = job.accumulator.window()
        barrier.wait()
        try:
            opened.append(window.__enter__())
        except WindowOpenError as error:
            refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), len(refused)) == (1, count - 1)
    opened[0].__exit__(ValueError, ValueError(), None)
    job.step()


def test_f8_a_window_is_used_in_the_thread_that_opened_it() -> None:
    job = make("window")
    with job.accumulator.window() as window:
        for x in window.split(job.batch):
            (error,) = in_thread(lambda x=x: window.backward(job.model(x).mean()))
            assert isinstance(error, WindowError)
            assert "'other'" in str(error)
            window.backward(job.model(x).mean())
    assert window.step.applied


def test_f8_threads_may_take_turns() -> None:
    job: Job = make("plain")
    assert in_thread(job.step) == []
    job.step()
