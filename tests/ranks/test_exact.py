"""Several ranks make one batch: the same gradient, loss and weights as one process that has it all."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.cases import cases_in, result, run_cases
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from microbatch.loss.loss import Loss
from microbatch.ranks import reduce
from microbatch.step.accumulator import Accumulator
from microbatch.step.record import Step

LENGTH = 8
Batch = dict[str, Tensor]


class Model(nn.Module):
    """A classifier of tokens, with a layer that only some microbatches use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.rare = nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor, *, rare: bool = False) -> Tensor:
        return self.body(x) + self.rare(x) if rare else self.body(x)


def make_model(*, seed: int = 5) -> Model:
    torch.manual_seed(seed)
    return Model().double()


def make_batch(tokens: list[int]) -> Batch:
    """Return a row for every number of tokens, the rest of its labels masked."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(len(tokens), LENGTH, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(4, (len(tokens), LENGTH), generator=generator)
    for row, number in enumerate(tokens):
        labels[row, number:] = -100
    return {"x": x, "labels": labels}


def rows(batch: Batch, start: int, stop: int) -> Batch:
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def token_sum(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum")


def token_count(batch: Batch) -> Tensor:
    return (batch["labels"] >= 0).sum()


def token_loss(model: nn.Module, batch: Batch) -> Loss:
    return Loss(sum=token_sum(model, batch), count=token_count(batch))


def row_mean(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).square().mean()


def declared(batch: Batch) -> dict[str, Tensor]:
    return {"tokens": token_count(batch)}


def two_terms(model: nn.Module, batch: Batch) -> dict[str, Loss | Tensor]:
    return {"tokens": token_loss(model, batch), "size": 0.1 * row_mean(model, batch)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}


def run(
    share: Batch,
    loss_fn: Callable[[nn.Module, Batch], Any],
    *,
    model: nn.Module | None = None,
    microbatch_size: int = 1,
    **settings: Any,
) -> dict[str, Any]:
    """Take one step, and return the gradient that the optimizer saw and the record."""
    model = model or make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[dict[str, Tensor]] = []
    counts = settings.pop("counts", None)
    accumulator = Accumulator(model, optimizer, microbatch_size=microbatch_size, **settings)

    def look(*_: object) -> None:
        seen.append(gradients(model))

    hook = optimizer.register_step_pre_hook(look)
    step = accumulator.step(share, loss_fn, counts=counts)
    hook.remove()
    return record(step) | {"gradients": seen[0] if seen else {}}


def record(step: Step) -> dict[str, Any]:
    return {
        "loss": step.loss,
        "terms": dict(step.terms),
        "count": step.count,
        "counts": dict(step.counts),
        "samples": step.samples,
        "microbatches": step.microbatches,
        "grad_norm": step.grad_norm,
        "applied": step.applied,
    }


def split(batch: Batch, rank: int, ranks: int, *, uneven: bool = False) -> Batch:
    """Return one rank's rows; uneven: the first rank has all that the others do not need to have one each."""
    number = len(batch["x"])
    if uneven:
        first = number - (ranks - 1)
        return rows(batch, 0, first) if rank == 0 else rows(batch, first + rank - 1, first + rank)
    each = number // ranks
    return rows(batch, rank * each, (rank + 1) * each)


# -- the cases, each run on every rank of one start of the processes --------------------------------------------------

N3 = [8, 1, 2, 0]
MIXED = [8, 1, 2, 5, 0, 3, 7, 4]


def case_n3(rank: int, ranks: int) -> Any:
    return run(split(make_batch(N3), rank, ranks), token_loss)


def case_rank_masked(rank: int, ranks: int) -> Any:
    tokens = [3, 5, *[0] * (2 * ranks - 2)]
    return run(split(make_batch(tokens), rank, ranks), token_loss)


def case_empty_share(rank: int, ranks: int) -> Any:
    batch = make_batch(MIXED)
    return run(batch if rank == ranks - 1 else rows(batch, 0, 0), row_mean, microbatch_size=3)


def case_different_microbatches(rank: int, ranks: int) -> Any:
    return run(split(make_batch(MIXED), rank, ranks, uneven=True), row_mean)


def case_terms(rank: int, ranks: int) -> Any:
    batch = split(make_batch(MIXED), rank, ranks, uneven=True)
    return run(batch, two_terms, microbatch_size=2, counts=declared)


def case_terms_empty_share(rank: int, ranks: int) -> Any:
    batch = make_batch(MIXED)
    share = batch if rank == 0 else rows(batch, 0, 0)
    return run(share, two_terms, microbatch_size=2, counts=declared)


def case_rare_on_one_rank(rank: int, ranks: int) -> Any:
    batch = split(make_batch(MIXED), rank, ranks)
    return run(batch, lambda model, piece: model(piece["x"], rare=rank == ranks - 1).square().mean())


def case_rare_in_the_first_microbatch(rank: int, ranks: int) -> Any:
    batch = split(make_batch(MIXED), rank, ranks)
    first = batch["x"][:1]
    return run(batch, lambda model, piece: model(piece["x"], rare=torch.equal(piece["x"], first)).square().mean())


def case_never_used(rank: int, ranks: int) -> Any:
    return sorted(run(split(make_batch(MIXED), rank, ranks), row_mean)["gradients"])


def case_clip(rank: int, ranks: int) -> Any:
    return run(split(make_batch(MIXED), rank, ranks, uneven=True), token_loss, max_grad_norm=0.01)


def case_bfloat16(rank: int, ranks: int) -> Any:
    model = make_model().to(torch.bfloat16)
    batch = split(make_batch(MIXED), rank, ranks)
    return run(batch | {"x": batch["x"].bfloat16()}, row_mean, model=model)


def case_weights_are_the_first_ranks(rank: int, ranks: int) -> Any:
    model = make_model(seed=rank)
    return run(split(make_batch(MIXED), rank, ranks), row_mean, model=model) | {"weights": weights(model)}


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def twenty_steps(share: Callable[[Batch], Batch], model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    accumulator = Accumulator(model, optimizer, microbatch_size=1)
    losses: list[Tensor] = []
    for number in range(20):
        batch = make_batch(MIXED)
        batch["x"] = batch["x"] + number
        losses.append(accumulator.step(share(batch), token_loss).loss)
    return {"weights": weights(model), "losses": torch.stack(losses)}


def case_twenty_steps(rank: int, ranks: int) -> Any:
    return twenty_steps(lambda batch: split(batch, rank, ranks), make_model())


def case_reductions(rank: int, ranks: int) -> Any:
    """Return the sizes of the all-reduces of two steps, with 1 and with 4 microbatches, and with small buckets."""
    real, sizes = dist.all_reduce, list[int]()

    def counting(tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
        sizes.append(tensor.numel())
        return real(tensor, *arguments, **settings)

    dist.all_reduce = counting
    found: dict[str, list[int]] = {}
    share = rows(make_batch(MIXED), 0, 4)
    bucket_bytes = reduce.BUCKET_BYTES
    try:
        for name, size, small in [("one", 4, False), ("four", 1, False), ("small", 1, True)]:
            reduce.BUCKET_BYTES = 60 if small else bucket_bytes
            sizes.clear()
            run(share, token_loss, microbatch_size=size)
            found[name] = list(sizes)
        reduce.BUCKET_BYTES = bucket_bytes
        model = DistributedDataParallel(make_model(), find_unused_parameters=True)
        sizes.clear()
        run(share, token_loss, model=model)
        found["wrapped"] = list(sizes)
    finally:
        dist.all_reduce, reduce.BUCKET_BYTES = real, bucket_bytes
    return found


def wrapped(rank: int, ranks: int, **settings: Any) -> Any:
    model = make_model()
    del model.rare
    steps = [
        run(split(make_batch(MIXED), rank, ranks, uneven=True), row_mean, model=ddp)
        for ddp in [DistributedDataParallel(model, **settings)]
        for _ in range(2)
    ]
    return steps[0] | {"second": steps[1], "weights": weights(model)}


def case_wrapped(rank: int, ranks: int) -> Any:
    return wrapped(rank, ranks)


def case_wrapped_static_graph(rank: int, ranks: int) -> Any:
    return wrapped(rank, ranks, static_graph=True)


def case_window(rank: int, ranks: int) -> Any:
    model = make_model()
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    share = split(make_batch(MIXED), rank, ranks)
    with accumulator.window() as window:
        for row in range(len(share["x"])):
            piece = rows(share, row, row + 1)
            window.backward(row_mean(model, piece), count=1)
    return record(window.step) | {"weights": weights(model)}


CASES = cases_in(globals())


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    return run_cases(CASES, rank, ranks)


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["1 rank", "2 ranks", "4 ranks"])
def told(request: pytest.FixtureRequest, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp(f"ranks-{request.param}")
    return run_ranks(all_cases, request.param, folder)


# -- what plain PyTorch says on the whole batch -----------------------------------------------------------------------


def reference(loss_fn: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    model = make_model()
    loss = loss_fn(model, batch)
    loss.backward()
    return gradients(model), loss.detach()


def token_mean(model: nn.Module, batch: Batch) -> Tensor:
    return token_sum(model, batch) / token_count(batch)


def off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the relative error of one gradient against another."""
    assert sorted(ours) == sorted(theirs)
    one, other = (torch.cat([grads[name].flatten().double() for name in sorted(theirs)]) for grads in (ours, theirs))
    return float((one - other).norm() / other.norm())


def check(told: list[Any], case: str, theirs: tuple[dict[str, Tensor], Tensor]) -> list[dict[str, Any]]:
    """Compare gradient and loss of every rank with the reference, and the ranks with one another."""
    results = result(told, case)
    for ours in results:
        assert off(ours["gradients"], theirs[0]) <= 1e-12
        assert float((ours["loss"] - theirs[1]).abs()) <= 1e-12
        assert ours["applied"]
        assert torch.equal(ours["loss"], results[0]["loss"])
        assert ours["count"] == results[0]["count"]
        assert ours["samples"] == results[0]["samples"]
        for name, gradient in ours["gradients"].items():
            assert torch.equal(gradient, results[0]["gradients"][name])
    return results


def test_two_ranks_of_8_and_1_and_of_2_and_0_tokens(told: list[Any]) -> None:
    if len(told) == 4:
        pytest.skip("the law is about two ranks of two microbatches; one process is compared as well")
    results = check(told, "n3", reference(token_mean, make_batch(N3)))
    assert [ours["count"] for ours in results] == [11] * len(told)


def test_the_mean_of_each_ranks_mean_is_refused_by_the_same_comparison() -> None:
    batch = make_batch(N3)
    theirs, _ = reference(token_mean, batch)
    per_rank = [reference(token_mean, split(batch, rank, 2))[0] for rank in range(2)]
    usual = {name: (per_rank[0][name] + per_rank[1][name]) / 2 for name in theirs}
    assert off(usual, theirs) > 0.2
    pieces = [reference(token_mean, rows(batch, row, row + 1))[0] for row in range(4)]
    means = {name: torch.stack([piece[name] for piece in pieces]).mean(0) for name in theirs}
    assert not off(means, theirs) <= 1e-12  # NaN: the last microbatch has no token


def test_a_rank_whose_labels_are_all_masked(told: list[Any]) -> None:
    tokens = [3, 5, *[0] * (2 * len(told) - 2)]
    check(told, "rank_masked", reference(token_mean, make_batch(tokens)))


def test_a_rank_with_an_empty_share(told: list[Any]) -> None:
    results = check(told, "empty_share", reference(row_mean, make_batch(MIXED)))
    assert [ours["microbatches"] for ours in results] == [0] * (len(told) - 1) + [3]
    assert results[0]["samples"] == 8


def test_different_numbers_of_microbatches(told: list[Any]) -> None:
    results = check(told, "different_microbatches", reference(row_mean, make_batch(MIXED)))
    assert [ours["microbatches"] for ours in results] == [8 - len(told) + 1, *[1] * (len(told) - 1)]


@pytest.mark.parametrize("case", ["terms", "terms_empty_share"])
def test_several_terms_with_counts_of_their_own(told: list[Any], case: str) -> None:
    def whole(model: nn.Module, batch: Batch) -> Tensor:
        return token_mean(model, batch) + 0.1 * row_mean(model, batch)

    batch = make_batch(MIXED)
    results = check(told, case, reference(whole, batch))
    tokens, size = token_mean(make_model(), batch).item(), 0.1 * row_mean(make_model(), batch).item()
    for ours in results:
        assert ours["counts"] == {"tokens": 30, "size": 8}
        assert ours["terms"]["tokens"].item() == pytest.approx(tokens, abs=1e-12)
        assert ours["terms"]["size"].item() == pytest.approx(size, abs=1e-12)


def rare_reference(used: list[bool]) -> tuple[dict[str, Tensor], Tensor]:
    def whole(model: nn.Module, batch: Batch) -> Tensor:
        pieces = [model(batch["x"][row : row + 1], rare=rare).square().mean() for row, rare in enumerate(used)]
        return torch.stack(pieces).mean()

    return reference(whole, make_batch(MIXED))


def test_a_parameter_that_one_rank_uses(told: list[Any]) -> None:
    each = 8 // len(told)
    check(told, "rare_on_one_rank", rare_reference([row >= 8 - each for row in range(8)]))


def test_a_parameter_that_the_first_microbatches_use(told: list[Any]) -> None:
    each = 8 // len(told)
    check(told, "rare_in_the_first_microbatch", rare_reference([row % each == 0 for row in range(8)]))


def test_a_parameter_that_nobody_uses_gets_no_gradient(told: list[Any]) -> None:
    assert all("rare.weight" not in names and "body.0.weight" in names for names in result(told, "never_used"))


def test_clipping_is_of_the_whole_batchs_gradient(told: list[Any]) -> None:
    theirs, loss = reference(token_mean, make_batch(MIXED))
    norm = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
    clipped = {name: gradient * (0.01 / (norm + 1e-6)) for name, gradient in theirs.items()}
    for ours in check(told, "clip", (clipped, loss)):
        assert ours["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-12)


def test_narrow_parameters_are_no_further_off_than_the_whole_batch_in_their_own_precision(told: list[Any]) -> None:
    exact, _ = reference(row_mean, make_batch(MIXED))
    model = make_model().to(torch.bfloat16)
    batch = make_batch(MIXED)
    row_mean(model, batch | {"x": batch["x"].bfloat16()}).backward()
    unit = 2.0**-8
    for ours in result(told, "bfloat16"):
        gradient = ours["gradients"]
        assert all(each.dtype == torch.bfloat16 for each in gradient.values())
        assert off(gradient, exact) <= off(gradients(model), exact) + unit


def test_the_first_ranks_weights_are_everyones(told: list[Any]) -> None:
    results = result(told, "weights_are_the_first_ranks")
    for each in results:
        for ours, theirs in zip(each["weights"], results[0]["weights"], strict=True):
            assert torch.equal(ours, theirs)
    model = make_model(seed=0)
    row_mean(model, make_batch(MIXED)).backward()
    assert off(results[-1]["gradients"], gradients(model)) <= 1e-12


def test_the_weights_after_twenty_steps(told: list[Any]) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses: list[Tensor] = []
    for number in range(20):
        batch = make_batch(MIXED)
        batch["x"] = batch["x"] + number
        loss = token_mean(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    results = result(told, "twenty_steps")
    for each in results:
        torch.testing.assert_close(each["losses"], torch.stack(losses), rtol=1e-10, atol=0)
        for ours, theirs, first in zip(each["weights"], weights(model), results[0]["weights"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
            assert torch.equal(ours, first)


def test_one_reduction_for_each_bucket_of_a_step(told: list[Any]) -> None:
    sizes = sum(parameter.numel() for parameter in make_model().body.parameters())
    for found in result(told, "reductions"):
        if len(told) == 1:
            assert found["one"] == found["four"] == found["small"] == []
            continue
        assert found["one"] == found["four"]  # however many microbatches
        agreement, bucket, first = found["one"]
        assert bucket == sizes
        assert agreement < 1000  # numbers, of which 768 are the letters of names
        assert first == 3 * len(told)  # that all took it: in the first step only, as test_optimizer.py holds
        # Buckets of at least 60 bytes: a weight of 15 fills one, a bias of 5 waits for the next weight, of 20.
        assert found["small"] == [agreement, 15, 25, 4, first]
        assert found["wrapped"] == found["one"]


@pytest.mark.parametrize("case", ["wrapped", "wrapped_static_graph"])
def test_a_model_in_distributed_data_parallel(told: list[Any], case: str) -> None:
    check(told, case, reference(row_mean, make_batch(MIXED)))
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        row_mean(model, make_batch(MIXED)).backward()
        optimizer.step()
    for each in result(told, case):
        assert off(each["second"]["gradients"], gradients(model)) <= 1e-12
        body = copy.deepcopy(model)
        del body.rare
        for ours, theirs in zip(each["weights"], weights(body), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_hand_written_loop(told: list[Any]) -> None:
    model = make_model()
    row_mean(model, make_batch(MIXED)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for each in result(told, "window"):
        assert each["samples"] == 8
        for ours, theirs in zip(each["weights"], weights(model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
