"""Spilled activations: the same gradient to the last bit, the same refusals, and the memory comes back."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from microbatch.errors import OutOfMemoryError

WIDTH, ROWS = 8, 6
Context: TypeAlias = AbstractContextManager[Any]


# -- networks ----------------------------------------------------------------------------------------------------------


class Do(nn.Module):
    """A function of the stream and of the modules that it uses."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


class Scaled(torch.autograd.Function):
    """A function that saves by itself: an input, a transposed view of its own making, and its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inner = x.sigmoid().t()
        out = x * inner.t()
        ctx.save_for_backward(x, inner, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, inner, out = ctx.saved_tensors
        inner = inner.t()
        return grads[0] * (inner + x * inner * (1 - inner)) + 0 * out


def attend(x: Tensor, qkv: nn.Module) -> Tensor:
    q, k, v = (each.unflatten(1, (2, 4)).unsqueeze(0).transpose(1, 2) for each in qkv(x).chunk(3, dim=1))
    return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).squeeze(0)


def remember(x: Tensor, cell: nn.Module) -> Tensor:
    state = None
    for _ in range(2):
        state = cell(x, state)
    assert state is not None
    return state[0]


def write_to_a_view(x: Tensor) -> Tensor:
    y = x * 1.5
    y[:, 2:6].mul_(0.5)
    y[:, :4].sigmoid_()
    return y


def again(x: Tensor, inner: nn.Module, *, reentrant: bool) -> Tensor:
    found = checkpoint(inner, x, use_reentrant=reentrant)
    assert isinstance(found, Tensor)
    return found


def recomputed() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "relu in place": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "convolution": lambda: Do(lambda x, conv: conv(x.unflatten(1, (2, 4))).flatten(1), nn.Conv1d(2, 2, 3, padding=1)),
    "attention": lambda: Do(attend, nn.Linear(WIDTH, 3 * WIDTH)),
    "embedding": lambda: Do(
        lambda x, table: x + table((x.detach().float().abs() * 4).long().sum(1) % 10), nn.Embedding(10, WIDTH)
    ),
    "lstm": lambda: Do(remember, nn.LSTMCell(WIDTH, WIDTH)),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "dropout": lambda: nn.Dropout(0.4),
    "gelu": nn.GELU,
    "softmax": lambda: nn.Softmax(dim=1),
    "transposed": lambda: Do(lambda x: x.tanh().unflatten(1, (2, 4)).transpose(1, 2).exp().flatten(1)),
    "columns": lambda: Do(lambda x: torch.cat([x[:, ::2] * x[:, 1::2], x[:, :4].sin()], dim=1)),
    "one row": lambda: Do(lambda x: x * x.tanh()[2:3].cos()),
    "expanded": lambda: Do(lambda x: x * x.mean(0, keepdim=True).expand_as(x)),
    "conjugate": lambda: Do(lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x).conj(), n=WIDTH)),
    "view written": lambda: Do(write_to_a_view),
    "own function": lambda: Do(Scaled.apply),
    "checkpoint": lambda: Do(partial(again, reentrant=False), recomputed()),
    "reentrant checkpoint": lambda: Do(partial(again, reentrant=True), recomputed()),
}
NOT_IN_BF16 = {"conjugate", "lstm"}


def network(names: Sequence[str], dtype: torch.dtype) -> nn.Module:
    """Make a network of these layers; the same name twice is the same layer twice, with tied weights."""
    made = {name: LAYERS[name]() for name in dict.fromkeys(names)}
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(made[name] for name in names)).to(dtype)


def learn(model: nn.Module, around: Callable[[], Context], *, microbatches: int = 1, passes: int = 1) -> list[Tensor]:
    """Return all that a window leaves behind: losses, gradients, also the input's, and buffers."""
    twin = copy.deepcopy(model)
    dtype = next(model.parameters()).dtype
    torch.manual_seed(7)
    inputs = [torch.randn(ROWS, WIDTH, dtype=dtype).requires_grad_() for _ in range(microbatches)]
    losses: list[Tensor] = []
    for x in inputs:
        with around():
            losses.append(twin(x).square().sum())
    for at in range(passes):
        for loss in losses:
            loss.backward(retain_graph=at < passes - 1)
    grads = [each.grad for each in (*twin.parameters(), *inputs) if each.grad is not None]
    assert len(grads) > microbatches
    return [*(loss.detach() for loss in losses), *grads, *twin.buffers()]


def same(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Return whether two runs agree to the last bit; NaN equals NaN."""
    return len(got) == len(wanted) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(got, wanted, strict=True)
    )


# -- the same gradient -------------------------------------------------------------------------------------------------

NAMES = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5)


@given(names=NAMES, microbatches=st.integers(1, 3), passes=st.integers(1, 2), double=st.booleans())
@settings(max_examples=60)
@example(names=["relu in place", "relu in place"], microbatches=2, passes=2, double=False)
@example(names=["conjugate", "conjugate", "conjugate", "conjugate", "columns"], microbatches=1, passes=1, double=False)
def test_the_gradient_is_the_same_to_the_last_bit(
    names: list[str], microbatches: int, passes: int, double: bool
) -> None:
    model = network(names, torch.float64 if double else torch.float32)
    spill = mb.Spill(smallest=0)
    got = learn(model, lambda: spill, microbatches=microbatches, passes=passes)
    assert same(got, learn(model, nullcontext, microbatches=microbatches, passes=passes))
    assert spill.bytes_spilled > 0
    assert spill.bytes_held == 0


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_alone(name: str) -> None:
    model = network([name, "linear"], torch.float32)
    plain = learn(model, nullcontext)
    assert all(each.isfinite().all() for each in plain)
    assert same(learn(model, lambda: mb.Spill(smallest=0)), plain)


@given(names=st.lists(st.sampled_from(sorted(LAYERS.keys() - NOT_IN_BF16)), min_size=1, max_size=4))
@settings(max_examples=20)
def test_under_autocast(names: list[str]) -> None:
    model = network(names, torch.float32)

    class Cast(Do):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    cast = nn.Sequential(Cast(lambda x, inner: inner(x), model))
    assert same(learn(cast, lambda: mb.Spill(smallest=0)), learn(cast, nullcontext))


def test_second_derivatives() -> None:
    model = network(["gelu", "transposed", "softmax", "expanded"], torch.float64)
    found: list[list[Tensor]] = []
    for around in (nullcontext(), mb.Spill(smallest=0)):
        torch.manual_seed(3)
        x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
        with around:
            (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            penalty = grad.square().sum()
        found.append(list(torch.autograd.grad(penalty, [x, *model.parameters()])))
    assert same(*found)


def test_the_same_graph_through_a_block_that_is_left_and_entered_again() -> None:
    spill = mb.Spill(smallest=0)
    x = torch.randn(4, 4, requires_grad=True)
    with spill:
        with mb.Spill(smallest=0) as inner:  # the innermost has it
            y = x.exp()
        z = y.tanh()
    with spill:
        w = (y * z).exp()
    w.sum().backward()
    assert spill.bytes_spilled == 3 * 64
    assert inner.bytes_spilled == 64
    twin = x.detach().requires_grad_()
    y = twin.exp()
    (y * y.tanh()).exp().sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    assert torch.equal(x.grad, twin.grad)


# -- what a wrong one would do -----------------------------------------------------------------------------------------


def hooks(bring_back: Callable[[Tensor, torch.UntypedStorage], Tensor]) -> Callable[[], Context]:
    """Spill by hand: copy the storage of each tensor, and rebuild it in some way."""

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        like, storage = torch.empty_strided(tensor.shape, tensor.stride(), device="meta"), tensor.untyped_storage()
        offset, dtype, kept = tensor.storage_offset(), tensor.dtype, storage.clone()

        def unpack() -> Tensor:
            return bring_back(torch.empty(0, dtype=dtype).set_(kept, offset, like.shape, like.stride()), kept)

        return unpack

    return lambda: saved_tensors_hooks(pack, lambda unpack: unpack())


def without_strides(right: Tensor, storage: torch.UntypedStorage) -> Tensor:
    dense = torch.empty(0, dtype=right.dtype).set_(storage)
    return dense[right.storage_offset() :][: right.numel()].view(right.shape) if right.numel() <= len(dense) else right


def without_offset(right: Tensor, storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=right.dtype).set_(storage, 0, right.shape, right.stride())


def by_pointer() -> Context:
    """Spill by hand, one copy for each address, whatever has been written there since."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().clone())
        body = torch.empty(0, dtype=tensor.dtype)
        return body.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    return saved_tensors_hooks(pack, lambda tensor: tensor)


WRONG: dict[str, Callable[[], Context]] = {
    "forgets strides": hooks(without_strides),
    "forgets where a view begins": hooks(without_offset),
    "rounds": hooks(lambda right, _: right.to(torch.bfloat16).to(right.dtype) if right.is_floating_point() else right),
    "takes an address for the tensor": by_pointer,
}


def test_by_hand_the_right_hooks_pass_the_same_comparison() -> None:
    model = network(["transposed", "columns", "view written", "lstm"], torch.float32)
    assert same(learn(model, hooks(lambda right, _: right)), learn(model, nullcontext))


@pytest.mark.parametrize("name", WRONG)
def test_by_hand_wrong_hooks_are_seen(name: str) -> None:
    model = network(["transposed", "columns", "view written", "lstm"], torch.float32)
    assert not same(learn(model, WRONG[name]), learn(model, nullcontext))


# -- what is written to in place ---------------------------------------------------------------------------------------


def after_exp(x: Tensor) -> Tensor:
    y = x.exp()
    return y + y.add_(1)


def through_a_view(x: Tensor) -> Tensor:
    y = x.exp()
    y[0].zero_()
    return y * 2


def then_gone(x: Tensor) -> Tensor:
    y = x * 2
    z = y * y
    y.zero_()
    return z


def of_an_input(x: Tensor) -> Tensor:
    constant = torch.ones_like(x)
    z = x * constant
    constant.add_(1)
    return z


def saved_twice(x: Tensor) -> Tensor:
    y = x * 2
    first = y.sin()
    y.add_(1)
    return first + y.cos()


def in_own_function(x: Tensor) -> Tensor:
    y = x * 2
    z = Scaled.apply(y)
    y.add_(1)
    return z


def a_slice(x: Tensor) -> Tensor:
    y = x * 2
    z = y[:1].sin()
    y.add_(1)
    return z


WRITES = [after_exp, through_a_view, then_gone, of_an_input, saved_twice, in_own_function, a_slice]
MODIFIED = "one of the variables needed for gradient computation has been modified by an inplace operation"


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("smallest", [0, 1 << 30], ids=["moved", "left"])
def test_a_write_after_saving_is_refused_as_it_is_without(write: Callable[[Tensor], Tensor], smallest: int) -> None:
    for around in (nullcontext(), mb.Spill(smallest=smallest)):
        x = torch.randn(4, 4, requires_grad=True)
        with around:
            loss = write(x).sum()
        with pytest.raises(RuntimeError, match=MODIFIED):
            loss.backward()
        assert x.grad is None


@pytest.mark.parametrize("write", WRITES)
def test_by_hand_torchs_own_hooks_do_not_see_it(write: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        write(x).sum().backward()
    assert x.grad is not None


def test_a_write_between_forward_and_backward_is_refused_for_its_own_nodes_alone() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with mb.Spill(smallest=0):
        y = x.exp()
        one, other = y.sin(), x.cos()
        y.detach().mul_(2)
    with pytest.raises(RuntimeError, match=MODIFIED):
        one.sum().backward(retain_graph=True)
    other.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, -x.detach().sin())


class Overwrites(torch.autograd.Function):
    """Its backward turns what it saved into its gradient, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return x.detach().cos_().mul_(grads[0])


@pytest.mark.parametrize("alive", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_a_backward_that_overwrites_what_it_was_given_spoils_nobody_elses(alive: bool, twice: bool) -> None:
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    with mb.Spill(smallest=0):
        y = x * 2
        loss = y.cos().sum() + Overwrites.apply(y).sum()  # backward runs the later one first
        if not alive:
            del y
    wanted = 2 * ((2 * x.detach()).cos() - (2 * x.detach()).sin())
    outcome = pytest.raises(RuntimeError, match=MODIFIED) if alive else nullcontext()
    with outcome:
        for at in range(1 + twice):
            x.grad = None
            loss.backward(retain_graph=at < twice)
    if not alive:
        assert x.grad is not None
        assert torch.allclose(x.grad, wanted, rtol=1e-13)


# -- what stays --------------------------------------------------------------------------------------------------------


def test_parameters_and_what_is_named_stay() -> None:
    linear, norm = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False).eval()
    model = nn.Sequential(linear, norm)
    x, scale = torch.randn(4, 8), torch.randn(8)
    with mb.Spill(model, {"batch": [x]}, scale, smallest=0) as spill:
        y = F.linear(x, linear.weight.t().t()) * scale
        z = norm(y)
    assert spill.bytes_spilled == 4 * 8 * 4  # y, for the norm
    del y, z
    with mb.Spill(smallest=0) as spill:
        z = F.linear(x, linear.weight)
    assert spill.bytes_spilled == x.nbytes  # unnamed
    frozen = linear.requires_grad_(False).weight
    with mb.Spill(smallest=0) as spill:
        F.linear(z, frozen)
    assert spill.bytes_spilled == 0


def test_small_ones_stay() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with mb.Spill(smallest=64 * 64 * 4 + 1) as spill:
        y = x.exp()
    assert spill.bytes_spilled == 0
    with mb.Spill(smallest=64 * 64 * 4) as spill:
        z = y.exp()
        z[:1].exp().sin()  # one row, of what was moved already; its own exponential is small
    assert spill.bytes_spilled == 64 * 64 * 4


def test_a_row_that_keeps_all_its_storage_alive_is_moved_alone() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with mb.Spill(smallest=64 * 64 * 4) as spill:
        loss = (x * 2)[3].sin().sum()
    assert spill.bytes_spilled == 64 * 4
    loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad[3], 2 * (2 * x[3]).detach().cos())


def test_another_kind_of_device_stays() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with mb.Spill(smallest=0, device="cuda") as spill:
        x.exp().sum().backward()
    assert spill.bytes_spilled == 0


# -- memory ------------------------------------------------------------------------------------------------------------

LAYERS_DEEP, SIZE, GRADIENTS = 12, 1024 * 64 * 4, 12 * (64 * 64 + 64) * 4


def deep() -> tuple[nn.Sequential, Tensor]:
    layers = [layer for _ in range(LAYERS_DEEP) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*layers), torch.randn(1024, 64)


def through(model: nn.Sequential, x: Tensor) -> Tensor:
    return model(x)


def peak_of(
    around: Callable[[nn.Sequential, Tensor], Context], forward: Callable[[nn.Sequential, Tensor], Tensor] = through
) -> int:
    model, x = deep()
    meter = mb.MemoryMeter()
    meter.track(model, x)
    before = meter.live_bytes
    with meter:
        with around(model, x):
            loss = forward(model, x).sum()
        loss.backward()
    return meter.peak_bytes - before


def test_the_peak_falls_to_what_one_layer_needs() -> None:
    plain = peak_of(lambda model, x: nullcontext())
    spilled = peak_of(mb.Spill)
    assert plain >= LAYERS_DEEP * SIZE
    # The incoming and outgoing gradient, and what came back for this node and the last.
    assert spilled <= GRADIENTS + 4 * SIZE + 4096
    assert plain - spilled >= (LAYERS_DEEP - 4) * SIZE - GRADIENTS


def test_by_hand_hooks_that_keep_the_tensor_save_nothing() -> None:
    kept = peak_of(lambda model, x: saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor))
    assert kept >= LAYERS_DEEP * SIZE


def test_what_is_moved_is_what_was_expected() -> None:
    model, x = deep()
    with mb.Spill(model, x) as spill:
        loss = model(x).sum()
    # Every tanh saves its output, which the next layer's product saves too; the last one's nobody else does.
    assert spill.bytes_spilled == spill.bytes_held == LAYERS_DEEP * SIZE
    del loss
    assert spill.bytes_held == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpoints_keep_is_moved_too(reentrant: bool) -> None:
    def parts(model: nn.Sequential, x: Tensor) -> Tensor:
        y = x.requires_grad_().tanh()
        for at in range(0, len(model), 6):
            y = again(y, model[at : at + 6], reentrant=reentrant)
        return y

    spills: list[mb.Spill] = []

    def spill(model: nn.Module, x: Tensor) -> mb.Spill:
        spills.append(mb.Spill(model, x))
        return spills[-1]

    checkpointed = peak_of(lambda model, x: nullcontext(), parts)
    both = peak_of(spill, parts)
    assert spills[0].bytes_spilled == LAYERS_DEEP // 3 * SIZE  # what goes into each part, and nothing of its inside
    # The peak was at the last part, whose gradient from above takes no room; now it is where all gradients are there.
    assert both <= checkpointed - (LAYERS_DEEP // 3 - 2) * SIZE + GRADIENTS


def test_the_file_does_not_grow_with_the_number_of_microbatches() -> None:
    model, x = deep()

    def file_after(microbatches: int, keep: list[Tensor] | None = None) -> int:
        spill = mb.Spill(model, x)
        for _ in range(microbatches):
            with spill:
                loss = model(x).sum()
            if keep is not None:
                keep.append(loss)
            loss.backward(retain_graph=keep is not None)
        assert spill.bytes_spilled == microbatches * LAYERS_DEEP * SIZE
        return spill.store.file_bytes

    assert 0 < file_after(1) == file_after(2) == file_after(16)
    assert file_after(16, keep=[]) > file_after(16)  # graphs that are kept keep their bytes


ENDS = ["backward", "no backward", "failed forward", "failed backward", "refused backward"]


@pytest.mark.parametrize("smallest", [0, 1 << 30], ids=["moved", "left"])
@pytest.mark.parametrize("end", ENDS)
def test_nothing_stays_alive(end: str, smallest: int) -> None:
    model, x = deep()
    seen: list[weakref.ref[Any]] = []
    for module in model:
        module.register_forward_hook(lambda _, __, out: seen.append(weakref.ref(out.untyped_storage())))

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    def run(spill: mb.Spill) -> None:
        with spill:
            y = model[:13](x)
            if end == "failed forward":
                fail()
            if end == "failed backward":
                y.register_hook(fail)
            if end == "refused backward":
                y.detach().zero_()
            loss = model[13:](y).sum()
        del y
        assert smallest or sum(ref() is not None for ref in seen) <= 1
        if end != "no backward":
            loss.backward()

    gc.collect()
    gc.disable()  # references alone are to do it
    try:
        spill = mb.Spill(model, x, smallest=smallest)
        store = weakref.ref(spill.store)
        try:
            run(spill)
        except (ZeroDivisionError, RuntimeError) as error:
            error.__traceback__ = None
        assert (spill.bytes_spilled == 0) == bool(smallest)
        # What a failed backward had begun stays in the engine's queue until it runs again.
        torch.ones(1, requires_grad=True).sum().backward()
        assert all(ref() is None for ref in seen)
        assert spill.bytes_held == 0
        del spill
        assert store() is None
    finally:
        gc.enable()


def test_memory_that_ends_on_the_way_back_is_told_as_such() -> None:
    model, x = deep()
    with mb.Spill(model, x) as spill:
        loss = model(x).sum()
    meter = mb.MemoryMeter(budget=SIZE + 4096)
    with meter, pytest.raises(OutOfMemoryError):
        loss.backward()
    del loss
    assert spill.bytes_held == 0


# -- beside the rest of the library ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_inside_an_accumulators_step(fuse: bool, autocast: torch.dtype | None) -> None:
    torch.manual_seed(1)
    start = nn.Sequential(nn.Embedding(1024, 512), nn.Linear(512, 1024), nn.Dropout(0.1), nn.Linear(1024, 1024))
    ids = torch.randint(1024, (6, 16))
    found: list[list[Tensor]] = []
    for spilled in (False, True):
        torch.manual_seed(2)
        model = copy.deepcopy(start)
        accumulator = mb.Accumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            microbatch_size=2,
            sums=mb.Sums(fuse=fuse),
            autocast=autocast,
        )
        spill = mb.Spill(model, ids, smallest=0)

        def loss_fn(model: nn.Module, ids: Tensor, *, around: Context) -> Tensor:
            with around:
                logits = model(ids[:, :-1])
                return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

        step = accumulator.step(ids, partial(loss_fn, around=spill if spilled else nullcontext()))
        assert step.fused == (3 if fuse else 0)
        found.append([step.loss, *(each.detach() for each in model.parameters())])
        assert spill.bytes_held == 0
        assert (spill.bytes_spilled > 3 * 30 * 1024 * 4) == spilled
    assert same(*found)


def test_the_head_that_overwrites_its_logits() -> None:
    hidden, weight = torch.randn(16, 32), torch.randn(64, 32, requires_grad=True)
    labels = torch.randint(64, (16,))
    grads: list[Tensor] = []
    for around in (nullcontext(), mb.Spill(smallest=0)):
        with around:
            loss = mb.linear_cross_entropy(hidden, weight, labels).sum
        grads += torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(*grads)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_with_one_block_and_threads_with_their_own() -> None:
    model = network(["gelu", "transposed", "columns", "linear"], torch.float32)
    shared = mb.Spill(smallest=0)
    own = [mb.Spill(smallest=0) for _ in range(2)]
    around = [shared, shared, *own]
    start = threading.Barrier(len(around))
    grads: list[Any] = [None] * len(around)

    def work(at: int) -> None:
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(at), requires_grad=True)
        start.wait()
        for _ in range(20):
            with around[at]:
                loss = model(x).square().sum()
            grads[at] = torch.autograd.grad(loss, x)[0]

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(around))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, grad in enumerate(grads):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(at), requires_grad=True)
        assert torch.equal(grad, torch.autograd.grad(model(x).square().sum(), x)[0])
    assert own[0].bytes_spilled == own[1].bytes_spilled == shared.bytes_spilled / 2 > 0
    assert shared.bytes_held == 0


def test_a_block_is_its_own_threads_alone() -> None:
    spill = mb.Spill(smallest=0)
    x = torch.randn(4, requires_grad=True)

    def work() -> None:
        x.exp().sum().backward()

    with spill:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert spill.bytes_spilled == 0


# -- when the disk is full ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Let no file of this process grow beyond so many bytes."""
    resource = pytest.importorskip("resource", reason="this system has no limits on files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_clear_error_and_leaves_the_gradients(
    small_disk: Callable[[int], None], tmp_path: Path
) -> None:
    model, x = deep()
    model(x).sum().backward()
    before = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    spill = mb.Spill(model, x, smallest=0, directory=tmp_path)
    small_disk(1 << 21)
    with pytest.raises(mb.MicrobatchError, match="directory=") as caught, spill:
        model(x).sum()
    assert isinstance(caught.value, OSError)
    assert str(tmp_path) in str(caught.value)
    del caught
    assert same([each.grad for each in model.parameters() if each.grad is not None], before)
    small_disk(1 << 30)
    with spill:  # and works once there is room
        loss = model(x).sum()
    loss.backward()
    assert spill.bytes_held == 0


def test_a_place_that_does_not_exist() -> None:
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(mb.MicrobatchError, match="/no/such/place"), mb.Spill(smallest=0, directory="/no/such/place"):
        x.exp()


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("name", LAYERS)
def test_cuda_the_gradient_is_the_same_to_the_last_bit(name: str) -> None:
    def learn_there(around: Context) -> list[Tensor]:
        torch.manual_seed(3)
        twin = copy.deepcopy(model)
        with around:
            loss = twin(x).square().sum()
        loss.backward()
        return [loss.detach(), *(each.grad for each in twin.parameters() if each.grad is not None)]

    model, x = network([name, "linear", "gelu"], torch.float32).cuda(), torch.randn(ROWS, WIDTH, device="cuda")
    spill = mb.Spill(model, x, smallest=0)
    assert same(learn_there(spill), learn_there(nullcontext()))
    assert spill.bytes_spilled > 0
    assert spill.bytes_held == 0


@pytest.mark.cuda
def test_cuda_the_peak_falls_and_large_copies_arrive_in_time() -> None:
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(1024, 1024), nn.Tanh()))).cuda()
    x, size = torch.randn(8192, 1024, device="cuda"), 8192 * 1024 * 4

    def run(around: Context) -> tuple[int, list[Tensor]]:
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with around:
            loss = model(x).sum()
        loss.backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return peak, [each.grad.clone() for each in model.parameters() if each.grad is not None]

    run(nullcontext())
    plain, wanted = run(nullcontext())
    spilled, got = run(mb.Spill(model, x))
    assert same(got, wanted)
    assert plain >= 12 * size
    assert spilled <= plain - 3 * size  # those on their way out and back are still there


@pytest.mark.cuda
def test_cuda_what_is_on_the_host_stays() -> None:
    model = nn.Linear(4, 4).cuda()
    x = torch.randn(4, 4, requires_grad=True)
    with mb.Spill(model, smallest=0) as spill:
        y = x.exp()
    assert spill.bytes_spilled == 0
    with mb.Spill(model, smallest=0) as spill, save_on_cpu():  # the innermost has it
        y.cuda().exp()
    assert spill.bytes_spilled == 0
