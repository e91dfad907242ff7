"""DeepSpeed engines: the whole batch's gradient from ZeRO 0 to 3, whatever the cut, the rank and the counts."""

import copy
import importlib
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.ranks.start_deepspeed import IS_THERE, make_engine
from torch import Tensor, nn

from microbatch.batch.batches import Batches
from microbatch.engines.deepspeed import DeepSpeed
from microbatch.errors import ConfigError, MicrobatchError
from microbatch.loss.loss import Loss
from microbatch.step.accumulator import Accumulator
from microbatch.warned import MicrobatchWarning

pytestmark = pytest.mark.skipif(not IS_THERE, reason="needs DeepSpeed: pip install microbatch[deepspeed]")

Batch = dict[str, Tensor]
LENGTH = 6
MIXED = [6, 1, 2, 5, 0, 3, 6, 4]
STAGES = [0, 1, 2, 3]
MANAGED = {"": {}, ", caller's": {"managed_gradient_accumulation": False}}
LR = 0.5  # large, so that the weights' change tells the gradient


class Model(nn.Module):
    """A classifier of tokens with two layers of one shape that a batch may choose from."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.choice = nn.ModuleList([nn.Linear(5, 5, bias=False) for _ in range(2)])
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor, *, choose: int | None = None) -> Tensor:
        y = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        chosen = self.choice if choose is None else [self.choice[choose]]
        return self.last(y + sum(each(y) for each in chosen)).to(x.dtype)


def make_model() -> Model:
    torch.manual_seed(5)
    return Model()


def make_batch(tokens: list[int] = MIXED) -> Batch:
    """Return a row for every number of tokens, the rest of its labels masked."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(len(tokens), LENGTH, 3, generator=generator)
    labels = torch.randint(4, (len(tokens), LENGTH), generator=generator)
    for row, number in enumerate(tokens):
        labels[row, number:] = -100
    return {"x": x, "labels": labels}


def share(rank: int, ranks: int, batch: Batch | None = None) -> Batch:
    """Return one rank's rows: one for each but the first, which has all others."""
    batch = batch or make_batch()
    first = len(batch["x"]) - (ranks - 1)
    start, stop = (0, first) if rank == 0 else (first + rank - 1, first + rank)
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def tokens_of(batch: Batch) -> dict[str, Tensor]:
    return {"loss": (batch["labels"] >= 0).sum()}


def token_sum(y: Tensor, batch: Batch) -> Loss:
    logits, labels = y.flatten(0, 1), batch["labels"].flatten()
    return Loss(sum=F.cross_entropy(logits, labels, reduction="sum"), count=(labels >= 0).sum())


def token_loss(model: nn.Module, batch: Batch) -> Loss:
    return token_sum(model(batch["x"]), batch)


def row_mean(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).square().mean()


def two_terms(model: nn.Module, batch: Batch) -> dict[str, Any]:
    y = model(batch["x"])
    return {"tokens": token_sum(y, batch), "router": y.sum(-1).square().mean()}


def none_where_masked(model: nn.Module, batch: Batch) -> Any:
    """Leave the model uncalled, which the other ranks wait for."""
    return token_loss(model, batch) if bool((batch["labels"] >= 0).any()) else None


def mean_of_nothing(model: nn.Module, batch: Batch) -> Any:
    """Give a loss for a count of 0 whose gradient is NaN, whatever it is multiplied with."""
    y = model(batch["x"])
    loss = token_sum(y, batch)
    return loss if bool(loss.count) else Loss(sum=y.sum() / loss.count, count=0)


class World:
    """An engine over the ranks, and what a step of it changes."""

    def __init__(self, stage: int, **config: Any) -> None:
        model = make_model()
        self.stage = stage
        optimizer = torch.optim.SGD(model.parameters(), lr=config.pop("lr", LR))
        self.engine = make_engine(model, optimizer, stage=stage, **config)
        self.events: list[str] = []
        self.sized(2)

    def weights(self) -> Tensor:
        parameters = list(self.engine.module.parameters())
        if self.stage:  # of narrow parameters, what the optimizer holds
            whole = importlib.import_module("deepspeed.utils").safe_get_full_fp32_param
            parameters = [whole(each) for each in parameters]
        return torch.cat([each.detach().double().flatten() for each in parameters])

    def sized(self, microbatch_size: int | None) -> "World":
        """Use the same engine with microbatches of another size."""
        self.events.clear()
        self.accumulator = DeepSpeed(self.engine, microbatch_size=microbatch_size, listeners=[self.hear])
        return self

    def hear(self, event: object) -> None:
        self.events.append(type(event).__name__)

    def step(self, batch: Batch | Batches, loss_fn: Callable[..., Any], **settings: Any) -> dict[str, Any]:
        before = self.weights()
        step = self.accumulator.step(batch, loss_fn, **settings)
        return {
            "weights": before,
            "gradient": (before - self.weights()) / LR,
            "loss": step.loss,
            "terms": dict(step.terms),
            "count": step.count,
            "samples": step.samples,
            "microbatches": step.microbatches,
            "microbatch_size": step.microbatch_size,
            "grad_norm": step.grad_norm,
            "applied": step.applied,
            "clean": all(p.grad is None for p in self.engine.module.parameters()),
            "boundary": self.engine._is_gradient_accumulation_boundary,
        }

    def error(self, batch: Batch, loss_fn: Callable[..., Any], **settings: Any) -> str:
        before, random = self.weights(), torch.get_rng_state()
        try:
            self.accumulator.step(batch, loss_fn, **settings)
        except (MicrobatchError, ZeroDivisionError) as error:
            assert torch.equal(before, self.weights()), "a step that failed changed the weights"
            assert torch.equal(random, torch.get_rng_state()), "a step that failed drew random numbers"
            return f"{type(error).__name__}: {error}"
        return "none"


@cache
def world_of(stage: int) -> World:
    """Return an engine that cases share: making one takes longer than a case."""
    return World(stage)


# -- the cases, each run on every rank of one start of the processes --------------------------------------------------


def case_tokens(rank: int, ranks: int) -> Any:
    found = {}
    for stage in STAGES:
        for name, config in MANAGED.items():
            world = World(stage, **config) if config else world_of(stage)
            steps = [world.step(share(rank, ranks), token_loss, counts=tokens_of) for _ in range(2)]
            found[f"ZeRO-{stage}{name}"] = [*steps, [*world.events]]
    return found


def case_losses(rank: int, ranks: int) -> Any:
    found = {}
    counts = {"tokens": (share(rank, ranks)["labels"] >= 0).sum()}
    for stage in STAGES:
        own, world = share(rank, ranks), world_of(stage).sized(None)
        found[stage] = {"row mean": world.step(own, row_mean)}
        world.sized(1)
        found[stage] |= {
            "two terms": world.step(own, two_terms, counts=counts),
            "none": world.step(own, none_where_masked, counts=tokens_of),
            "nothing": world.step(own, mean_of_nothing, counts=tokens_of),
        }
    return found


def case_no_rows(rank: int, ranks: int) -> Any:
    whole = make_batch()
    empty = {name: tensor[:0] for name, tensor in whole.items()}
    own = whole if rank == 0 else empty

    def drawing(model: nn.Module, batch: Batch) -> Loss:
        torch.rand(())
        return token_loss(model, batch)

    found = {}
    for stage in STAGES:
        world = world_of(stage).sized(2)
        error, before = world.error(empty, row_mean), torch.get_rng_state()
        got = world.step(own, drawing, counts=tokens_of)
        found[stage] = [error, got, torch.equal(before, torch.get_rng_state())]
    return found


def case_configured(rank: int, ranks: int) -> Any:
    own = share(rank, ranks)
    made = {
        "sum": (1, {"gradient_allreduce_op": "sum"}),
        "prescaled": (1, {"prescale_gradients": True}),
        "overlapping": (1, {"zero": {"overlap_comm": True}}),
        "buckets": (2, {"zero": {"reduce_bucket_size": 20, "allgather_bucket_size": 20, "overlap_comm": True}}),
        "offloaded": (2, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
        "clipped": (2, {"gradient_clipping": 0.1}),
        "clipped by default": (0, {"gradient_clipping": 1.0}),
    }
    return {
        name: World(stage, **config).step(own, token_loss, counts=tokens_of) for name, (stage, config) in made.items()
    }


def case_narrow(rank: int, ranks: int) -> Any:
    own, bf16 = share(rank, ranks), {"bf16": {"enabled": True}}
    wide = {**bf16, "data_types": {"grad_accum_dtype": "fp32"}}
    made = [(1, wide), (2, bf16), (3, wide)]
    return [World(stage, **copy.deepcopy(config)).step(own, token_loss, counts=tokens_of) for stage, config in made]


def case_late(rank: int, ranks: int) -> Any:
    """Refuse, and go on as if nothing had been."""

    def some(model: nn.Module, batch: Batch) -> Any:
        loss = row_mean(model, batch)
        return loss if bool((batch["labels"][0] >= 0).all()) else None

    def wrong(batch: Batch) -> dict[str, Any]:
        return {"loss": 1 + tokens_of(batch)["loss"]}

    found, own = [], share(rank, ranks)
    nan = {"x": torch.full((2, LENGTH, 3), torch.nan), "labels": torch.zeros(2, LENGTH, dtype=torch.long)}
    # In the last, the engine does not know which backward is the last.
    for world in [*[world_of(stage).sized(2) for stage in STAGES], World(2, **MANAGED[", caller's"])]:
        found += [
            {
                "no counts": world.error(own, token_loss),
                "wrong counts": world.error(own, token_loss, counts=wrong),
                "some rows": world.error(own, some),
                "masked": world.error(
                    {**own, "labels": torch.full_like(own["labels"], -100)}, mean_of_nothing, counts={"loss": 0}
                ),
                "not finite": world.error(nan if rank == 0 else own, row_mean),
                "after": world.step(own, token_loss, counts=tokens_of),
            }
        ]
    return found


def case_fails(rank: int, ranks: int) -> Any:
    """Fail on one rank."""

    def fail(model: nn.Module, batch: Batch) -> Tensor:
        loss = row_mean(model, batch)
        return loss / 0 if rank == 0 and len(batch["x"]) == 1 else loss

    def fail_in_python(model: nn.Module, batch: Batch) -> Tensor:
        return fail(model, batch) if rank or len(batch["x"]) > 1 else row_mean(model, batch) * (1 // 0)

    def fail_before(model: nn.Module, batch: Batch) -> Tensor:
        if rank == 0 and first.pop():
            raise ZeroDivisionError
        return row_mean(model, batch)

    def bad_counts(batch: Batch) -> dict[str, Any]:
        return {"loss": 1 // 0} if rank == 0 else tokens_of(batch)

    found = {}
    for stage in STAGES:
        own, world = share(rank, ranks), world_of(stage).sized(2)
        found[stage] = {"counts": world.error(own, token_loss, counts=bad_counts)}
        found[stage]["loss function"] = world.error(own, fail_in_python)
        first = [False, False, False, True, False]  # in the second pass, and in none after it
        found[stage]["before the model"] = world.error(own, fail_before)
        found[stage]["after"] = world.step(own, token_loss, counts=tokens_of)
    return found


def case_parameters(rank: int, ranks: int) -> Any:
    def by_rank(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"], choose=rank).square().mean()

    found: dict[str, Any] = {str(stage): world_of(stage).step(share(rank, ranks), by_rank) for stage in (0, 1)}
    found["2"] = World(2).sized(8).error(share(rank, ranks), by_rank)
    return found


def case_set_up(rank: int, ranks: int) -> Any:
    """Differ on rank 1 in what must be the same; the control is the same engine afterwards."""
    own = share(rank, ranks)
    several = World(1, lr=0.25 if rank else 0.5, gradient_clipping=0.5 * rank, zero={"reduce_bucket_size": 99 + rank})
    found = [several.error(own, row_mean)]
    bias = world_of(0).engine.module.last.bias.requires_grad_(rank != 1)
    found.append(world_of(0).sized(2).error(own, row_mean))
    bias.requires_grad_(True)
    return [*found, world_of(0).error(own, row_mean)]


def case_spoilt(rank: int, ranks: int) -> Any:
    """Fail in the midst of what communicates, where there is nobody to wait."""

    def fail(model: nn.Module, batch: Batch) -> Tensor:
        return row_mean(model, batch) * (1 if len(batch["x"]) == 2 else 1 // 0)

    def never(model: nn.Module, batch: Batch) -> Tensor:
        return row_mean(model, batch) * torch.rand(()) * (1 // 0)

    own = {name: tensor[:3] for name, tensor in make_batch().items()}
    found = {}
    for stage in (1, 2):
        world = world_of(stage).sized(2)
        found[stage] = [world.error(own, never), world.error(own, fail), world.error(own, row_mean)]
    world = world_of(0)
    hook = world.engine.optimizer.register_step_pre_hook(lambda *_: 1 // 0)
    found[0] = [world.error(own, row_mean), world.error(own, row_mean)]
    hook.remove()
    return found


def case_as_in_every_window(rank: int, ranks: int) -> Any:
    """Use what an engine's window has from the window of an accumulator."""

    def writing(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            next(iter(model.parameters())).add_(0.0)
        return row_mean(model, batch)

    whole, found = make_batch(), []
    shorter = {"x": whole["x"][:3, :4], "labels": whole["labels"][:3, :4]}  # two tokens fewer
    parts = Batches([shorter, {name: tensor[3:] for name, tensor in whole.items()}])
    for stage in (0, 1):
        world = world_of(stage).sized(2)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", MicrobatchWarning)
            world.step(whole, row_mean)
        said = [str(each.message) for each in told if each.category is MicrobatchWarning]
        found.append([said, world.error(whole, writing), world.step(parts, token_loss, counts=tokens_of)])
    return found


def case_refused(rank: int, ranks: int) -> Any:
    engine, found = world_of(1).engine, {}
    for name, value in [("pipeline_parallelism", True), ("sequence_parallel_size", 2), ("optimizer", None)]:
        before = getattr(engine, name)
        setattr(engine, name, value)
        try:
            DeepSpeed(engine)
        except ConfigError as error:
            found[name] = str(error)
        setattr(engine, name, before)
    for name, call in [
        ("size", lambda: DeepSpeed(engine, microbatch_size=0)),
        ("accumulator", lambda: Accumulator(engine, torch.optim.SGD(engine.module.parameters(), lr=1.0))),
    ]:
        try:
            call()
        except ConfigError as error:
            found[name] = str(error)
    return found


def all_cases(rank: int, ranks: int) -> Any:
    cases = [case_tokens, case_losses, case_late]
    several = [case_no_rows, case_fails, case_parameters, case_configured, case_narrow, case_set_up]
    cases += [case_as_in_every_window, case_spoilt, case_refused] if ranks == 1 else several
    return {case.__name__: case(rank, ranks) for case in cases}


# -- what is expected, by plain PyTorch -------------------------------------------------------------------------------


def expected(
    name: str, weights: Tensor, choose: tuple[int, ...] = (), *, counts: list[int] = MIXED
) -> tuple[Tensor, Tensor]:
    """Return gradient and loss of one backward of the whole batch in float64."""
    model, batch = make_model().double(), make_batch(counts)
    nn.utils.vector_to_parameters(weights, model.parameters())
    x, labels = batch["x"].double(), batch["labels"].flatten()
    y = torch.cat([model(row[None], choose=at) for row, at in zip(x, choose, strict=True)]) if choose else model(x)
    tokens, rows = F.cross_entropy(y.flatten(0, 1), labels), y.square().mean()
    loss = {"tokens": tokens, "rows": rows, "two": tokens + y.sum(-1).square().mean()}[name]
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([each.flatten() for each in found]), loss.detach()


def off(got: dict[str, Any], name: str, **how: Any) -> float:
    """Return the relative error of a step's gradient."""
    want = expected(name, got["weights"], **how)[0]
    return float((got["gradient"] - want).norm() / want.norm())


def assert_exact(got: dict[str, Any], name: str, **how: Any) -> None:
    want, loss = expected(name, got["weights"], **how)
    assert off(got, name, **how) < 2e-6
    assert float(got["loss"]) == pytest.approx(float(loss), rel=2e-6)
    assert got["applied"]
    assert got["clean"]
    assert got["boundary"] is None
    if not got["grad_norm"].isnan():
        assert float(got["grad_norm"]) == pytest.approx(float(want.norm()), rel=2e-6)


@pytest.fixture(scope="module")
def one(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(all_cases, 1, tmp_path_factory.mktemp("ranks"), timeout=120)


@pytest.fixture(scope="module")
def two(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(all_cases, 2, tmp_path_factory.mktemp("ranks"), timeout=120)


@pytest.fixture(params=["one", "two"])
def told(request: pytest.FixtureRequest) -> list[Any]:
    return request.getfixturevalue(request.param)


def test_counts_of_tokens_are_exact_whoever_owns_the_boundary(told: list[Any]) -> None:
    for each in told:
        for name, (first, got, events) in each["case_tokens"].items():
            assert_exact(first, "tokens")
            assert_exact(got, "tokens")
            assert (got["count"], got["samples"]) == (sum(MIXED), len(MIXED)), name
            assert events == 2 * (["MicrobatchDone"] * got["microbatches"] + ["StepDone"])
            unknown = name == "ZeRO-0, caller's"  # the engine reduces and steps in one go, and tells no norm
            assert bool(got["grad_norm"].isnan()) == unknown
    numbers = [each["case_tokens"]["ZeRO-2"][0]["microbatches"] for each in told]
    assert numbers == ([4] if len(told) == 1 else [4, 1])


def test_a_mean_of_means_would_be_seen() -> None:
    model, batch = make_model().double(), make_batch()
    for start_ in range(0, 8, 2):
        y, labels = model(batch["x"][start_ : start_ + 2].double()), batch["labels"][start_ : start_ + 2]
        (F.cross_entropy(y.flatten(0, 1), labels.flatten()) / 4).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert off({"gradient": found, "weights": weights}, "tokens") > 1e-2


def test_every_form_of_a_loss_is_exact(told: list[Any]) -> None:
    names = {"row mean": "rows", "two terms": "two", "none": "tokens", "nothing": "tokens"}
    for each in told:
        for stage in STAGES:
            for form, got in each["case_losses"][stage].items():
                assert_exact(got, names[form])
            got = each["case_losses"][stage]["two terms"]
            assert set(got["terms"]) == {"tokens", "router"}
            assert float(sum(got["terms"].values())) == pytest.approx(float(got["loss"]), rel=1e-6)
    assert told[0]["case_losses"][0]["row mean"]["microbatch_size"] == 3  # the engine's own


def test_a_rank_without_rows_takes_part(two: list[Any]) -> None:
    for each in two:
        for stage in STAGES:
            error, got, same = each["case_no_rows"][stage]
            assert_exact(got, "tokens")
            assert same == (got["microbatches"] == 0)  # passes that count for nothing leave no trace
            assert error.startswith("EmptyBatchError")
    assert [each["case_no_rows"][3][1]["microbatches"] for each in two] == [4, 0]


def test_what_the_engine_is_configured_to_do_is_exact_too(two: list[Any]) -> None:
    for each in two:
        found = each["case_configured"]
        for name in ("sum", "prescaled", "overlapping", "buckets", "offloaded"):
            assert_exact(found[name], "tokens")
        clipped, default = found["clipped"], found["clipped by default"]
        norm = float(expected("tokens", clipped["weights"])[0].norm())
        assert float(clipped["grad_norm"]) == pytest.approx(norm, rel=1e-6)
        clipped["gradient"] = clipped["gradient"] * norm / 0.1
        assert off(clipped, "tokens") < 1e-4
        # DeepSpeed's own default, which clips what is longer than 1.
        assert float(default["gradient"].norm()) == pytest.approx(min(norm, 1.0), rel=1e-5)


def test_bfloat16_is_off_by_its_own_rounding_alone(two: list[Any]) -> None:
    for each in two:
        for got in each["case_narrow"]:
            assert off(got, "tokens") < 0.02
            assert float(got["loss"]) == pytest.approx(float(expected("tokens", got["weights"])[1]), rel=1e-2)


def test_what_cannot_be_exact_is_refused_and_leaves_nothing(told: list[Any]) -> None:
    for each in told:
        for found in each["case_late"]:
            assert found["no counts"].startswith("MissingCountError: the loss 'loss' has a count of its own")
            assert "Pass counts=" in found["no counts"]
            assert found["wrong counts"].startswith("CountError")
            assert found["some rows"].startswith("MissingCountError: the loss 'loss' is a mean over samples")
            assert found["masked"].startswith("EmptyWindowError")
            assert found["not finite"].startswith("NonfiniteError")
            assert_exact(found["after"], "tokens")


def test_a_rank_that_fails_makes_its_passes_and_is_heard(two: list[Any]) -> None:
    for rank, each in enumerate(two):
        for stage in STAGES:
            found = each["case_fails"][stage]
            own = "RankError: 1 of 2 ranks failed" if rank else "ZeroDivisionError"
            assert found["counts"].startswith(own)
            assert found["loss function"].startswith(own)
            assert found["before the model"].startswith(own)
            assert_exact(found["after"], "tokens")


def test_parameters_that_one_rank_uses_are_exact_or_refused(two: list[Any]) -> None:
    for each in two:
        for stage in ("0", "1"):
            assert_exact(each["case_parameters"][stage], "rows", choose=(0,) * 7 + (1,))
        assert each["case_parameters"]["2"].startswith("RankError: the ranks' microbatches used different parameters")


def test_engines_that_are_set_up_differently_are_named_on_every_rank(two: list[Any]) -> None:
    for each in two:
        settings, frozen, after = each["case_set_up"]
        assert "the optimizer, group 0, lr is 0.5 on rank 0, and 0.25 on rank 1" in settings
        assert "gradient_clipping is 0.0 on rank 0, and 0.5 on rank 1" in settings
        assert "zero_optimization.reduce_bucket_size is 99 on rank 0, and 100 on rank 1" in settings
        assert "parameter 'module.last.bias' is (4,) torch.float32, trained on rank 0, and (4,)" in frozen
        assert after == "none"


def test_an_engine_that_holds_half_a_gradient_is_not_used_again(one: list[Any]) -> None:
    assert [each[:4] for each in one[0]["case_spoilt"][1]] == ["Zero", "Zero", "none"]
    before, inside, after = one[0]["case_spoilt"][2]
    assert before.startswith("ZeroDivisionError")
    assert inside.startswith("ZeroDivisionError")
    assert after.startswith("WindowError: an earlier window failed inside the engine")
    assert [each[:4] for each in one[0]["case_spoilt"][0]] == ["Zero", "Wind"]  # in the engine's step


def test_a_window_over_an_engine_is_a_window(one: list[Any]) -> None:
    for warned, written, batches in one[0]["case_as_in_every_window"]:
        assert len(warned) == 1
        assert "the loss is a plain mean, and the microbatches have between" in warned[0]
        assert written.startswith("WeightsMovedError: the weight 'module.first.weight'")
        assert (batches["count"], batches["samples"], batches["microbatches"]) == (sum(MIXED) - 2, len(MIXED), 5)
        assert_exact(batches, "tokens", counts=[4, *MIXED[1:]])


def test_engines_of_another_kind_are_refused(one: list[Any]) -> None:
    found = one[0]["case_refused"]
    assert "runs the loop over microbatches itself" in found["pipeline_parallelism"]
    assert "sequence parallelism" in found["sequence_parallel_size"]
    assert "pass optimizer=" in found["optimizer"]
    assert "microbatch_size" in found["size"]
    assert "mb.DeepSpeed(engine)" in found["accumulator"]
