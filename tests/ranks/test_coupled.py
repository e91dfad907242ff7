"""Law C3: a loss that couples samples couples those of all ranks, with uneven rows and one reduction of gradients."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.cases import cases_in, run_cases
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from microbatch.errors import RankError
from microbatch.loss import losses
from microbatch.loss.loss import Loss
from microbatch.step.accumulator import Accumulator

ROWS = 9
Batch = dict[str, Tensor]
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


class Towers(nn.Module):
    """Two encoders, and what the loss learns of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.right = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.tensor(0.3))


def make_model() -> Towers:
    torch.manual_seed(5)
    return Towers().double()


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(11)
    x, y = (torch.randn(ROWS, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    return {"x": x, "y": y, "even": torch.arange(ROWS) % 2 == 0}


def encode(model: Any, batch: Batch) -> dict[str, Any]:
    return {"x": model.left(batch["x"]), "other": (batch["even"], model.right(batch["y"]))}


def clip(model: Any, z: dict[str, Any]) -> Loss:
    return losses.clip(z["x"], z["other"][1], scale=model.scale.exp())


def mean(model: Any, z: dict[str, Any]) -> Tensor:
    logits = model.scale * z["x"] @ z["other"][1].T
    return F.cross_entropy(logits, torch.arange(len(logits))) + z["x"][z["other"][0]].var()


def terms(model: Any, z: dict[str, Any]) -> dict[str, Any]:
    even = z["other"][0]
    return {"mean": mean(model, z), "even": Loss(sum=z["x"][even].square().sum(), count=even.sum())}


def share(rank: int, ranks: int, *, empty: bool = False) -> Batch:
    """Return this rank's rows: the others have one each, or none, and the first has the rest."""
    others = 0 if empty else 1
    first = ROWS - others * (ranks - 1)
    start, stop = (0, first) if rank == 0 else (first + others * (rank - 1), first + others * rank)
    return {name: each[start:stop] for name, each in make_batch().items()}


def fails(at: int, *, error: Exception, rank: int, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that one rank's call of some number fails, once."""
    calls: list[int] = []

    def wrapped(model: Any, given: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] == at and dist.is_initialized() and dist.get_rank() == rank:
            raise copy.copy(error)
        return inner(model, given)

    return wrapped


def run(batch: Batch, loss_fn: Callable[..., Any], *, encoder: Callable[..., Any] = encode, **settings: Any) -> Any:
    model: nn.Module = make_model()
    if settings.pop("wrap", False):
        model = DistributedDataParallel(model, static_graph=True)
    bare: Any = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[dict[str, Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append({name: p.grad.clone() for name, p in bare.named_parameters() if p.grad is not None})
    )
    events: list[str] = []
    settings = {"microbatch_size": 2, "coupled": "twice", **settings}
    accumulator = Accumulator(model, optimizer, listeners=[lambda e: events.append(type(e).__name__)], **settings)
    step = accumulator.step(batch, loss_fn, encode=encoder)
    return {
        "gradients": seen[0],
        "loss": step.loss,
        "terms": dict(step.terms),
        "counts": dict(step.counts),
        "count": step.count,
        "samples": step.samples,
        "microbatches": step.microbatches,
        "retries": step.retries,
        "events": events,
    }


# -- the cases, each run on every rank of one start of the processes --------------------------------------------------


def case_clip(rank: int, ranks: int) -> Any:
    return run(share(rank, ranks), clip)


def case_keep(rank: int, ranks: int) -> Any:
    return run(share(rank, ranks), clip, coupled="keep")


def case_mean(rank: int, ranks: int) -> Any:
    return run(share(rank, ranks), mean)


def case_terms(rank: int, ranks: int) -> Any:
    return run(share(rank, ranks), terms)


def case_empty(rank: int, ranks: int) -> Any:
    return run(share(rank, ranks, empty=True), mean)


def case_wrapped(rank: int, ranks: int) -> Any:
    return run(share(rank, ranks), mean, wrap=True)


def out_of_memory(rank: int, ranks: int, at: int, **settings: Any) -> Any:
    failing = fails(at, error=FULL, rank=0, inner=encode)
    return run(share(rank, ranks), clip, encoder=failing, microbatch_size=4, **settings)


def case_out_of_memory_first(rank: int, ranks: int) -> Any:
    return out_of_memory(rank, ranks, 1)


def case_out_of_memory_second(rank: int, ranks: int) -> Any:
    return out_of_memory(rank, ranks, 3)  # the first rank has two or three microbatches


def case_out_of_memory_keep(rank: int, ranks: int) -> Any:
    return out_of_memory(rank, ranks, 1, coupled="keep")


def refused(act: Callable[[], Any]) -> str:
    try:
        act()
    except Exception as error:  # noqa: BLE001 - what is raised is what is asked
        return type(error).__name__
    return "nothing"


def case_errors(rank: int, ranks: int) -> Any:
    """Return what one rank's fault, in each of the places, is on every rank; and a step after them all."""
    last, batch, wrong = ranks - 1, share(rank, ranks), KeyError("x")
    found: dict[str, Any] = {}
    for place, at in [("first", 0), ("second", 1)]:  # the last rank has one microbatch
        failing = fails(at, error=wrong, rank=last, inner=encode)
        found[place] = refused(lambda failing=failing: run(batch, clip, encoder=failing, microbatch_size=9))
    found["loss"] = refused(lambda: run(batch, fails(0, error=wrong, rank=last, inner=clip)))
    found["memory"] = refused(lambda: run(batch, fails(0, error=FULL, rank=last, inner=clip)))
    found["kinds"] = refused(
        lambda: run(batch, mean, encoder=lambda m, b: encode(m, b) if rank else [m.left(b["x"]).float()])
    )
    return found | {"after": run(batch, clip)}


def case_collectives(rank: int, ranks: int) -> Any:
    """Return the sizes of what is reduced and gathered, with one microbatch and with many."""
    found: dict[str, list[tuple[str, int]]] = {}
    real = dist.all_reduce, dist.all_gather
    calls: list[tuple[str, int]] = []

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(("reduce", tensor.numel()))
        return real[0](tensor, *args, **kwargs)

    def all_gather(into: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(("gather", tensor.numel()))
        return real[1](into, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        for size in (9, 1):
            calls.clear()
            run(share(rank, ranks), clip, microbatch_size=size)
            found[str(size)] = list(calls)
    finally:
        dist.all_reduce, dist.all_gather = real
    return found


def case_window(rank: int, ranks: int) -> Any:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = Accumulator(model, optimizer, microbatch_size=2)
    with accumulator.window() as window:
        z = window.encode(share(rank, ranks), encode)
        window.backward(clip(model, z))
    return [parameter.detach() for parameter in model.parameters()]


def case_forgotten_backward(rank: int, ranks: int) -> Any:
    """Leave a window without the loss of what it encoded, on the last rank."""
    model = make_model()
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)

    def act() -> None:
        with accumulator.window() as window:
            z = window.encode(share(rank, ranks), encode)
            if rank < ranks - 1:
                window.backward(clip(model, z))

    return refused(act)


CASES = cases_in(globals())


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    return run_cases(CASES, rank, ranks)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["2 ranks", "3 ranks"])
def told(request: pytest.FixtureRequest, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp(f"coupled-{request.param}")
    return run_ranks(all_cases, request.param, folder)


# -- what plain PyTorch says on the whole batch -----------------------------------------------------------------------


def plain_clip(model: Any, z: dict[str, Any]) -> Tensor:
    logits = model.scale.exp() * z["x"] @ z["other"][1].T
    diagonal = torch.arange(len(logits))
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def plain_terms(model: Any, z: dict[str, Any]) -> Tensor:
    return mean(model, z) + z["x"][z["other"][0]].square().sum(1).mean()


def reference(loss: Callable[..., Tensor], batch: Batch | None = None) -> tuple[dict[str, Tensor], Tensor]:
    model = make_model()
    value = loss(model, encode(model, batch or make_batch()))
    value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, value.detach()


def off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
    return float(difference / torch.cat([each.flatten() for each in theirs.values()]).norm())


def result(told: list[Any], case: str) -> list[Any]:
    failed = [rank[case] for rank in told if isinstance(rank[case], str) and rank[case].startswith("failed")]
    assert failed == []
    return [rank[case] for rank in told]


def check(found: list[Any], loss: Callable[..., Tensor]) -> None:
    theirs, value = reference(loss)
    for ours in found:
        assert off(ours["gradients"], theirs) <= 1e-12
        assert abs(ours["loss"] - value) <= 1e-12
        assert ours["samples"] == ROWS
        assert ours["counts"] or ours["count"] == ROWS
        assert all(torch.equal(each, found[0]["gradients"][name]) for name, each in ours["gradients"].items())


@pytest.mark.parametrize(
    ("case", "loss"), [("clip", plain_clip), ("keep", plain_clip), ("mean", mean), ("empty", mean), ("wrapped", mean)]
)
def test_negatives_are_those_of_all_ranks(told: list[Any], case: str, loss: Callable[..., Tensor]) -> None:
    check(result(told, case), loss)
    if case == "empty":
        assert [each["microbatches"] for each in result(told, case)] == [5, *[0] * (len(told) - 1)]


def test_negatives_of_a_rank_alone_are_refused_by_the_same_comparison() -> None:
    theirs, _ = reference(plain_clip)
    local = [reference(plain_clip, share(rank, 2))[0] for rank in range(2)]
    weights = [(ROWS - 1) / ROWS, 1 / ROWS]
    usual = {name: weights[0] * local[0][name] + weights[1] * local[1][name] for name in theirs}
    assert off(usual, theirs) > 1e-2


def test_terms_over_counts_of_their_own(told: list[Any]) -> None:
    found = result(told, "terms")
    check(found, plain_terms)
    assert all(each["counts"] == {"mean": ROWS, "even": 5} for each in found)


def test_one_reduction_of_gradients_however_many_microbatches(told: list[Any]) -> None:
    numbers = sum(parameter.numel() for parameter in make_model().parameters())
    for found in result(told, "collectives"):
        assert found["9"] == found["1"]
        kinds, sizes = zip(*found["1"], strict=True)
        # Once, that all are set up alike; who has what, each with its length; representations; their gradients;
        # all well; the agreement on counts; one bucket of gradients; and whether the first step went well everywhere.
        assert kinds == ("gather",) * 5 + ("reduce",) * 5
        row_bytes, most = 1 + 2 * 4 * 8, ROWS - len(told) + 1
        assert sizes[4:7] == (most * row_bytes, len(told) + 2 * 4 * ROWS, len(told))
        assert sizes[8] == numbers
        assert sizes[9] <= 4 * len(told)


@pytest.mark.parametrize("case", ["out_of_memory_first", "out_of_memory_second", "out_of_memory_keep"])
def test_a_rank_that_runs_out_of_memory(told: list[Any], case: str) -> None:
    found = result(told, case)
    check(found, plain_clip)
    together = case == "out_of_memory_second"
    assert [each["retries"] for each in found] == [1, *[int(together)] * (len(told) - 1)]
    assert [each["events"].count("Retry") for each in found] == [each["retries"] for each in found]
    assert found[0]["microbatches"] == (2 if case == "out_of_memory_keep" else -(-(ROWS - len(told) + 1) // 2))


def test_a_ranks_fault_is_an_error_on_all_and_nobody_waits(told: list[Any]) -> None:
    found = result(told, "errors")
    for place in ("first", "loss", "second"):
        assert [each[place] for each in found] == ["RankError"] * (len(told) - 1) + ["KeyError"]
    assert [each["memory"] for each in found] == ["RankError"] * (len(told) - 1) + ["OutOfMemoryError"]
    assert {each["kinds"] for each in found} == {RankError.__name__}
    check([each["after"] for each in found], plain_clip)
    forgotten = result(told, "forgotten_backward")
    assert forgotten == ["RankError"] * (len(told) - 1) + ["WindowError"]


def test_a_hand_written_loop(told: list[Any]) -> None:
    theirs, _ = reference(plain_clip)
    for weights in result(told, "window"):
        for ours, (name, before) in zip(weights, make_model().named_parameters(), strict=True):
            torch.testing.assert_close(ours, before.detach() - 0.1 * theirs[name], rtol=1e-12, atol=1e-14)
