"""Laws M1 to M4 and M6: a window that runs out of memory is run again, smaller, and nothing of it can be told."""

import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.faults import FULL, RunsOut
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from microbatch.errors import BatchStatisticsError, OutOfMemoryError
from microbatch.gradients import fused_matmul
from microbatch.gradients.gradient_sum import GradientSum
from microbatch.memory import out_of_memory
from microbatch.memory.out_of_memory import is_out_of_memory, let_go
from microbatch.step import attempts, finish, optimizer_step
from microbatch.step.saved_state import Snapshot
from microbatch.step.size.sizing import PATIENCE

from .reference import (
    EXACT,
    WRONG,
    Batch,
    Gradients,
    full_batch,
    gradients_of,
    moved,
    numbers,
    pieces_of,
    relative_error,
)

ROWS, LARGE, SMALL = 8, 4, 2

# -- running out on purpose -------------------------------------------------------------------------------------------

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
SPELLINGS: list[BaseException] = [
    FULL,
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB"),
    OutOfMemoryError("the memory budget of 1.00 GiB was passed"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.93 GiB total capacity)"),
    RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("cudaErrorMemoryAllocation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuSOLVER error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("MPS backend out of memory (MPS allocated: 7.64 GiB, other allocations: 68.91 GiB)"),
    RuntimeError("XPU out of memory. Tried to allocate 1.00 GiB"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError(
        CPU + "can't allocate memory: you tried to allocate 4000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(CPU + "not enough memory: you tried to allocate 4000 bytes."),
    RuntimeError("unable to mmap 4000 bytes from file </torch_1>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]
OTHERS: list[BaseException] = [
    RuntimeError("unsupported memory format option ChannelsLast"),
    RuntimeError("out of memory cells to write to: the model's memory has 4 slots"),
    RuntimeError("I remember that CUDA out of memory is a common message"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed non-contiguous input"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                 "are out of shared memory"),
    ValueError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    KeyError("std::bad_alloc"),
    KeyboardInterrupt(),
]  # fmt: skip


# -- what may run out -------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draw from every generator, and count in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.last = nn.Linear(6, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of shape ``(rows, 2)``."""
        self.seen = self.seen + random.random() + np.random.rand()  # noqa: NPY002, S311 - the global ones
        return self.last(self.drop(self.norm(self.first(x)).tanh()))


class Tied(nn.Module):
    """One weight for the tokens that go in and those that come out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.body = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape ``(rows, width, 7)``."""
        return F.linear(self.body(self.tokens(tokens)).tanh(), self.tokens.weight)


class Checkpointed(nn.Module):
    """Compute the inner activations again in backward, with the same dropout."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of shape ``(rows, 2)``."""
        hidden = checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)
        assert isinstance(hidden, Tensor)
        return self.last(hidden)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))


def fit(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]).float() - batch["y"].float()).square().mean()


def fit_exactly(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def tokens_mean(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())


def tokens_sum(model: nn.Module, batch: Batch) -> mb.Loss:
    labels = batch["labels"].flatten()
    total = F.cross_entropy(model(batch["tokens"]).flatten(0, 1), labels, reduction="sum")
    return mb.Loss(sum=total, count=(labels >= 0).sum())


def two_terms(model: nn.Module, batch: Batch) -> dict[str, mb.Loss]:
    size = model(batch["tokens"]).square().sum()
    return {"tokens": tokens_sum(model, batch), "size": mb.Loss(sum=size, count=len(batch["tokens"]))}


def two_counts(batch: Batch) -> dict[str, Any]:
    return {"tokens": (batch["labels"] >= 0).sum(), "size": len(batch["labels"])}


def two_means(model: nn.Module, batch: Batch) -> Tensor:
    return tokens_mean(model, batch) + model(batch["tokens"]).square().sum() / len(batch["tokens"])


def points() -> Batch:
    return {"x": numbers(1, ROWS, 3), "y": numbers(2, ROWS, 2)}


def ragged() -> Batch:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(6) < torch.tensor([6, 2, 5, 1, 3, 6, 4, 2]).unsqueeze(1)
    tokens = torch.randint(0, 7, (ROWS, 6), generator=generator)
    return {"tokens": tokens * mask, "labels": tokens.roll(1, 1).masked_fill(~mask, -100), "mask": mask}


@dataclass(frozen=True)
class Case:
    """A model, its batch and its loss; and, where the cut cannot matter, the loss by plain PyTorch."""

    build: Callable[[], nn.Module] = plain
    loss_fn: Callable[[nn.Module, Any], Any] = fit_exactly
    batch: Callable[[], Batch] = points
    reference: Callable[[nn.Module, Batch], Tensor] | None = None
    dtype: torch.dtype = torch.float64
    counts: Any = None
    scaled: bool = False
    optimizers: int = 1
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


CASES: dict[str, Case] = {
    "plain": Case(reference=fit_exactly),
    "watched by default": Case(reference=fit_exactly, settings={"memory_budget": None}),
    "noisy": Case(Noisy),
    "tied, fused": Case(Tied, tokens_sum, ragged, tokens_mean),
    "tied, not fused": Case(Tied, tokens_sum, ragged, tokens_mean, settings={"sums": mb.Sums(fuse=False)}),
    "two terms": Case(Tied, two_terms, ragged, two_means, counts=two_counts),
    "lengths": Case(Tied, tokens_sum, ragged, tokens_mean, settings={"lengths": "mask"}),
    "tokens": Case(
        Tied, tokens_sum, ragged, tokens_mean, settings={"lengths": mb.Lengths(of="mask", microbatch_tokens=24)}
    ),
    "clip": Case(reference=None, settings={"max_grad_norm": 1e-3}),
    "autocast": Case(Noisy, fit, dtype=torch.float32, settings={"autocast": torch.bfloat16}),
    "narrow": Case(plain, fit, dtype=torch.bfloat16),
    "scaler": Case(plain, fit, dtype=torch.float32, scaled=True, settings={"autocast": torch.bfloat16}),
    "checkpointed": Case(lambda: Checkpointed(reentrant=False)),
    "checkpointed, reentrant": Case(lambda: Checkpointed(reentrant=True)),
    "checkpointed, not fused": Case(lambda: Checkpointed(reentrant=False), settings={"sums": mb.Sums(fuse=False)}),
    "checkpointed, autocast": Case(
        lambda: Checkpointed(reentrant=False), fit, dtype=torch.float32, settings={"autocast": torch.bfloat16}
    ),
    "noisy, not fused": Case(Noisy, settings={"sums": mb.Sums(fuse=False)}),
    "lengths, not fused": Case(
        Tied, tokens_sum, ragged, tokens_mean, settings={"lengths": "mask", "sums": mb.Sums(fuse=False)}
    ),
    "two optimizers": Case(Noisy, optimizers=2),
    "two optimizers, scaler": Case(
        Noisy, fit, dtype=torch.float32, scaled=True, optimizers=2, settings={"autocast": torch.float16}
    ),
}
each_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Leave what is there already out of every garbage collection: each recovery does one."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fuse_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_matmul, "SMALLEST", 1)


@dataclass(frozen=True)
class Outcome:
    """All that a step can have changed, and its record."""

    step: mb.Step
    given: Gradients
    tensors: list[Tensor]
    others: list[Any]
    asked: int
    begun: int
    """How many operators had asked for memory when the optimizer's step began."""

    def differences(self, other: "Outcome") -> set[str]:
        """Name what is not equal, to the bit."""
        same = {
            "gradient": relative_error(self.given, other.given) == 0.0,
            "weights, buffers, optimizer state, torch's random state": len(self.tensors) == len(other.tensors)
            and all(map(torch.equal, self.tensors, other.tensors)),
            "other random states, scaler": self.others == other.others,
            "loss": torch.equal(self.step.loss, other.step.loss),
            "samples": (self.step.samples, self.step.count) == (other.step.samples, other.step.count),
            "microbatches": self.step.microbatches == other.step.microbatches,
        }
        return {name for name, equal in same.items() if not equal}


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()  # noqa: NPY002 - the global one
    return state[1].tolist()


def model_of(case: Case) -> nn.Module:
    torch.manual_seed(5)
    return case.build().to(case.dtype)


def run(case: Case, size: int, *at: int, error: BaseException | None = None, listeners: Any = ()) -> Outcome:
    """Take a step of a fresh model, memory ending at some of the operators that ask for any."""
    model, batch = model_of(case), moved(case.batch(), model_of(case), case.dtype)
    first, *others = (list(model.parameters())[start :: case.optimizers] for start in range(case.optimizers))
    optimizers = [torch.optim.AdamW(first, lr=0.1), *(torch.optim.SGD(each, lr=0.1, momentum=0.9) for each in others)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if case.scaled else None
    settings: dict[str, Any] = (
        {"memory_budget": "none"} | case.settings | {"grad_scaler": scaler, "listeners": listeners}
    )
    lengths = settings.get("lengths")
    if size != LARGE and isinstance(lengths, mb.Lengths):
        settings["lengths"] = mb.Lengths(of="mask", microbatch_tokens=24 * size // LARGE)
    settings = {"batch_norm": "microbatch", "buffers": "each"} | settings
    accumulator = mb.Accumulator(model, optimizers, microbatch_size=size, **settings)
    mode, given, begun = RunsOut(*at, error=error or FULL), list[Gradients](), list[int]()

    def loss_fn(model: nn.Module, microbatch: Any) -> Any:
        mode.armed = True
        return case.loss_fn(model, microbatch)

    def look(*_: object) -> None:
        mode.armed = False
        given.append(gradients_of(model))

    def apply(*given: Any, **named: Any) -> None:
        begun.append(mode.asked)
        optimizer_step.apply(*given, **named)

    optimizers[0].register_step_pre_hook(look)
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)  # noqa: NPY002 - the global one
    with mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "apply", apply)
        step = accumulator.step(batch, loss_fn, counts=case.counts)
    assert len(mode.refused) == len(at)
    state = [value for each in optimizers for held in each.state.values() for value in held.values()]
    others = [random.getstate(), numpy_state()]
    others += [] if scaler is None else [scaler.state_dict()]
    tensors = [each.detach().clone() for each in (*model.parameters(), *model.buffers(), *state, torch.get_rng_state())]
    return Outcome(step, given[0], tensors, others, mode.asked, begun[0])


# -- M1, M6: the same result as if it had begun at the small size -----------------------------------------------------

FAULTS = 216  # over all cases


@each_case
def test_m1_m6_wherever_memory_ends_the_step_is_that_of_the_small_size(name: str) -> None:
    case = CASES[name]
    undisturbed, small = run(case, LARGE), run(case, SMALL)
    assert undisturbed.step.retries == 0
    # The optimizer's step, a scaler's too, is tried once more as it is: see below.
    places = random.Random(name).sample(range(1, undisturbed.begun + 1), -(-FAULTS // len(CASES)))  # noqa: S311
    for number, place in enumerate(places):
        recovered = run(case, LARGE, place, error=SPELLINGS[number % len(SPELLINGS)])
        assert recovered.differences(small) == set(), place
        assert recovered.step.retries == 1
        assert recovered.step.samples == ROWS
        if case.reference is not None:
            model = model_of(case)
            batch = moved(case.batch(), model, case.dtype)
            assert relative_error(recovered.given, full_batch(model, case.reference, batch)) <= EXACT
    # The comparison tells the two sizes apart.
    assert undisturbed.differences(small)


# Batch norm takes no microbatch of one row.
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.build is not Noisy])
@pytest.mark.parametrize("seed", range(3))
def test_m1_memory_ends_twice(name: str, seed: int) -> None:
    case = CASES[name]
    one = run(case, 1)
    draw = random.Random(seed)  # noqa: S311
    first = draw.randint(1, run(case, LARGE).begun)
    second = first + draw.randint(1, run(case, SMALL).begun)
    twice = run(case, LARGE, first, second)
    assert twice.step.retries == 2
    assert twice.differences(one) == set()


def test_the_faults_strike_forward_backward_and_the_windows_end() -> None:
    case = CASES["plain"]
    struck = [events_of(case, place)[0] for place in range(1, run(case, LARGE).begun + 1)]
    assert {event.index for event in struck} == {0, 1, 2}  # two microbatches, and the end after them


def events_of(case: Case, place: int) -> list[mb.Retry]:
    events: list[Any] = []
    run(case, LARGE, place, listeners=[events.append])
    return [event for event in events if isinstance(event, mb.Retry)]


def test_listeners_are_told_of_each_attempt() -> None:
    events: list[Any] = []
    case = CASES["plain"]
    outcome = run(case, LARGE, run(case, LARGE).asked // 2 + 2, listeners=[events.append])
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["MicrobatchDone", "Retry", *["MicrobatchDone"] * 4, "StepDone"]
    retry = events[1]
    assert (retry.step, retry.index, retry.before, retry.after) == (0, 1, LARGE, SMALL)
    assert "Tried to allocate 20.00 MiB" in retry.error
    assert events[-1].step is outcome.step
    assert outcome.step.microbatch_size == SMALL


@pytest.mark.parametrize("name", ["plain", "two optimizers", "scaler"])
def test_m1_the_optimizers_step_is_tried_once_more_as_it_is(name: str) -> None:
    # The activations are freed, so that a smaller size would not help: neither for the memory of new state, which is
    # tried before the step writes, nor for what a scaler's step asks for.
    case = CASES[name]
    large = run(case, LARGE)
    assert large.asked >= large.begun + 4
    for place in range(large.begun + 1, large.asked + 1):
        outcome = run(case, LARGE, place)
        assert outcome.step.retries == 0
        assert outcome.differences(large) == set()


def test_m1_what_a_scaler_has_unscaled_is_forgotten() -> None:
    case = CASES["scaler"]
    large, small = run(case, LARGE), run(case, SMALL)
    for place in range(large.begun - 8, large.begun + 1):
        outcome = run(case, LARGE, place)
        assert outcome.step.retries == 1
        assert outcome.differences(small) == set()


def by_hand(model: nn.Module, batch: Batch, mode: RunsOut) -> Gradients:
    """Recover as everyone does: catch, halve, go on adding."""
    size, mode.armed = LARGE, True
    while True:
        try:
            with mode:
                for piece in pieces_of(batch, size):
                    (fit_exactly(model, piece) * len(piece["x"]) / ROWS).backward()
        except RuntimeError:
            size, mode.armed = size // 2, True
            continue
        return gradients_of(model)


def test_m1_by_hand_contributions_are_counted_twice() -> None:
    model = model_of(CASES["plain"])
    reference = full_batch(model, fit_exactly, points())
    calm = RunsOut()
    assert relative_error(by_hand(copy.deepcopy(model), points(), calm), reference) <= EXACT
    off = [
        relative_error(by_hand(copy.deepcopy(model), points(), RunsOut(at)), reference)
        for at in range(1, calm.asked + 1)
    ]
    # In the first forward there is nothing yet that could be counted twice; in all the second microbatch there is.
    assert min(off[len(off) // 2 + 1 :]) > 0.1
    assert max(off[:3]) <= EXACT


def test_m1_by_hand_dropout_and_counts_of_batches_go_on() -> None:
    case = CASES["noisy"]
    model, small = model_of(case), run(case, SMALL)
    torch.manual_seed(11)
    by_hand(model, points(), RunsOut(20))
    assert int(model.get_buffer("norm.num_batches_tracked")) > ROWS // SMALL
    assert not torch.equal(torch.get_rng_state(), small.tensors[-1])


# -- M2 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", SPELLINGS, ids=lambda error: str(error)[:40])
def test_m2_every_spelling_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:40])
def test_m2_everything_else_reaches_the_caller_at_once(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    model, calls = plain().double(), list[int]()

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        raise error

    accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters()), microbatch_size=LARGE)
    with pytest.raises(type(error)) as caught:
        accumulator.step(points(), loss_fn)
    assert caught.value is error
    assert len(calls) == 1


def test_m2_what_this_torch_says_of_the_host() -> None:
    with pytest.raises(RuntimeError, match="allocate") as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


# -- M3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward", "cause"])
def test_m3_what_the_failure_held_is_free_before_the_retry(where: str) -> None:
    held: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
            mine = grads[0] + 1
            held.append(weakref.ref(mine.untyped_storage()))
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(mine)} GiB")

    def fail(x: Tensor) -> None:
        deep = x * 2
        held.append(weakref.ref(deep.untyped_storage()))
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(deep)} GiB")

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if held:  # a retry: what is alive now has to fit beside it
            alive.append(sum(each() is not None for each in held))
            return fit_exactly(model, batch)
        hidden = model(batch["x"])
        held.append(weakref.ref(hidden.untyped_storage()))
        if where == "forward":
            fail(hidden)
        if where == "cause":
            try:
                fail(hidden)
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried again") from error
        # Two branches: the gradient of one of them waits in the engine's queue when the other fails.
        aside = (model(batch["x"]) * 3).sum()
        return Fails.apply(hidden).sum() + aside

    model = plain().double()
    accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters()), microbatch_size=LARGE)
    gc.disable()  # not by chance
    try:
        step = accumulator.step(points(), loss_fn)
    finally:
        gc.enable()
    assert step.retries == 1
    assert len(held) >= 2
    assert alive[0] == 0


def test_m3_by_hand_the_traceback_holds_the_failing_frame() -> None:
    held: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def attempt(model: nn.Module) -> None:
        hidden = model(points()["x"])
        held.append(weakref.ref(hidden.untyped_storage()))
        raise torch.OutOfMemoryError

    try:
        attempt(plain().double())
    except torch.OutOfMemoryError:
        gc.collect()
        alive.append(held[0]() is not None)  # where the usual recipe tries again
    assert alive == [True]


def engine_keeps() -> int:
    """Fail in every operator of a backward in turn, and count the tensors that outlive the failure."""
    kept = 0
    for at in range(1, 16):
        failure: BaseException = RuntimeError()
        model, storages = plain().double(), list[weakref.ref[Any]]()
        first, _, last = model.children()
        losses = [layer(numbers(1, 3, width)).square().sum() for layer, width in ((first, 3), (last, 6))]
        mode = RunsOut(at)
        mode.armed = True

        class Sees(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor):
                    storages.append(weakref.ref(out.untyped_storage()))  # noqa: B023 - used in this round
                return out

        try:
            with mode, Sees():
                sum(losses, torch.zeros(())).backward()
        except torch.OutOfMemoryError as error:
            failure = error
            out_of_memory._forget_frames(error, set())
        del losses, model, first, last
        gc.collect()
        kept += sum(each() is not None for each in storages)
        let_go(failure, torch.device("cpu"))
        assert sum(each() is not None for each in storages) == 0
    return kept


def test_m3_the_engine_keeps_gradients_until_it_runs_again() -> None:
    assert engine_keeps() > 0


# -- M4 ---------------------------------------------------------------------------------------------------------------


def test_m4_at_microbatch_1_there_is_one_error_and_nothing_has_changed() -> None:
    model = Noisy().double()
    model.norm.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=LARGE, memory_budget="64 KiB")
    model.last.weight.grad = mine = torch.ones_like(model.last.weight)
    torch.manual_seed(11)
    before = [each.detach().clone() for each in (*model.parameters(), *model.buffers())]
    state = (torch.get_rng_state(), random.getstate(), numpy_state())
    sizes: list[int] = []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        sizes.append(len(batch["x"]))
        return model(batch["x"]).sum() * torch.ones(100_000).mean()

    with pytest.raises(OutOfMemoryError) as caught:
        accumulator.step(points(), loss_fn)
    assert sizes == [4, 2, 1]
    error = caught.value
    assert error.asked == 400_000
    assert error.budget == 65536
    assert error.in_use is not None
    assert 0 < error.in_use < 65536
    assert error.operator == "aten.ones.default"
    words = ["1 row", "391 KiB", "64.0 KiB", "aten.ones", "'first.weight'", "checkpoint", "linear_cross_entropy"]
    assert [word for word in [*words, "shorter", "offloaded", "memory_budget"] if word not in str(error)] == []
    assert all(map(torch.equal, before, (*model.parameters(), *model.buffers())))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), numpy_state())
    assert model.last.weight.grad is mine
    assert mine.eq(1).all()
    assert not optimizer.state
    assert accumulator.state_dict()["windows"] == 0


def test_m4_the_layer_is_named() -> None:
    class Greedy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.ones(100_000).mean()

    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Tanh(), Greedy())).double()
    accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters()), microbatch_size=1, memory_budget="64 KiB")
    with pytest.raises(OutOfMemoryError, match=r"in module '1\.1' \(Greedy\)") as caught:
        accumulator.step(points(), fit_exactly)
    assert caught.value.module == "1.1"
    assert isinstance(caught.value.__cause__, OutOfMemoryError)


def test_m4_bytes_are_read_from_the_allocators_own_words() -> None:
    model = plain().double()
    accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters()), microbatch_size=1)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")

    with pytest.raises(OutOfMemoryError, match="Tried to allocate") as caught:
        accumulator.step(points(), loss_fn)
    assert caught.value.asked == 20 * 1024**2


# -- a real budget ----------------------------------------------------------------------------------------------------


def rows(number: int) -> Tensor:
    return torch.randn(number, 40, 64)


def wide_fit(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def budgeted(microbatch_size: int, budget: int | str | None, **settings: Any) -> mb.Accumulator:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.3), nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return mb.Accumulator(model, optimizer, microbatch_size=microbatch_size, memory_budget=budget, **settings)


def peak_at(size: int) -> int:
    peak = budgeted(size, "1 GiB").step(rows(32), wide_fit).peak_bytes
    assert peak is not None
    return peak


@pytest.mark.parametrize("fits", [1, 2, 8, 16])
def test_a_budget_that_only_small_microbatches_meet_is_kept(fits: int) -> None:
    budget, batch = peak_at(fits), rows(32)
    accumulator = budgeted(32, budget)
    torch.manual_seed(7)
    steps = [accumulator.step(batch, wide_fit) for _ in range(3)]
    assert steps[0].microbatch_size == fits
    assert 2 ** steps[0].retries == 32 // fits
    assert [step.retries for step in steps[1:]] == [0, 0]  # remembered
    peaks = [step.peak_bytes for step in steps if step.peak_bytes is not None]
    assert len(peaks) >= 2
    assert max(peaks) <= budget
    other = budgeted(fits, "none")
    torch.manual_seed(7)
    assert [other.step(batch, wide_fit).loss.item() for _ in range(3)] == [step.loss.item() for step in steps]


def test_a_batch_smaller_than_a_microbatch_is_halved_itself() -> None:
    accumulator = budgeted(1000, peak_at(4))
    step = accumulator.step(rows(9), wide_fit)
    assert step.retries == 1
    assert step.microbatch_size == 3  # of 9 rows at most 4 each: 1000 is halved to 3


def test_the_size_grows_back_after_calm_and_tries_less_often_when_it_fails() -> None:
    events: list[Any] = []
    accumulator = budgeted(8, peak_at(4), listeners=[events.append])
    batch = rows(8)
    retries = [accumulator.step(batch, wide_fit).retries for _ in range(1 + PATIENCE + 2 * PATIENCE + 4 * PATIENCE + 1)]
    grown = [event for event in events if isinstance(event, mb.SizeChanged)]
    assert [event.step for event in grown] == [PATIENCE - 1, 3 * PATIENCE - 1, 7 * PATIENCE - 1]
    assert {(event.before, event.after) for event in grown} == {(4, 8)}
    failed = [index for index, number in enumerate(retries) if number]
    assert failed == [0, PATIENCE, 3 * PATIENCE, 7 * PATIENCE]


def test_the_size_that_worked_is_saved_with_the_rest() -> None:
    budget, batch = peak_at(4), rows(16)
    first, second, other = budgeted(16, budget), budgeted(16, budget), budgeted(8, budget)
    assert first.step(batch, wide_fit).retries == 2
    second.load_state_dict(first.state_dict())
    assert second.step(batch, wide_fit).retries == 0
    assert second.state_dict()["size"]["sizing"] == {**first.state_dict()["size"]["sizing"], "calm": 2}
    other.load_state_dict(first.state_dict())  # another size was asked for since
    assert other.step(batch, wide_fit).retries == 1


def by_window(accumulator: mb.Accumulator, batch: Tensor) -> mb.Step:
    with accumulator.window() as window:
        for microbatch in window.split(batch):
            window.backward(wide_fit(accumulator.options.model, microbatch))
    return window.step


def test_a_hand_written_window_is_told_and_the_next_one_is_smaller() -> None:
    events: list[Any] = []
    accumulator = budgeted(16, peak_at(8), listeners=[events.append])
    model, batch = accumulator.options.model, rows(16)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(OutOfMemoryError) as caught:
        by_window(accumulator, batch)
    assert "microbatches of 8 rows instead of 16" in caught.value.__notes__[0]
    assert all(map(torch.equal, before, model.parameters()))
    assert [(event.before, event.after) for event in events if isinstance(event, mb.SizeChanged)] == [(16, 8)]
    step = by_window(accumulator, batch)
    assert (step.microbatches, step.retries) == (2, 0)


def test_an_error_of_another_kind_in_a_retry_says_that_it_was_one() -> None:
    case = CASES["noisy"]
    with pytest.raises(BatchStatisticsError, match="microbatch of 1 row") as caught:
        run(case, LARGE, 3, 6)
    assert "in microbatches of 1 rows" in caught.value.__notes__[-1]


# -- faults of our own ------------------------------------------------------------------------------------------------


def keep_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "restore", lambda self: self.restore_buffers())


def keep_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "restore", lambda self: self._random.restore())


def count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def put_back(self: Any) -> None:
        self._end()

    def open_(self: Any, named: Any, was: Any = GradientSum.open) -> None:
        held = [each.parameter.grad for each in named]
        was(self, named)
        for each, grad in zip(named, held, strict=True):
            each.parameter.grad = grad
        self.mark()

    monkeypatch.setattr(GradientSum, "put_back", put_back)
    monkeypatch.setattr(GradientSum, "open", open_)


def halve_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    def shrink(self: Any, asked: int, *, used: int) -> None:
        self.halvings += 2

    monkeypatch.setattr("microbatch.step.size.sizing.Sizing.shrink", shrink)


PLANTED = {
    "keep_random_state": (keep_random_state, "checkpointed"),
    "keep_buffers": (keep_buffers, "noisy"),
    "count_twice": (count_twice, "plain"),
    "halve_too_much": (halve_too_much, "plain"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, case_name = PLANTED[name]
    case = CASES[case_name]
    small, place = run(case, SMALL), run(case, LARGE).begun - 4
    assert run(case, LARGE, place).differences(small) == set()
    plant(monkeypatch)
    assert run(case, LARGE, place).differences(small)


def test_a_traceback_that_is_kept_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "let_go", lambda error, device: None)
    with pytest.raises(AssertionError):
        test_m3_what_the_failure_held_is_free_before_the_retry("forward")


def test_the_wrong_bound_is_not_the_exact_one() -> None:
    assert EXACT < WRONG
