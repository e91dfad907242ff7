"""What the combinations of `same_bits.py` are made of: models, losses, faults, and what is seen of a run."""

import copy
import importlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.faults import RunsOut
from tests.ranks.start_deepspeed import IS_THERE, make_engine
from tests.same_bits import options_for, set_clock
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage

import microbatch as mb

Batch = dict[str, Tensor]
RECORD = (
    *("index", "loss", "terms", "grad_norm", "count", "counts", "samples"),
    *("microbatches", "microbatch_size", "fused", "retries", "applied"),
)

# -- models, batches and losses ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block as models repeat them; draws from every generator if it is noisy, and counts in a buffer."""

    def __init__(self, width: int, *, noisy: bool) -> None:
        super().__init__()
        self.layer, self.drop, self.noisy = nn.Linear(width, width), nn.Dropout(0.3), noisy
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return as much as it is given."""
        if self.noisy:
            self.seen = self.seen + random.random() + float(np.random.rand())  # noqa: NPY002, S311 - the global ones
        return x + self.drop(torch.tanh(self.layer(x)))


class Net(nn.Module):
    """Two layers, and between them what a combination asks for."""

    def __init__(self, *, bn: bool = False, drop: float = 0.0, blocks: int = 0, noisy: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.n = nn.BatchNorm1d(16) if bn else nn.Identity()
        self.d = nn.Dropout(drop)
        self.b = nn.Linear(16, 4)
        self.s = nn.Parameter(torch.tensor([0.3]))
        self.blocks = nn.ModuleList(Block(16, noisy=noisy) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of shape ``(..., 4)``."""
        x = self.d(torch.tanh(self.n(self.a(x))))
        for block in self.blocks:
            x = block(x)
        return self.b(x)


def points(rows: int = 11) -> Batch:
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(rows, 8, generator=g), torch.randn(rows, 4, generator=g)
    return {"x": x, "y": y, "w": (torch.rand(rows, generator=g) > 0.3).float()}


def ragged(rows: int = 10, width: int = 6) -> Batch:
    g = torch.Generator().manual_seed(3)
    mask = torch.arange(width)[None] < torch.randint(1, width + 1, (rows,), generator=g)[:, None]
    x, y = torch.randn(rows, width, 8, generator=g), torch.randn(rows, width, 4, generator=g)
    return {"x": x, "mask": mask, "y": y}


def mean(m: Any, b: Batch) -> Tensor:
    return F.mse_loss(m(b["x"]), b["y"])


def summed(m: Any, b: Batch) -> mb.Loss:
    return mb.Loss(sum=((m(b["x"]) - b["y"]).square().sum(1) * b["w"]).sum(), count=b["w"].sum())


def masked(m: Any, b: Batch) -> mb.Loss:
    return mb.Loss(sum=((m(b["x"]) - b["y"]).square().sum(-1) * b["mask"]).sum(), count=b["mask"].sum())


def two_terms(m: Any, b: Batch) -> dict[str, mb.Loss]:
    y = m(b["x"])
    weighted = ((y - b["y"]).square().sum(1) * b["w"]).sum()
    return {"fit": mb.Loss(sum=weighted, count=b["w"].sum()), "size": mb.Loss(sum=y.square().sum(), count=len(y))}


def two_counts(b: Batch) -> dict[str, Any]:
    return {"fit": b["w"].sum(), "size": len(b["w"])}


def one_count(b: Batch) -> dict[str, Any]:
    return {"loss": b["w"].sum()}


def sometimes_none(m: Any, b: Batch) -> mb.Loss | None:
    return summed(m, b) if bool(b["w"][0]) else None


def sometimes_zero(m: Any, b: Batch) -> mb.Loss:
    """Count nothing in microbatches whose first row has no weight."""
    return summed(m, b | {"w": b["w"] * b["w"][0]})


def huge(m: Any, b: Batch) -> Tensor:
    """Have a finite loss whose gradient is infinite once it has been scaled."""
    return mean(m, b) * 1e36


def encoder(m: Any, b: Batch) -> Batch:
    return {"z": m(b["x"]), "y": b["y"]}


def ragged_encoder(m: Any, b: Batch) -> Batch:
    k = b["mask"][..., None]
    return {"z": (m(b["x"]) * k).sum(1) / k.sum(1), "y": (b["y"] * k).sum(1)}


def contrast(m: Any, z: Batch) -> Tensor:
    return F.cross_entropy(m.s.exp() * z["z"] @ z["y"].T, torch.arange(len(z["z"])))


def contrast_plain(m: Any, z: Batch) -> Tensor:
    return F.cross_entropy(z["z"] @ z["y"].T, torch.arange(len(z["z"])))


# -- a combination, and what runs it ----------------------------------------------------------------------------------


def sgd(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(parameters, lr=0.1, momentum=0.9)]


def adamw(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(parameters, lr=0.1)]


def one_of_each(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return adamw(parameters[::2]) + sgd(parameters[1::2])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One combination: what it trains, and how."""

    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    net: Mapping[str, Any] = field(default_factory=dict[str, Any])
    batch: Callable[[], Batch] = points
    loss: Callable[..., Any] = mean
    encode: Callable[..., Any] | None = None
    counts: Any = None
    dtype: torch.dtype = torch.float32
    optimizers: Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]] = sgd
    scaled: bool = False
    size: int | str = 3
    steps: int = 3
    drive: Callable[["Subject"], Any] | None = None  # what happens; `None` for some steps
    how: str = "bare"  # "bare", "ddp", "sharded" or "pipeline"
    split: int = 6  # rows of the batch that the first of two ranks has
    reshard: bool = True


class Skipped(Exception):  # noqa: N818 - nothing is wrong
    """A combination cannot run with this checkout; the text says why."""


class Subject:
    """The model, optimizer and accumulator of a combination, and what is seen of them."""

    def __init__(self, case: Case, rank: int, ranks: int) -> None:
        self.case, self.rank, self.ranks = case, rank, ranks
        seed_all(0)
        self.model = self._build()
        self.optimizers = case.optimizers(list(self.model.parameters()))
        self.gradients: list[dict[str, Tensor]] = []
        self.steps: list[Any] = []
        self.mode = RunsOut()  # ends memory, in the combinations that are about it
        self.optimizers[0].register_step_pre_hook(self._look)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if case.scaled else None
        self.accumulator = self.make()
        whole = {k: v.to(case.dtype) if v.is_floating_point() else v for k, v in case.batch().items()}
        own = (
            slice(None)
            if ranks == 1 or case.how == "pipeline"
            else (slice(0, case.split), slice(case.split, None))[rank]
        )
        self.batch: Batch = {name: tensor[own] for name, tensor in whole.items()}
        seed_all(7 + rank)

    def _build(self) -> nn.Module:
        case = self.case
        if case.how == "pipeline":
            parts = [nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))]
            part = parts[self.rank].to(case.dtype)
            return mb.Pipeline(PipelineStage(part, self.rank, 2, torch.device("cpu")), **case.net)
        model = Net(**case.net).to(case.dtype)
        if case.how == "sharded":
            for unit in (model.a, model.b, model):
                fully_shard(unit, reshard_after_forward=case.reshard)
        return nn.parallel.DistributedDataParallel(model) if case.how == "ddp" else model

    def make(self) -> mb.Accumulator:
        options = {"microbatch_size": self.case.size, "memory_budget": "none"} | dict(self.case.options)
        options |= {"grad_scaler": self.scaler} if self.scaler else {}
        return mb.Accumulator(self.model, self.optimizers, **options_for(mb.Accumulator, options))

    def again(self, **changed: Any) -> "Subject":
        """Return a fresh one of the same combination."""
        return Subject(replace(self.case, **changed), self.rank, self.ranks)

    def _look(self, *_: object) -> None:
        self.mode.armed = False
        self.gradients.append(self._gradients())

    def _gradients(self) -> dict[str, Tensor]:
        return {name: local(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}

    def step(self, *, loss: Any = None, encode: Any = None, batch: Any = None, fails: bool = False) -> None:
        """Take a step and record it; where it is expected to fail, record the type of the error."""
        case = self.case
        more = {"counts": case.counts, "encode": encode or case.encode}
        batch = self.batch if batch is None else batch
        self.note(lambda: self.accumulator.step(batch, loss or case.loss, **more), fails=fails)

    def note(self, act: Callable[[], Any], *, fails: bool = False) -> None:
        try:
            step = act()
        except Exception as error:
            if not fails:
                raise
            self.steps.append({"error": type(error).__name__, "left": self._gradients(), "random": random_states()})
        else:
            self.steps.append({name: plain(getattr(step, name)) for name in RECORD if hasattr(step, name)})

    def result(self) -> dict[str, Any]:
        """Return all that can be seen."""
        return {
            "gradients": self.gradients,
            "steps": self.steps,
            "left": self._gradients(),
            "weights": {name: local(each) for name, each in self.model.named_parameters()},
            "buffers": {name: local(each) for name, each in self.model.named_buffers()},
            "optimizer": [plain(each.state_dict()["state"]) for each in self.optimizers],
            "scaler": plain(self.scaler.state_dict()) if self.scaler else None,
            "random": random_states(),
            "windows skipped": self.accumulator.skipped,
        }


def local(tensor: Tensor) -> Tensor:
    """Return a copy of what this rank has of a tensor."""
    own: Any = tensor
    return (own.to_local() if hasattr(own, "to_local") else tensor).detach().clone()


def plain(value: Any) -> Any:
    """Return a copy that can be saved: tensors of this rank, numbers and words, nested."""
    if isinstance(value, Tensor):
        return local(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global one


def random_states() -> dict[str, Any]:
    numpy: Any = np.random.get_state()  # noqa: NPY002 - the global one
    return {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": [torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]],
    }


# -- what happens to a subject ----------------------------------------------------------------------------------------


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: "Fault") -> Tensor:
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ARG004 - autograd's signature
        raise ctx.fault.strike()


@dataclass
class Fault:
    """One call of a loss function or encoder fails, in its forward or in the backward of what it returns."""

    error: Exception
    where: str = "forward"
    at: int = 2
    rank: int = 1  # of two; where there is only one, it is that one
    calls: int = 0
    struck: bool = False

    def around(self, function: Callable[..., Any], subject: Subject) -> Callable[..., Any]:
        def faulty(model: Any, microbatch: Any) -> Any:
            self.calls += self.where == "forward" or torch.is_grad_enabled()  # what has no graph has no backward
            if self.calls != self.at or subject.rank != min(self.rank, subject.ranks - 1):
                return function(model, microbatch)
            if self.where == "backward":
                return function(lambda x: FailsInBackward.apply(model(x), self), microbatch)
            function(model, microbatch)
            raise self.strike()

        return faulty

    def strike(self) -> Exception:
        self.struck = True
        return copy.copy(self.error)

    def check(self, subject: Subject) -> None:
        """Make sure that the combination is about what it says."""
        assert self.struck or subject.rank < subject.ranks - 1, "the fault never happened"


def fails_once(subject: Subject, *, error: Exception, where: str = "forward", at: int = 2) -> None:
    """Raise an error in one microbatch of one rank; then take a step without errors."""
    fault, case = Fault(error, where, at), subject.case
    if case.encode is not None:
        subject.step(encode=fault.around(case.encode, subject), fails=True)
    else:
        subject.step(loss=fault.around(case.loss, subject), fails=True)
    subject.step()
    fault.check(subject)


def memory_ends(subject: Subject, *, places: int = 5) -> list[Any]:
    """Run out of memory at several operators, from the first one to the last one before the optimizer's."""
    struck = subject.rank == subject.ranks - 1  # the last rank
    calm = RunsOut()
    run_out(subject.again(), calm)
    at = [1 + round(index * (calm.asked - 1) / (places - 1)) for index in range(places)]
    return [run_out(subject.again(), RunsOut(place) if struck else RunsOut()) for place in at]


def run_out(subject: Subject, mode: RunsOut) -> dict[str, Any]:
    def arming(function: Callable[..., Any]) -> Callable[..., Any]:
        def armed(model: Any, microbatch: Any) -> Any:
            mode.armed = True
            return function(model, microbatch)

        return armed

    case, subject.mode = subject.case, mode
    with mode:
        subject.step(loss=arming(case.loss), encode=case.encode and arming(case.encode), fails=True)
    mode.armed = False
    subject.step()
    assert len(mode.refused) == len(mode.at), "the fault never happened"
    return subject.result()


def optimizer_runs_out(subject: Subject, *, times: int = 1) -> None:
    """Run out of memory in the optimizer's first step on the last rank, and again when the step is repeated."""
    struck = subject.rank == subject.ranks - 1
    mode = RunsOut(*range(1, times + 1))

    def arm(*_: object) -> None:
        mode.armed = struck

    hook = subject.optimizers[0].register_step_pre_hook(arm)
    with mode:
        subject.step(fails=True)
    mode.armed = False
    hook.remove()
    subject.step()
    assert mode.refused or not struck, "the fault never happened"


def not_a_number(subject: Subject) -> None:
    """Have a NaN in the third row that the last rank has; then take a step that goes well."""
    bad = {name: tensor.clone() for name, tensor in subject.batch.items()}
    if subject.rank == subject.ranks - 1 or subject.case.how == "pipeline":
        bad["x"][2] = torch.nan
    subject.step()
    subject.step(batch=bad, fails=True)
    subject.step()


def overflow(subject: Subject) -> None:
    subject.step()
    subject.step(loss=huge, fails=True)
    subject.step()


def resume(subject: Subject) -> None:
    """Go on with a new accumulator that is given the state of the one before it."""
    for _ in range(2):
        subject.step()
        state = copy.deepcopy(subject.accumulator.state_dict())
        subject.accumulator = subject.make()
        subject.accumulator.load_state_dict(state)
    subject.step()


def tune(subject: Subject, *, steps: int = 14, fastest: tuple[int, ...] = (4, 16), **at: int) -> None:
    """Choose a size by a clock that the loss function moves; each rank has another fastest size."""
    now, factor, case = 0.0, 1.0, subject.case
    resumed, slower = at.get("resumed", -1), at.get("slower_at", -1)

    def timed(m: Any, b: Batch) -> Any:
        nonlocal now
        if type(b["x"]) is Tensor:  # dry runs on fake tensors take no time
            rows = len(b["x"])
            now += factor * rows * (1 + abs(float(np.log2(rows / fastest[subject.rank]))))
        return case.loss(m, b)

    for index in range(steps):
        factor = 2.0 if index == slower else factor
        if index == resumed:
            state = subject.accumulator.state_dict()
            subject.accumulator = subject.make()
            subject.accumulator.load_state_dict(state)
        if index in {0, resumed} and not set_clock(subject.accumulator, lambda: now):
            raise Skipped("no known place of the accumulator's clock: add it to CLOCKS in same_bits.py")
        subject.step(loss=timed)


def loop(subject: Subject, *, loss: Callable[..., Any] | None = None) -> mb.Step:
    """Take a step by a hand-written loop."""
    case = subject.case
    with subject.accumulator.window(counts=case.counts) as window:
        for microbatch in window.split(subject.batch):
            window.backward((loss or case.loss)(subject.model, microbatch))
    return window.step


def loops(subject: Subject) -> None:
    for _ in range(3):
        subject.note(lambda: loop(subject))


def loop_fails(subject: Subject, *, error: Exception, where: str = "forward") -> None:
    """Run the loop of a window that failed once more, as its user does; then another one."""
    fault = Fault(error, where)
    subject.note(lambda: loop(subject, loss=fault.around(subject.case.loss, subject)), fails=True)
    loops(subject)
    fault.check(subject)


def own_pieces(subject: Subject, *, size: int = 3) -> Iterator[Batch]:
    for start in range(0, len(subject.batch["x"]), size):
        yield {name: tensor[start : start + size] for name, tensor in subject.batch.items()}


def loop_over_loader(subject: Subject) -> None:
    """Make windows of four microbatches of two rows; the last window of each of two epochs is shorter."""
    case = subject.case
    for _ in range(2):
        loader = list(own_pieces(subject, size=2))
        for window in subject.accumulator.windows(loader, microbatches=4, counts=case.counts):
            for microbatch in window:
                window.backward(case.loss(subject.model, microbatch))
            subject.note(partial(getattr, window, "step"))


def loop_over_own_pieces(subject: Subject) -> None:
    """Say how many rows a microbatch has that the window did not hand out."""

    def one() -> mb.Step:
        with subject.accumulator.window() as window:
            for piece in own_pieces(subject):
                window.backward(mean(subject.model, piece), count=len(piece["x"]))
        return window.step

    for _ in range(2):
        subject.note(one)


def loop_encodes(subject: Subject, *, keep: bool) -> None:
    def one() -> mb.Step:
        with subject.accumulator.window() as window:
            z = window.encode(subject.batch, encoder, keep=keep)
            window.backward(subject.case.loss(subject.model, z))
        return window.step

    for _ in range(2):
        subject.note(one)


# -- what an accumulator refuses --------------------------------------------------------------------------------------


def engine_steps(subject: Subject, *, stage: int) -> dict[str, Any]:
    """Take steps of a DeepSpeed engine, one of which fails on the first rank."""
    if not IS_THERE:
        raise Skipped("DeepSpeed is not installed")
    model = Net(**subject.case.net)
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=0.1), stage=stage)
    accumulator = mb.DeepSpeed(engine, microbatch_size=2)

    def wrong(batch: Batch) -> dict[str, Any]:
        return {"loss": len(batch["w"]) // subject.rank}

    for counts in (subject.case.counts, wrong, subject.case.counts):
        act = partial(accumulator.step, subject.batch, subject.case.loss, counts=counts)
        subject.note(act, fails=counts is wrong)
    whole = importlib.import_module("deepspeed.utils").safe_get_full_fp32_param
    weights = [plain(whole(each) if stage else each) for each in engine.module.parameters()]
    return {"steps": subject.steps, "weights": weights, "random": random_states()}


def refused(subject: Subject) -> None:
    for _ in range(2):
        subject.step(fails=True)


def wrong_uses(subject: Subject) -> None:
    """Do what is wrong in several ways, each time followed by a step."""
    model, batch = subject.model, subject.batch

    def touched(m: Any, b: Batch) -> Tensor:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(2)
        return mean(m, b)

    def opened_twice(m: Any, b: Batch) -> Tensor:
        with subject.accumulator.window():
            return mean(m, b)

    def wrong_shape(m: Any, b: Batch) -> Tensor:
        return (m(b["x"]) - b["y"]).square()

    def nothing_counted(m: Any, b: Batch) -> mb.Loss:
        return mb.Loss(sum=m(b["x"]).sum(), count=torch.tensor(0))

    def no_graph(m: Any, b: Batch) -> Tensor:
        return mean(m, b).detach()

    def other_terms(m: Any, b: Batch) -> dict[str, Tensor]:
        return {f"term of {len(b['x'])} rows": mean(m, b)}

    for loss in (touched, opened_twice, wrong_shape, nothing_counted, no_graph, other_terms):
        subject.step(loss=loss, fails=True)
        subject.step()
    empty = {name: tensor[:0] for name, tensor in batch.items()}
    uneven = {"x": batch["x"], "y": batch["y"][1:]}
    for wrong in (empty, uneven):
        subject.step(batch=wrong, fails=True)
        subject.step()
    counts = {"fit": 3, "size": 5}
    subject.note(lambda: subject.accumulator.step(batch, two_terms, counts=counts), fails=True)
    subject.step()
