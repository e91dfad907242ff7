"""A check measures what it says, touches nothing, and says what it could not do."""

import copy
import json
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microbatch as mb
from microbatch.checking.gradient import fit
from microbatch.errors import BatchError, CheckError, ConfigError, OutOfMemoryError

from .loops import keeping, scheduling
from .programs import ROWS, SIZE, Scaled, batch, masked, network, programs, squared

# -- what is measured ---------------------------------------------------------------------------------------------


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([each.grad.flatten().double() for each in model.parameters() if each.grad is not None])


def test_the_numbers_are_those_of_plain_pytorch() -> None:
    model, given = network(), batch()
    found = mb.check(model, squared, given, microbatch_size=SIZE)
    wide = copy.deepcopy(model).double()
    squared(wide, {name: each.double() for name, each in given.items()}).backward()
    yardstick = gradient(wide)
    narrow = copy.deepcopy(model)
    squared(narrow, given).backward()
    accumulated: list[Tensor] = []
    ours = copy.deepcopy(model)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: accumulated.append(gradient(ours)))
    mb.Accumulator(ours, optimizer, microbatch_size=SIZE).step(given, squared)

    def error(found: Tensor) -> float:
        return ((found - yardstick).norm() / yardstick.norm()).item()

    assert found.relative_error == pytest.approx(error(accumulated[0]), rel=1e-6)
    assert found.rounding == pytest.approx(error(gradient(narrow)), rel=1e-6)
    assert found.rounding < found.limit < 1e-5
    assert (found.precision, found.yardstick) == ("float32", "float64")
    assert {each.name for each in found.parameters} == {name for name, _ in model.named_parameters()}


def test_both_gradients_draw_from_the_state_that_there_was() -> None:
    model, given = network(nn.Dropout(0.5)).double(), {name: each.double() for name, each in batch().items()}
    torch.manual_seed(3)
    found = mb.check(model, squared, given, microbatch_size=SIZE)
    torch.manual_seed(3)
    squared(model, given).backward()
    whole = gradient(model)
    model.zero_grad()
    torch.manual_seed(3)
    torch.rand((), dtype=torch.float64)  # a cut draws other numbers, which one layer on the CPU would not
    for piece in mb.cut(given, SIZE):
        (squared(model, piece) * SIZE / ROWS).backward()
    expected = ((gradient(model) - whole).norm() / whole.norm()).item()
    assert expected > 0.1
    assert found.relative_error == pytest.approx(expected, rel=1e-9)


def test_the_error_of_a_mean_of_means_is_the_one_that_it_makes() -> None:
    model, given = network(), batch()
    found = mb.check(model, masked, given, microbatch_size=SIZE)
    wide = copy.deepcopy(model).double()
    given = {name: each.double() for name, each in given.items()}
    masked(wide, given).backward()
    yardstick = gradient(wide)
    wide.zero_grad()
    for piece in mb.cut(given, SIZE):
        (masked(wide, piece) / (ROWS // SIZE)).backward()
    error = ((gradient(wide) - yardstick).norm() / yardstick.norm()).item()
    assert found.relative_error == pytest.approx(error)
    (cause,) = found.causes
    assert cause.alone == pytest.approx(error)
    assert cause.without is not None
    assert cause.without < 1e-12


def test_each_of_two_causes_makes_its_own_part() -> None:
    program = programs()["batch statistics and counts"]()
    both = {cause.kind: cause for cause in mb.check(program.model, masked, program.batch, microbatch_size=SIZE).causes}

    # By themselves: statistics with the counts said as they should be, and counts without statistics of the batch.
    def said(model: nn.Module, batch: dict[str, Tensor]) -> mb.Loss:
        return mb.Loss(sum=masked(model, batch) * batch["mask"].sum(), count=batch["mask"].sum())

    (statistics,) = mb.check(program.model, said, program.batch, microbatch_size=SIZE).causes
    assert both["batch_statistics"].alone == pytest.approx(statistics.alone)
    assert both["counts"].without == pytest.approx(statistics.alone)
    assert both["counts"].alone is not None
    assert both["counts"].alone == pytest.approx(both["batch_statistics"].without)


def test_a_fit_of_too_few_numbers_says_nothing() -> None:
    parts = [{"a": torch.ones(2).double()}, {"a": torch.arange(2).double()}]
    assert fit({"a": torch.tensor([3.0, 4.0]).double()}, parts).residual == float("inf")


# -- nothing is touched -------------------------------------------------------------------------------------------


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, *more: Any) -> Any:
    """Copy what a check might touch."""
    numpy = sys.modules["numpy"].random.get_state()[1].tolist() if "numpy" in sys.modules else None
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return (
        {name: value.tolist() for name, value in tensors.items()},
        [None if each.grad is None else each.grad.tolist() for each in model.parameters()],
        copy.deepcopy(optimizer.state_dict()),
        [(name, module.training, getattr(module, "calls", None)) for name, module in model.named_modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        numpy,
        torch.get_default_dtype(),
        copy.deepcopy(more),
    )


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model in the middle of its training: buffers, state, gradients."""
    model = network(nn.BatchNorm1d(8), nn.Dropout(0.2), Scaled(), nn.Dropout(0.2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        squared(model, batch()).backward()
        optimizer.step()
    return model, optimizer


def test_a_check_leaves_everything_as_it_was() -> None:
    model, optimizer = trained()
    given = batch()
    grads = [each.grad for each in model.parameters()]
    before = everything(model, optimizer, given)
    found = mb.check(model, masked, given, microbatch_size=SIZE)
    assert {cause.kind for cause in found.causes} == {"batch_statistics", "counts", "randomness", "state"}
    assert same(everything(model, optimizer, given), before)
    assert all(each.grad is grad for each, grad in zip(model.parameters(), grads, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_loop_is_run_on_copies_of_all_that_it_reaches() -> None:
    model, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    history: list[Tensor] = []
    before = everything(model, optimizer, scheduler.state_dict())
    loops = [scheduling(scheduler, every_microbatch=True), keeping(history)]
    for loop in loops:
        mb.check(model, squared, batch(), loop=loop, optimizer=optimizer)
    assert same(everything(model, optimizer, scheduler.state_dict()), before)
    assert history == []


def test_a_loss_that_fails_leaves_everything_as_it_was() -> None:
    model, optimizer = trained()

    def failing(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        model(batch["x"])
        raise ZeroDivisionError

    before = everything(model, optimizer)
    with pytest.raises(ZeroDivisionError):
        mb.check(model, failing, batch())
    assert same(everything(model, optimizer), before)


def test_a_layer_that_this_processor_cannot_run_under_autocast_is_named() -> None:
    model, _ = trained()

    def failing(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        model(batch["x"])
        message = "could not create a primitive descriptor for the LSTM forward propagation primitive."
        raise RuntimeError(message)

    with pytest.raises(RuntimeError) as caught:
        mb.check(model, failing, batch(), autocast=torch.bfloat16)
    assert "this processor has no kernel" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError) as caught:
        mb.check(model, failing, batch())
    assert not hasattr(caught.value, "__notes__")


def test_a_loss_function_that_reaches_the_model_by_another_name_is_given_the_copy() -> None:
    model, optimizer = trained()
    model.eval()
    teacher = copy.deepcopy(model).train()

    def distilled(given: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) - teacher(batch["x"]).detach()).square().mean()

    before = everything(model, optimizer), copy.deepcopy(teacher.state_dict())
    assert mb.check(model.eval(), distilled, batch()).rows == ROWS
    assert same((everything(model, optimizer), teacher.state_dict()), before)


# -- what it cannot do --------------------------------------------------------------------------------------------


def test_fewer_rows_are_taken_where_the_whole_batch_does_not_fit() -> None:
    model = nn.Sequential(nn.Linear(4, 1000), nn.Tanh(), nn.Linear(1000, 1))
    given = torch.randn(64, 4)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    found = mb.check(model, loss, given, microbatch_size=4, memory_budget="800 KiB")
    assert found.ok
    assert 8 <= found.rows < 64
    assert f"{found.rows} of the 64 rows" in found.notes[0]
    assert mb.check(model, loss, given, microbatch_size=4).rows == 64
    with pytest.raises(OutOfMemoryError, match="not even two rows"):
        mb.check(model, loss, given, memory_budget="10 KiB")


def test_a_model_that_insists_on_float32_is_checked_in_it_and_that_is_said() -> None:
    program = programs()["nothing, float32 by force"]()
    found = mb.check(program.model, program.loss_fn, program.batch, microbatch_size=SIZE)
    assert found.ok
    assert found.yardstick == "float32"
    assert "cannot run in float64" in found.notes[0]


def test_a_cut_into_one_is_made_two() -> None:
    found = mb.check(network(), squared, batch(), microbatch_size=99)
    assert (found.microbatches, found.microbatch_size) == (2, ROWS // 2)
    assert found.notes


def detached(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).mean().detach()


def nothing(model: nn.Module, batch: Any) -> None:
    return None


def zero(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).sum() * 0


def not_a_number(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).sum() * torch.nan


def by_row(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).sum(1)


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (detached, "does not depend on the model"),
        (nothing, "nothing to contribute"),
        (zero, "gradient is 0"),
        (not_a_number, "infinite or NaN"),
        (by_row, "return a 0-d tensor"),
    ],
)
def test_what_cannot_be_compared_is_said(loss_fn: Callable[..., Any], words: str) -> None:
    with pytest.raises(CheckError, match=words):
        mb.check(network(), loss_fn, batch())


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(BatchError, match="1 rows"):
        mb.check(network(), squared, batch(1))
    with pytest.raises(ConfigError, match="microbatch_size"):
        mb.check(network(), squared, batch(), microbatch_size=0)


# -- what it says -------------------------------------------------------------------------------------------------


def test_a_check_that_holds_says_so() -> None:
    found = mb.check(network(), squared, batch(), microbatch_size=SIZE)
    assert str(found).startswith(
        f"equal to rounding: {found.relative_error:.1e}; the full batch's own rounding error is"
    )
    assert found.table().splitlines()[0].split() == ["parameter", "error", "full", "batch's", "own"]
    assert len(found.table().splitlines()) == 1 + len(found.parameters)


def test_a_check_that_does_not_names_cause_place_amounts_and_remedy() -> None:
    found = mb.check(network(nn.BatchNorm1d(8)), masked, batch(), microbatch_size=SIZE)
    assert found.verdict.startswith("not the large batch's gradient: ")
    head, *lines = found.table().splitlines()
    assert head.split() == ["cause", "where", "alone", "without", "it"]
    assert sorted(line.split()[0] for line in lines) == ["batch_statistics", "counts"]
    assert "mb.Loss(sum=..., count=...)" in str(found)
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (told["ok"], told["rows"]) == (False, ROWS)
    assert [cause["kind"] for cause in told["causes"]] == [cause.kind for cause in found.causes]


def test_a_gradient_that_is_not_finite_is_an_infinite_error() -> None:
    given = batch()
    given["mask"] = given["mask"].clone()
    given["mask"][:SIZE] = 0  # a microbatch whose mean is one of nothing
    found = mb.check(network(), masked, given, microbatch_size=SIZE)
    assert found.relative_error == float("inf")
    assert [cause.kind for cause in found.causes] == ["counts"]
    assert found.causes[0].without is not None
    assert found.causes[0].without < 1e-12
    assert found.as_dict()["relative_error"] is None
    assert "not finite" in str(found)


@pytest.mark.parametrize("exact", [True, False])
def test_a_check_reports_how_far_it_is(exact: bool) -> None:
    told: list[tuple[str, float]] = []
    layers = [nn.Linear(4, 8), *([] if exact else [nn.BatchNorm1d(8)]), nn.Linear(8, 1)]
    found = mb.check(
        nn.Sequential(*layers),
        lambda model, x: model(x).square().mean(),
        torch.randn(16, 4),
        microbatch_size=4,
        progress=lambda doing, share: told.append((doing, share)),
    )
    assert found.ok == exact
    assert told[0] == ("comparing the two gradients", 0.0)
    assert all(0 <= share < 1 for _, share in told)
    for doing in {doing for doing, _ in told}:  # forwards, but for the change to the longer search
        shares = [share for each, share in told if each == doing]
        assert shares == sorted(shares)
    assert any(doing.startswith("looking") for doing, _ in told) == (not exact)
