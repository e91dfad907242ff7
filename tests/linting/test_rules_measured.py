"""Both loops of every rule run: the right one is the full batch to rounding, the wrong one off by what the rule says.

The numbers in `Rule.how_much` are measured here, on a small model in float64. Costs in time are counted (reductions,
reads of the device, graphs), never timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from tests.linting.rule_loops import (
    EPOCHS,
    FEATURES,
    ROWS,
    SCALE,
    Data,
    N,
    Run,
    apart,
    factor,
    flat,
    full,
    network,
    regression,
    run,
    share,
    windows,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from microbatch.linting.rules.table import RULES

ROUNDING = 1e-12


def tokens(microbatches: int) -> Data:
    """Rows of 6 tokens and their labels; in a microbatch, from 1 to 6 labels of each row count."""
    made = torch.Generator().manual_seed(1)
    x = torch.randint(7, (microbatches, ROWS, 6), generator=made)
    length = torch.randint(1, 7, (microbatches, 1, 1), generator=made)
    y = (3 * x + 1) % 7
    return list(zip(x, y.where(torch.arange(6) < length, -100), strict=True))


def pairs(microbatches: int) -> Data:
    x = [each for each, _ in regression(microbatches)]
    made = torch.Generator().manual_seed(2)
    return [(each, each + 0.1 * torch.randn(each.shape, generator=made)) for each in x]


def some_empty(microbatches: int) -> Data:
    """Every eighth microbatch, the third of every second window, has no row."""
    return [(x[:0], y[:0]) if i % 8 == 2 else (x, y) for i, (x, y) in enumerate(regression(microbatches))]


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7))


def normalised(norm: type[nn.Module], *sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), norm(*sizes), nn.Tanh(), nn.Linear(8, 1))


def mean_over_tokens(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)


def contrastive(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x) @ model(y).T
    return cross_entropy(logits, torch.arange(len(logits)))


def linear(steps: int) -> Callable[[Any], Any]:
    return lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)


def schedule() -> dict[str, Any]:
    """The learning rate that falls to a hundredth in 60 steps, set by hand."""
    taken = 0

    def after(_: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nonlocal taken
        taken += 1
        group = optimizer.param_groups[0]
        group["lr"] = group.setdefault("first", group["lr"]) * (1 - 0.99 * min(taken, 60) / 60)

    return {"after": after}


def temperature() -> dict[str, Any]:
    scale = torch.zeros((), requires_grad=True)

    def loss(model: nn.Module, x: Tensor, _: Tensor) -> Tensor:
        z = model(x)
        return cross_entropy(z @ z.T * scale.exp(), torch.arange(len(z)))

    return {"parameters": (scale,), "loss": loss, "model": network(3)}


def a_temperature() -> dict[str, Any]:
    scale = torch.zeros((), requires_grad=True)
    return {"log_scale": scale, "parameters": (scale,), "model": network(3)}


def first_norm() -> float:
    """The norm of the full batch's first gradient, of which thresholds are parts."""
    return full(windows(regression(N))).gradients[0].norm().item()


@dataclass
class Case:
    """How a rule's loops are run, and what they are compared with."""

    loader: Data
    names: Callable[[], dict[str, Any]] = dict
    full: Callable[[], dict[str, Any]] = dict
    batches: Data | None = None
    call: str = ""

    def run(self, source: str, optimizer: str) -> Run:
        return run(source + self.call, self.loader, optimizer=optimizer, **self.names())

    def right(self, optimizer: str) -> Run:
        return full(self.batches or windows(self.loader) * EPOCHS, optimizer=optimizer, **self.full())


def clipped(part: float, microbatches: int = 24) -> Case:
    threshold = part * first_norm()
    return Case(regression(microbatches), lambda: {"max_norm": threshold}, lambda: {"clip": threshold})


# The rules whose loops need more than a regression over 24 microbatches.
CASES: dict[str, Callable[[], Case]] = {
    **dict.fromkeys(("MB110", "MB111", "MB112"), lambda: Case(regression(26))),
    "MB113": lambda: clipped(0.1, 26),
    "MB114": lambda: Case(some_empty(24)),
    **dict.fromkeys(("MB201", "MB202", "MB203", "MB204"), lambda: clipped(0.3)),
    "MB301": lambda: Case(regression(24), full=schedule),
    "MB302": lambda: Case(regression(24), lambda: {"scheduler": linear(60)}, schedule),
    "MB304": lambda: Case(regression(24), batches=(windows(regression(24)) * EPOCHS)[10:], call="\nresume(10)\n"),
    "MB401": lambda: Case(
        tokens(24),
        lambda: {"model": language_model()},
        lambda: {"model": language_model(), "loss": mean_over_tokens},
    ),
    "MB402": lambda: Case(pairs(24), lambda: {"model": network(3)}, lambda: {"model": network(3), "loss": contrastive}),
    "MB404": lambda: Case(regression(60, rows=10), batches=regression(60, rows=10)),
    "MB405": lambda: Case(regression(24), a_temperature, temperature),
}


def case_of(code: str) -> Case:
    return CASES.get(code, lambda: Case(regression(24)))()


def changed(source: str, replace: dict[str, str]) -> str:
    for old, new in replace.items():
        assert old in source
        source = source.replace(old, new)
    return source


def wrong(code: str, optimizer: str = "SGD") -> tuple[Run, Run]:
    """Run the wrong loop and the full batch."""
    case = case_of(code)
    return case.run(RULES[code].wrong, optimizer), case.right(optimizer)


def said(code: str, *phrases: str) -> None:
    """Hold what was measured against the words of the rule."""
    missing = [phrase for phrase in phrases if phrase not in RULES[code].how_much]
    assert not missing, f"{code} does not say {missing}: {RULES[code].how_much}"


def same(loop: Run, right: Run) -> None:
    """Hold every gradient that was handed to the optimizer, and the last weights, against the full batch's."""
    assert len(loop.gradients) == len(right.gradients)
    assert all((a - b).norm() <= ROUNDING * b.norm() for a, b in zip(loop.gradients, right.gradients, strict=True))
    assert apart(loop, right) < ROUNDING


LOOPS = [code for code in RULES if not code.startswith("MB0")]
RANKS = ["MB501", "MB502", "MB503"]
OWN_OPTIMIZER = ["MB305", "MB403"]  # their loops create it
OFF = [  # the wrong loop's weights end elsewhere
    *("MB101", "MB102", "MB103", "MB104", "MB105", "MB106", "MB107", "MB110", "MB111", "MB112", "MB113", "MB114"),
    *("MB201", "MB202", "MB301", "MB302", "MB304", "MB401", "MB402", "MB404", "MB405"),
]
SAME_GRADIENTS = ["MB303", "MB601", "MB602", "MB603", "MB701", "MB702"]
UNORDERED = "ignore:Detected call of `lr_scheduler.step:UserWarning"


def test_every_rule_with_a_loop_is_measured() -> None:
    raises = ["MB203", "MB204"]
    assert sorted([*RANKS, *OWN_OPTIMIZER, *OFF, *SAME_GRADIENTS, *raises]) == sorted(LOOPS)
    assert all(rule.how_much for code, rule in RULES.items() if code in LOOPS)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("code", [code for code in LOOPS if code not in {*RANKS, *OWN_OPTIMIZER}])
def test_the_right_loop_is_the_full_batch(code: str, optimizer: str) -> None:
    case = case_of(code)
    same(case.run(RULES[code].right, optimizer), case.right(optimizer))


@pytest.mark.parametrize("code", ["MB110", "MB111", "MB112", "MB113"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_last_window_is_whole_for_every_length(code: str, size: int) -> None:
    for length in range(2 * size, 3 * size):
        batches = regression(length)
        right = full(windows(batches, size) * 2, clip=0.3 if code == "MB113" else None)
        same(run(RULES[code].right, batches, N=size, epochs=2, max_norm=0.3), right)
        if length % size:
            assert apart(run(RULES[code].wrong, batches, N=size, epochs=2, max_norm=0.3), right) > 1e-3


# -- how far the weights end from the full batch's --------------------------------------------------------------------


@pytest.mark.filterwarnings(UNORDERED)  # which torch says of MB302
@pytest.mark.parametrize("code", OFF)
def test_the_wrong_loop_is_off_by_what_the_rule_says(code: str) -> None:
    for optimizer in ("SGD", "AdamW"):
        off = apart(*wrong(code, optimizer))
        said(
            code, f"{optimizer} {share(off)}" if off > 1e-5 else f"{optimizer} nothing that can be seen ({share(off)})"
        )


@pytest.mark.parametrize("code", SAME_GRADIENTS)
def test_where_training_is_right_the_wrong_loop_is_the_full_batch_too(code: str) -> None:
    same(*wrong(code))


def test_mb101_with_clipping() -> None:
    step = "    optimizer.step()"
    clip = "    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n"
    source = changed(RULES["MB101"].wrong, {step: clip + step})
    batches = regression(24)
    for optimizer in ("SGD", "AdamW"):
        loop = run(source, batches, optimizer=optimizer, torch=torch)
        right = full(windows(batches) * EPOCHS, optimizer=optimizer, clip=1.0)
        said("MB101", f"{optimizer} with clipping at 1.0 {share(apart(loop, right))}")


@pytest.mark.parametrize(("code", "times"), [("MB101", 4), ("MB102", 0.25), ("MB114", 0.75)])
def test_gradients_that_are_too_large_or_too_small(code: str, times: float) -> None:
    loop, right = wrong(code)
    assert torch.allclose(loop.gradients[0], times * right.gradients[0], rtol=ROUNDING)


@pytest.mark.parametrize("code", ["MB103", "MB106"])
def test_only_the_last_microbatch_with_a_quarter_of_its_weight(code: str) -> None:
    loop, _ = wrong(code)
    alone = full([regression(4)[-1]])
    assert torch.allclose(loop.gradients[0], alone.gradients[0] / N, rtol=ROUNDING)


def test_mb104_takes_four_times_as_many_steps() -> None:
    loop, right = wrong("MB104")
    assert len(loop.gradients) == N * len(right.gradients)
    assert torch.allclose(loop.gradients[0], full(regression(1)).gradients[0] / N, rtol=ROUNDING)


def test_mb105_begins_with_one_microbatch() -> None:
    loop, _ = wrong("MB105")
    first, second = windows(regression(1)), windows(regression(5)[1:])
    assert torch.allclose(loop.gradients[0], full(first).gradients[0] / N, rtol=ROUNDING)
    moved = network()
    nn.utils.vector_to_parameters(loop.weights[1], moved.parameters())
    assert torch.allclose(loop.gradients[1], full(second, model=moved).gradients[0], rtol=1e-9)


def test_mb110_mb111_take_fewer_steps_and_mb112_half_a_gradient() -> None:
    for code in ("MB110", "MB111"):
        loop, right = wrong(code)
        assert (len(loop.gradients), len(right.gradients)) == (60, 70)
    loop, right = wrong("MB112")  # 26 microbatches: the seventh window has 2
    assert torch.allclose(loop.gradients[5], right.gradients[5], rtol=1e-9)
    assert factor(loop, right, 6) == pytest.approx(2 / N)


def test_mb113_steps_without_clipping_once_an_epoch() -> None:
    loop, right = wrong("MB113")
    threshold = 0.1 * first_norm()
    assert [round(each.norm().item() / threshold, 3) for each in right.gradients] == [1.0] * 70
    unclipped = [i for i, each in enumerate(loop.gradients) if each.norm() > 1.01 * threshold]
    assert unclipped == list(range(6, 70, 7))
    said("MB113", f"{factor(loop, right, 6):.2g} times too large")


# -- clipping and scaling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.9, 0.3])
def test_mb201_by_threshold(part: float) -> None:
    batches, threshold = regression(N), part * first_norm()
    first = run(RULES["MB201"].wrong, batches, steps=1, max_norm=threshold).gradients[0]
    true = full(windows(batches), clip=threshold).gradients[0]
    off = ((first - true).norm() / true.norm()).item()
    said("MB201", f"{share(off) if off > ROUNDING else 'nothing'} at {part:g} of the gradient's norm")


def test_mb202_the_step_is_smaller_by_the_loss_scale() -> None:
    loop, right = wrong("MB202")
    said("MB202", f"{1 / factor(loop, right):,.0f} times too small")


def test_mb203_raises() -> None:
    with pytest.raises(RuntimeError, match="unscale_\\(\\) has already been called"):
        wrong("MB203")


def test_mb204_unscales_again_and_then_raises() -> None:
    case = case_of("MB204")
    once = {"for step in range(steps)": "for step in range(1)"}
    loop, right = case.run(changed(RULES["MB204"].wrong, once), "SGD"), case.right("SGD")
    # Clipped as it should be; what the scaler hands to the optimizer is divided by the scale once more.
    assert torch.allclose(loop.gradients[0] * SCALE, right.gradients[0], rtol=ROUNDING)
    said("MB204", f"{1 / factor(loop, right):,.0f} times too small")
    with pytest.raises(RuntimeError, match="being called after step"):
        wrong("MB204")
    late = {
        "        scaler.scale(loss).backward()\n": "        scaler.scale(loss).backward()\n        scaler.update()\n"
    }
    with pytest.raises(AssertionError, match="No inf checks"):
        case.run(changed(RULES["MB204"].right, late), "SGD")
    with pytest.raises(RuntimeError, match="already been called since the last update"):
        case.run(
            changed(RULES["MB204"].right, {"    scaler.update()\n": "", "    scaler.unscale_(optimizer)\n": ""}), "SGD"
        )


# -- schedules --------------------------------------------------------------------------------------------------------


def last_rate(code: str, source: str) -> float:
    done = case_of(code).run(source, "SGD")
    return done.names["optimizer"].param_groups[0]["lr"] / 0.1


def test_mb301_ends_before_a_quarter_of_its_way() -> None:
    assert last_rate("MB301", RULES["MB301"].right) == pytest.approx(0.01)
    rate = last_rate("MB301", RULES["MB301"].wrong)
    assert rate == pytest.approx(1 - 0.99 / N)
    said("MB301", f"{100 * rate:.0f} % of the first one, not 1 %")


@pytest.mark.filterwarnings(UNORDERED)
def test_mb302_is_at_its_end_after_a_quarter_of_the_steps() -> None:
    rates: list[float] = []

    def told(code: str) -> list[float]:
        rates.clear()
        case = case_of("MB302")
        with patch.object(torch.optim.SGD, "zero_grad", lambda self: rates.append(self.param_groups[0]["lr"] / 0.1)):
            case.run(code, "SGD")
        return rates

    for source, steps in ((RULES["MB302"].right, 60), (RULES["MB302"].wrong, 15)):
        assert sum(rate > 0.0101 for rate in told(source)) + 1 == steps
    said("MB302", "after 15 of 60 steps")


def lag(ema: Tensor, right: Run) -> float:
    return ((ema - right.weights[-1]).norm() / (right.weights[-1] - right.weights[0]).norm()).item()


def test_mb303_the_average_follows_faster() -> None:
    averages: list[Tensor] = []

    def after(model: nn.Module, _: Any) -> None:
        now = flat(model.parameters())
        averages.append(now if not averages else 0.9 * averages[-1] + 0.1 * now)

    case = case_of("MB303")
    right = full(windows(case.loader) * EPOCHS, after=after)
    ends = {
        name: flat(case.run(source, "SGD").names["ema"].module.parameters())
        for name, source in (("right", RULES["MB303"].right), ("wrong", RULES["MB303"].wrong))
    }
    assert torch.allclose(ends["right"], averages[-1], rtol=1e-9)
    said(
        "MB303", f"{share(lag(ends['wrong'], right))} of the distance travelled, not {share(lag(ends['right'], right))}"
    )
    said("MB303", f"acts like {0.9**N:.2g}")


def test_mb304_repeats_what_was_trained_on() -> None:
    seen: dict[str, list[int]] = {}
    for name in ("wrong", "right"):
        case = case_of("MB304")
        order = iter(range(10**6))
        drawn: list[int] = seen.setdefault(name, [])

        class Batches:
            def __next__(self) -> tuple[Tensor, Tensor]:
                drawn.append(next(order))  # noqa: B023 - called in this turn only
                return case.loader[drawn[-1] % 24]  # noqa: B023

        run(getattr(RULES["MB304"], name) + case.call, case.loader, batches=Batches())
    # 10 steps were taken before, with microbatches 0 to 39; the rest of what is drawn is trained on.
    trained = {"wrong": seen["wrong"][10:], "right": seen["right"][40:]}
    again = {name: sum(i < 40 for i in drawn) for name, drawn in trained.items()}
    assert again == {"wrong": 30, "right": 0}
    said("MB304", f"{again['wrong']} of 40 microbatches")


def test_mb305_loses_its_moments() -> None:
    batches = regression(24)
    made = "torch.optim.AdamW(model.parameters(), lr=0.01)"
    ways = {"AdamW": made, "SGD with momentum": "torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)"}
    for optimizer, how in ways.items():
        right = full(windows(batches) * EPOCHS, optimizer=optimizer)
        same(run(changed(RULES["MB305"].right, {made: how}), batches), right)
        said("MB305", f"{optimizer} {share(apart(run(changed(RULES['MB305'].wrong, {made: how}), batches), right))}")
    plain = changed(RULES["MB305"].wrong, {made: "torch.optim.SGD(model.parameters(), lr=0.1)"})
    same(run(plain, batches), full(windows(batches) * EPOCHS))
    said("MB305", "SGD without momentum nothing")


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_mb401_first_gradient() -> None:
    loop, right = wrong("MB401")
    off = (loop.gradients[0] - right.gradients[0]).norm() / right.gradients[0].norm()
    counted = [int((labels != -100).sum()) for _, labels in case_of("MB401").loader[:N]]
    said(
        "MB401",
        f"{share(off.item())} for microbatches of {counted[0]}, {counted[1]}, {counted[2]} and {counted[3]} tokens",
    )


def test_mb403_depends_on_the_rows_of_a_microbatch() -> None:
    made = "optim.SGD(model.parameters(), lr=0.1)"
    for optimizer, how in {"SGD": made, "AdamW": "optim.AdamW(model.parameters(), lr=0.01)"}.items():
        batches = regression(24)
        right = full(windows(batches) * EPOCHS, optimizer=optimizer, model=normalised(nn.GroupNorm, 2, 8))
        same_to_kinks = run(changed(RULES["MB403"].right, {made: how}), batches)
        assert apart(same_to_kinks, right) < ROUNDING
        right = full(windows(batches) * EPOCHS, optimizer=optimizer, model=normalised(nn.BatchNorm1d, 8))
        loop = run(changed(RULES["MB403"].wrong, {made: how}), batches)
        said("MB403", f"{optimizer} {share(apart(loop, right))}")
    for rows in (4, 16, 64):
        batches = regression(N, rows=rows)
        first = run(RULES["MB403"].wrong, batches, steps=1).gradients[0]
        true = full(windows(batches), model=normalised(nn.BatchNorm1d, 8)).gradients[0]
        said("MB403", f"{share(((first - true).norm() / true.norm()).item())} with {rows} rows")


def test_mb405_the_temperature_counts_four_times() -> None:
    loop, right = wrong("MB405")
    assert torch.allclose(loop.gradients[0][:-1], right.gradients[0][:-1], rtol=1e-9)
    assert torch.allclose(loop.gradients[0][-1], N * right.gradients[0][-1], rtol=ROUNDING)


# -- ranks, time and memory: counted ----------------------------------------------------------------------------------


@pytest.fixture
def reductions() -> Iterator[list[int]]:
    """The gradient reductions of DistributedDataParallel in a group of one rank."""
    counted: list[int] = []

    def hook(
        _: object,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage] -- it is what torch's own pages name
    ) -> torch.futures.Future[Tensor]:
        counted.append(bucket.index())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    class Counted(DistributedDataParallel):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.register_comm_hook(None, hook)

    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] -- likewise
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with patch.object(nn.parallel, "DistributedDataParallel", Counted):
            yield counted
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("code", RANKS)
def test_reductions_of_a_step(code: str, reductions: list[int]) -> None:
    case, right = case_of(code), case_of(code).right("SGD")
    same(case.run(RULES[code].right, "SGD"), right)
    assert len(reductions) == 60
    reductions.clear()
    same(case.run(RULES[code].wrong, "SGD"), right)  # on one rank; on several, what is not reduced is another gradient
    per_step, rest = divmod(len(reductions), 60)
    assert (per_step, rest) == (0 if code == "MB503" else 4, 0)
    said(code, f"{per_step} reductions of the gradients in each step instead of 1")


class Reads(TorchDispatchMode):
    """Counts the numbers that are read back from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_mb601_reads_of_a_step() -> None:
    counts: dict[str, float] = {}
    for name in ("wrong", "right"):
        read: list[int] = []
        for steps in (0, 60):
            with Reads() as reads:
                run(getattr(RULES["MB601"], name), regression(24), steps=steps)
            read.append(reads.count)
        counts[name] = (read[1] - read[0]) / 60
    said("MB601", f"{counts['wrong']:g} reads in each step instead of {counts['right']:g}")


class Saved:
    """The tensors that graphs hold for their backward: how many now, and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "Held":
        self.now += 1
        self.most = max(self.most, self.now)
        return Held(self, tensor)


class Held:
    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor

    def __del__(self) -> None:
        self.saved.now -= 1


def test_mb602_graphs_at_the_same_time() -> None:
    most: dict[str, int] = {}
    for name in ("wrong", "right"):
        saved = Saved()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
            case_of("MB602").run(getattr(RULES["MB602"], name), "SGD")
        most[name] = saved.most
    said("MB602", f"{most['wrong'] / most['right']:g} graphs at the same time instead of 1")


def test_mb603_calls_of_a_step() -> None:
    counts: dict[str, float] = {}
    for name in ("wrong", "right"):
        with patch.object(torch.cuda, "empty_cache") as emptied:
            case_of("MB603").run(getattr(RULES["MB603"], name), "SGD")
        counts[name] = emptied.call_count / 60
    said("MB603", f"{counts['wrong']:g} calls in each step instead of {counts['right']:g}")


# -- what is logged ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["MB701", "MB702"])
def test_the_number_that_is_logged(code: str) -> None:
    loop, right = wrong(code)
    assert case_of(code).run(RULES[code].right, "SGD").printed == pytest.approx(right.printed, rel=ROUNDING)
    logged, true = torch.tensor(loop.printed), torch.tensor(right.printed)
    if code == "MB701":
        assert torch.allclose(logged * N, true, rtol=ROUNDING)
        said(code, f"{1 / N:g} of the loss")
    else:
        said(code, f"{share(((logged - true).abs() / true).mean().item())} away from the batch's loss")
