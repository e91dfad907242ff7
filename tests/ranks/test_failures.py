"""What goes wrong on one rank is known on all of them: nobody waits, and everything is put back."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microbatch.loss.loss import Loss
from microbatch.step.accumulator import Accumulator

LossFn = Callable[[nn.Module, Tensor], Any]


class World:
    """The same model on every rank, with gradients of its user's, buffers and dropout; rows of its own on each."""

    def __init__(self, rank: int, ranks: int, **settings: Any) -> None:
        torch.manual_seed(7)
        self.rank = rank
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.0), nn.Linear(4, 1)).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        settings.setdefault("microbatch_size", 2)
        self.accumulator = Accumulator(self.model, self.optimizer, batch_norm="microbatch", **settings)
        self.whole = torch.randn(4 * ranks, 3, dtype=torch.float64)
        self.rows = self.whole[4 * rank : 4 * rank + 4]
        self.last = next(iter(self.model[3].parameters()))
        self.mine = torch.full_like(self.last, 9.0)
        self.last.grad = self.mine

    def picture(self) -> list[Any]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return [tensor.detach().clone() for tensor in tensors] + [torch.get_rng_state(), random.getstate()]

    def changed(self, before: list[Any]) -> list[int]:
        """Return what is not as it was, by its place in the picture; -1 for gradients."""
        after = self.picture()
        same = [torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True)]
        untouched = self.last.grad is self.mine and bool(self.mine.eq(9).all())
        others = [p.grad for p in self.model.parameters() if p is not self.last]
        untouched = untouched and others == [None] * len(others)
        return [place for place, equal in enumerate(same) if not equal] + ([] if untouched else [-1])

    def attempt(self, loss_fn: LossFn, *, batch: Any = None, **settings: Any) -> dict[str, Any]:
        """Try a step that is expected to fail somewhere, then one that is not."""
        before, started = self.picture(), time.monotonic()
        error, message, step = "", "", None
        try:
            step = self.accumulator.step(self.rows if batch is None else batch, loss_fn, **settings)
        except Exception as caught:  # noqa: BLE001 - told to the test
            error, message = type(caught).__name__, str(caught)
        told = {
            "error": error,
            "message": message,
            "changed": self.changed(before),
            "applied": step is not None and step.applied,
            "seconds": time.monotonic() - started,
        }
        return told | self.next_step()

    def next_step(self) -> dict[str, Any]:
        self.model.eval()
        seen: list[Tensor] = []

        def look(*_: object) -> None:
            seen.extend(p.grad.flatten().clone() for p in self.model.parameters() if p.grad is not None)

        hook = self.optimizer.register_step_pre_hook(look)
        weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.accumulator.step(self.rows, fine)
        hook.remove()
        with torch.no_grad():
            for parameter, before in zip(self.model.parameters(), weights, strict=True):
                parameter.copy_(before).requires_grad_()
        fine(self.model, self.whole).backward()
        theirs = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        return {"off": float((torch.cat(seen) - theirs).norm() / theirs.norm())}


def fine(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def counted(model: nn.Module, x: Tensor) -> Loss:
    return Loss(sum=model(x).sum(), count=len(x))


def failing_on(rank: int, ours: int, fault: Callable[[Tensor], Any], *, last: bool = True) -> LossFn:
    """Return a loss function that goes wrong in one microbatch of one rank."""
    calls: list[int] = []

    def loss_fn(model: nn.Module, x: Tensor) -> Any:
        calls.append(len(calls))
        y = model(x)
        return fault(y) if rank == ours and (len(calls) == 2) == last else y.square().mean()

    return loss_fn


def fail(_: Tensor) -> None:
    raise ValueError("mine")


def fail_in_backward(y: Tensor) -> Tensor:
    y.register_hook(fail)
    return y.mean()


def case_forward(rank: int, ranks: int) -> Any:
    return World(rank, ranks).attempt(failing_on(1, rank, fail))


def case_first_microbatch(rank: int, ranks: int) -> Any:
    return World(rank, ranks).attempt(failing_on(1, rank, fail, last=False))


def case_backward(rank: int, ranks: int) -> Any:
    return World(rank, ranks).attempt(failing_on(0, rank, fail_in_backward))


def case_every_rank(rank: int, ranks: int) -> Any:
    return World(rank, ranks).attempt(failing_on(rank, rank, fail))


def case_loss_shape(rank: int, ranks: int) -> Any:
    return World(rank, ranks).attempt(failing_on(1, rank, lambda y: y))


def case_batch(rank: int, ranks: int) -> Any:
    world = World(rank, ranks)
    return world.attempt(fine, batch=[world.rows, torch.ones(3)] if rank == 1 else None)


def case_counts_function(rank: int, ranks: int) -> Any:
    def counts(x: Tensor) -> dict[str, int]:
        if rank == 1:
            raise ValueError("mine")
        return {"loss": len(x)}

    return World(rank, ranks).attempt(counted, counts=counts)


def case_counts_do_not_match(rank: int, ranks: int) -> Any:
    return World(rank, ranks).attempt(counted, counts={"loss": 4 if rank == 0 else 3})


def case_different_terms(rank: int, ranks: int) -> Any:
    return World(rank, ranks).attempt(lambda model, x: {f"term of {rank}": model(x).mean()})


def case_every_label_masked(rank: int, ranks: int) -> Any:
    return World(rank, ranks).attempt(lambda model, x: Loss(sum=model(x).sum(), count=torch.tensor(0)))


def case_every_share_empty(rank: int, ranks: int) -> Any:
    world = World(rank, ranks)
    return world.attempt(fine, batch=world.rows[:0])


def case_out_of_memory(rank: int, ranks: int) -> Any:
    world = World(rank, ranks, memory_budget="64 KiB" if rank == 1 else "1 GiB")
    world.model[1].eval()  # it would not take the single row that is tried at last

    def hungry(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean() * (torch.ones(100_000).mean() if rank == 1 else 1.0)

    return world.attempt(hungry)


def case_nan_raise(rank: int, ranks: int) -> Any:
    return World(rank, ranks).attempt(failing_on(1, rank, lambda y: y.mean() * float("nan")))


def case_nan_skip(rank: int, ranks: int) -> Any:
    world = World(rank, ranks, nonfinite="skip")
    world.last.grad = None  # a dropped window ends as every other does: without gradients
    before = world.picture()[:-2]
    step = world.accumulator.step(world.rows, failing_on(1, rank, lambda y: y.mean() * float("nan")))
    same = all(torch.equal(a, b) for a, b in zip(before, world.picture()[:-2], strict=True))
    gradients = [parameter.grad is None for parameter in world.model.parameters()]
    told = {"applied": step.applied, "skipped": world.accumulator.skipped, "same": same, "empty": all(gradients)}
    return told | world.next_step()


CASES = {name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")}


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    return {name: case(rank, ranks) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def told(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("failures")
    return run_ranks(all_cases, 2, folder)


# Case, the error of rank 0, the error of rank 1, and what each message has to name.
EXPECTED: list[tuple[str, str, str, str, str]] = [
    ("forward", "RankError", "ValueError", "1 of 2 ranks failed", "mine"),
    ("first_microbatch", "RankError", "ValueError", "1 of 2 ranks failed", "mine"),
    ("backward", "ValueError", "RankError", "mine", "1 of 2 ranks failed"),
    ("every_rank", "ValueError", "ValueError", "mine", "mine"),
    ("loss_shape", "RankError", "LossShapeError", "1 of 2 ranks failed", "(2, 1)"),
    ("batch", "RankError", "RowsDisagreeError", "1 of 2 ranks failed", "batch[1] has 3"),
    ("counts_function", "RankError", "ValueError", "1 of 2 ranks failed", "mine"),
    ("counts_do_not_match", "CountError", "CountError", "declared 7", "counted 8"),
    ("different_terms", "RankError", "RankError", "term of 0", "term of 1"),
    ("every_label_masked", "EmptyWindowError", "EmptyWindowError", "every count was 0", "every count was 0"),
    ("every_share_empty", "EmptyWindowError", "EmptyWindowError", "contributed", "contributed"),
    ("out_of_memory", "RankError", "OutOfMemoryError", "1 of 2 ranks failed", "64.0 KiB"),
    ("nan_raise", "NonfiniteError", "NonfiniteError", "infinite or NaN", "microbatch 1"),
]


@pytest.mark.parametrize("expected", EXPECTED, ids=lambda expected: expected[0])
def test_an_error_on_one_rank_is_an_error_on_all(told: list[Any], expected: tuple[str, ...]) -> None:
    name, *errors_and_words = expected
    for rank, (error, words) in enumerate(zip(errors_and_words[:2], errors_and_words[2:], strict=True)):
        found = told[rank][name]
        assert found["error"] == error, found["message"]
        assert words in found["message"]


@pytest.mark.parametrize("name", [expected[0] for expected in EXPECTED])
def test_everything_is_put_back_on_every_rank_and_the_next_step_is_exact(told: list[Any], name: str) -> None:
    for found in told:
        assert not found[name]["applied"]
        assert found[name]["changed"] == []
        assert found[name]["off"] <= 1e-12
        assert found[name]["seconds"] < 10  # nobody waited for a message that never came


def test_a_window_that_is_not_finite_on_one_rank_is_dropped_on_all(told: list[Any]) -> None:
    for found in told:
        dropped = found["nan_skip"]
        assert not dropped["applied"]
        assert dropped["skipped"] == 1
        assert dropped["same"]
        assert dropped["empty"]
        assert dropped["off"] <= 1e-12


def test_the_comparison_with_the_whole_batch_sees_a_share_of_it() -> None:
    torch.manual_seed(7)
    world = World(0, 2)
    world.whole = torch.cat([world.rows, 2 * world.rows])  # what two ranks would have had
    assert world.next_step()["off"] > 0.1


# -- what the helper itself does --------------------------------------------------------------------------------------


def one_fails(rank: int, _: int) -> None:
    if rank == 1:
        raise ValueError("a fault of one's own")
    time.sleep(60)


def one_sleeps(rank: int, _: int) -> None:
    time.sleep(60 * rank)


def test_a_rank_that_fails_ends_the_others_and_is_shown(run_ranks: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match="a fault of one's own"):
        run_ranks(one_fails, 2, tmp_path)
    assert time.monotonic() - started < 40


def test_a_rank_that_hangs_is_ended(run_ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="one_sleeps on 2 ranks"):
        run_ranks(one_sleeps, 2, tmp_path, timeout=1)
