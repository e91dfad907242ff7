"""Gradients inside the matrix product: the same gradient, the same hooks, less memory, whatever the model does."""

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from tests.allocations import allocated_peak, changes, recorder
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, jvp, vmap
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim import SGD
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import microbatch as mb

from .reference import (
    EXACT,
    NARROW,
    WRONG,
    Batch,
    Door,
    Gradients,
    Subject,
    cancellation,
    few,
    fewer,
    filled,
    full_batch,
    gradients_of,
    moved,
    numbers,
    on_each_device,
    pieces_of,
    relative_error,
    sentences,
    subject,
    through_each_door,
    token_loss,
    token_mean,
)

# Of torch itself, the first time that forward-mode differentiation is used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients:UserWarning"),  # of tokens
    # The compiler looks at the gradient of what a compiled layer is given.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

SEEDS = st.integers(0, 2**16)
TARGETS = st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(any)
SIZES = st.integers(1, 4)
RAGGED = [8, 1, 0, 2, 5]
LONG, WIDE, WORDS = 8, 4, 7


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse the small weights too, and replace the cross-entropy of few logits."""
    monkeypatch.setattr("microbatch.gradients.fused_matmul.SMALLEST", 1)
    monkeypatch.setattr("microbatch.loss.tiled_cross_entropy._IN_CACHE", 1)


# -- networks of covered and uncovered layers ----------------------------------------------------------------------


class Special(nn.Parameter):
    """A parameter of a type of its own."""


def call(inner: Any, x: Tensor) -> Tensor:
    return inner(x)


def linear() -> nn.Module:
    return nn.Linear(WIDE, WIDE)


def frozen(inner: nn.Module) -> nn.Module:
    inner.get_parameter("weight").requires_grad_(False)
    return inner


def special() -> nn.Module:
    inner = nn.Linear(WIDE, WIDE)
    inner.weight = Special(inner.weight.detach())
    return inner


def positions(inner: Any, x: Tensor) -> Tensor:
    return inner(torch.arange(LONG, device=x.device)).expand_as(x)


Make = Callable[[], nn.Module]
Use = Callable[[Any, Tensor], Tensor]

# What is made, how it is used on (rows, LONG, WIDE), and whether its weight is fused.
LAYERS: dict[str, tuple[Make, Use, bool]] = {
    "linear": (linear, call, True),
    "no bias": (lambda: nn.Linear(WIDE, WIDE, bias=False), call, True),
    "functional": (linear, lambda m, x: F.linear(x, m.weight), True),
    "by name": (linear, lambda m, x: F.linear(bias=m.bias, weight=m.weight, input=x), True),
    "addmm": (linear, lambda m, x: torch.addmm(m.bias, x.reshape(-1, WIDE), m.weight).view(x.shape), True),
    "addmm scaled": (
        linear,
        lambda m, x: torch.addmm(m.bias, x.reshape(-1, WIDE), m.weight, alpha=2, beta=0.5).view(x.shape),
        False,
    ),
    "addmm of a matrix": (
        linear,
        lambda m, x: torch.addmm(m.bias.expand(x.shape[1], -1), x[0], m.weight).expand_as(x) * 0 + m(x),
        True,
    ),
    "transposed": (lambda: nn.Linear(LONG, LONG), lambda m, x: m(x.mT).mT, True),
    "expanded": (linear, lambda m, x: m(x.mean(1, keepdim=True).expand_as(x)), True),
    "summed": (linear, lambda m, x: m(x).sum(1, keepdim=True).expand_as(x), True),
    "1-D": (linear, lambda m, x: torch.stack([m(v) for v in x.flatten(0, 1)]).view(x.shape), True),
    "4-D": (linear, lambda m, x: m(x.unflatten(1, (2, 4))).flatten(1, 2), True),
    "empty": (linear, lambda m, x: x * 2 + m(x[:0]).sum(), True),
    "twice": (linear, lambda m, x: m(m(x).tanh()), True),
    "and plain before": (linear, lambda m, x: m.weight.square().mean() + m(x), True),
    "and plain after": (linear, lambda m, x: m(x) * m.weight.square().mean(), True),
    "and plain between": (linear, lambda m, x: m(m(x) * m.weight.square().mean()).tanh(), True),
    "and its transpose": (linear, lambda m, x: F.linear(m(x), m.weight.T), True),
    "a view": (linear, lambda m, x: F.linear(x, m.weight[:, :], m.bias), False),
    "frozen": (lambda: frozen(linear()), call, False),
    "matmul": (linear, lambda m, x: x @ m.weight, False),
    "checkpoint": (linear, lambda m, x: checkpoint(m, x, use_reentrant=False), True),
    "reentrant": (linear, lambda m, x: checkpoint(m, x, use_reentrant=True), True),
    "checkpoint and outside": (linear, lambda m, x: m(checkpoint(m, m(x), use_reentrant=False).tanh()), True),
    "reentrant and outside": (linear, lambda m, x: m(checkpoint(m, m(x), use_reentrant=True).tanh()), True),
    "convolution": (lambda: nn.Conv1d(WIDE, WIDE, 3, padding=1), lambda m, x: m(x.mT).mT, False),
    "norm": (lambda: nn.LayerNorm(WIDE), call, False),
    "embedding": (lambda: nn.Embedding(LONG, WIDE), positions, True),
    "padding": (lambda: nn.Embedding(LONG, WIDE, padding_idx=-2), positions, True),
    "sparse": (lambda: nn.Embedding(LONG, WIDE, sparse=True), positions, False),
    "max norm": (lambda: nn.Embedding(LONG, WIDE, max_norm=0.5), positions, False),
    "by frequency": (lambda: nn.Embedding(LONG, WIDE, scale_grad_by_freq=True), positions, False),
    "bilinear": (lambda: nn.Bilinear(WIDE, WIDE, WIDE), lambda m, x: m(x, x), False),
    "lstm": (lambda: nn.LSTM(WIDE, WIDE, batch_first=True), lambda m, x: m(x)[0], False),
    "attention": (
        lambda: nn.MultiheadAttention(WIDE, 2, batch_first=True),
        lambda m, x: m(x, x, x, need_weights=False)[0],
        False,
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(WIDE, 2, 8, 0.0, batch_first=True), call, False),
    "weight norm": (lambda: weight_norm(linear()), call, False),
    "spectral norm": (lambda: spectral_norm(linear()).eval(), call, False),
    "a subclass": (special, call, False),
}
DENSE = [kind for kind in LAYERS if kind != "sparse"]  # whose bf16 sums are another matter
SIMPLE = [
    "linear",
    "no bias",
    "functional",
    "twice",
    "and plain after",
    "4-D",
    "checkpoint",
]  # and differentiable in every way


class Layer(nn.Module):
    """Use a module in a way of one's own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make, self.use, _ = LAYERS[kind]
        self.inner = make()

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape ``(rows, LONG, WIDE)``."""
        return self.use(self.inner, x)


class Network(nn.Module):
    """Read tokens, go through layers, some of them several times, and predict tokens."""

    def __init__(self, kinds: Sequence[str], *, tied: bool = False, padding: int | None = None, times: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDE, padding_idx=padding)
        self.layers = nn.ModuleList([Layer(kind) for kind in kinds] * times)
        self.head = nn.Linear(WIDE, WORDS)
        if tied:
            self.head.weight = self.embedding.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Go from embeddings to logits."""
        for layer in self.layers:
            hidden = (hidden + layer(hidden)).tanh()
        return self.head(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape ``(rows, LONG, WORDS)``."""
        return self.logits(self.embedding(tokens))


def network(
    kinds: Sequence[str], seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float64, **how: Any
) -> Network:
    model = Network(kinds, **how)
    filled(model, seed, device, dtype)
    return model


def both(model: nn.Module, *, size: int, **settings: Any) -> tuple[Subject, Subject]:
    """Put a model under an accumulator that fuses and one that does not."""
    return subject(model, size=size, sums=mb.Sums(fuse=True), **settings), subject(
        model, size=size, sums=mb.Sums(fuse=False), **settings
    )


# -- the gradient --------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tied", [False, True])
def test_each_layer_is_exact_and_what_is_fused_is_said(device: str, kind: str, tied: bool) -> None:
    model, batch = network([kind], 3, device, tied=tied), sentences(0, RAGGED)
    reference = full_batch(model, token_mean, batch)
    fused, plain = both(model, size=2)
    steps = [it.accumulator.step(batch, token_loss) for it in (fused, plain)]
    assert relative_error(plain.updates[0], reference) <= EXACT
    assert relative_error(fused.updates[0], reference) <= EXACT
    report = fused.accumulator.fusion()
    said = {name for name, what in report.items() if what == "fused"}
    sure = {"embedding.weight"} | (set() if tied else {"head.weight"})
    sure |= {"layers.0.inner.weight"} if LAYERS[kind][2] else set()
    assert said - {"layers.0.inner.linear1.weight", "layers.0.inner.linear2.weight"} == sure
    assert report.keys() == {name for name, each in model.named_parameters() if each.requires_grad}
    assert [step.fused for step in steps] == [len(said), 0]
    assert plain.accumulator.fusion() == {}


@through_each_door
@on_each_device
@few
@given(
    kinds=st.lists(st.sampled_from(list(LAYERS)), max_size=4),
    tied=st.booleans(),
    padding=st.sampled_from([None, 0, -1]),
    times=st.integers(1, 2),
    targets=TARGETS,
    size=SIZES,
    seed=SEEDS,
)
@example(kinds=["linear", "reentrant", "norm"], tied=True, padding=0, times=2, targets=[8, 1, 2, 5], size=1, seed=0)
def test_random_networks(
    door: Door,
    device: str,
    kinds: list[str],
    tied: bool,
    padding: int | None,
    times: int,
    targets: list[int],
    size: int,
    seed: int,
) -> None:
    model = network(kinds, seed, device, tied=tied, padding=padding, times=times)
    batch = sentences(seed, targets)
    reference = full_batch(model, token_mean, batch)
    fused, plain = both(model, size=size)
    for _ in range(2):
        steps = [door(it, batch, token_loss, size=size) for it in (fused, plain)]
        assert relative_error(plain.updates[-1], reference) <= EXACT
        assert relative_error(fused.updates[-1], reference) <= EXACT
        assert steps[0].fused > steps[1].fused == 0
        assert steps[0].loss.item() == pytest.approx(steps[1].loss.item(), rel=EXACT)
        assert steps[0].grad_norm.item() == pytest.approx(steps[1].grad_norm.item(), rel=EXACT)


class Naive(TorchFunctionMode):
    """Fuse as one would at first: add to `.grad` and tell autograd nothing, or tell it everything."""

    def __init__(self, *, tell: bool) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and isinstance(args[1], nn.Parameter) and args[1].requires_grad:
            out = NaiveProduct.apply(args[0], args[1], self.tell)
            return out if len(args) < 3 or args[2] is None else out + args[2]
        return func(*args, **(kwargs or {}))


class NaiveProduct(torch.autograd.Function):
    """``x W^T``, whose backward adds to the gradient by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tell: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.tell = weight, tell
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (dy,) = ctx.saved_tensors, grads
        made = dy.flatten(0, -2).T @ x.flatten(0, -2)
        ctx.weight.grad = made.clone() if ctx.weight.grad is None else ctx.weight.grad.add_(made)
        return dy @ weight, made if ctx.tell else None, None


def naively(model: nn.Module, batch: Batch, *, tell: bool, loss: Any = None) -> Gradients:
    """Accumulate by hand under the naive mode."""
    twin, count = copy.deepcopy(model), (batch["labels"] >= 0).sum()
    for piece in pieces_of(moved(batch, twin, torch.float64), 2):
        with Naive(tell=tell):
            total = (loss or token_loss)(twin, piece).sum / count
        total.backward()
    return gradients_of(twin)


def test_by_hand_telling_autograd_too_counts_twice() -> None:
    model, batch = network(["linear"]), sentences(0, RAGGED)
    reference = full_batch(model, token_mean, batch)
    assert relative_error(naively(model, batch, tell=False), reference) <= EXACT
    assert relative_error(naively(model, batch, tell=True), reference) > WRONG


# -- in the precision that one has ---------------------------------------------------------------------------------


@through_each_door
@on_each_device
@pytest.mark.parametrize("precision", NARROW)
@fewer
@given(
    kinds=st.lists(st.sampled_from([*SIMPLE, "addmm", "norm", "checkpoint", "reentrant", "embedding"]), max_size=3),
    tied=st.booleans(),
    targets=TARGETS,
    size=SIZES,
    seed=SEEDS,
)
@example(kinds=["linear", "twice"], tied=True, targets=[8, 1, 2, 5, 8, 8], size=1, seed=0)
def test_no_worse_than_plain(
    door: Door,
    device: str,
    precision: str,
    kinds: list[str],
    tied: bool,
    targets: list[int],
    size: int,
    seed: int,
) -> None:
    dtype, autocast = NARROW[precision]
    model, batch = network(kinds, seed, device, dtype, tied=tied), sentences(seed, targets)
    reference = full_batch(model, token_mean, batch)
    fused, plain = both(model, size=size, autocast=autocast)
    steps = [door(it, batch, token_loss, size=size) for it in (fused, plain)]
    unit = torch.finfo(autocast or dtype).eps * cancellation(model, token_mean, batch, reference)
    own = relative_error(plain.updates[0], reference)
    assert own < 100 * unit
    assert relative_error(fused.updates[0], reference) <= own + unit
    assert steps[0].fused > 0
    assert {name: each.dtype for name, each in fused.updates[0].items()} == {
        name: each.dtype for name, each in plain.updates[0].items()
    }


class Add(nn.Module):
    """One output whose gradient with respect to every weight is 1 for every row."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(rows,)``."""
        return self.layer(x).sum(1)


def test_p1_narrow_sums_do_not_stop() -> None:
    model, batch = Add(torch.bfloat16), {"x": torch.ones(1024, 8, dtype=torch.bfloat16)}
    it = subject(model, size=1, sums=mb.Sums(fuse=True))
    step = it.accumulator.step(batch, lambda model, batch: mb.Loss(sum=model(batch["x"]).sum(), count=1 / 1024))
    assert step.fused == 1
    assert set(it.updates[0]["layer.weight"].flatten().tolist()) == {1024.0}
    twin = copy.deepcopy(model)
    for piece in pieces_of(batch, 1):
        twin(piece["x"]).sum().backward()
    assert set(gradients_of(twin)["layer.weight"].flatten().tolist()) == {256.0}


def test_a_gradient_scaler() -> None:
    model, batch = network(["linear", "twice"], dtype=torch.float32, tied=True), sentences(0, RAGGED)
    runs = [
        subject(
            model,
            size=2,
            autocast=torch.float16,
            sums=mb.Sums(fuse=fuse),
            grad_scaler=torch.amp.GradScaler("cpu", 2.0**9),
        )
        for fuse in (True, False)
    ]
    steps = [it.accumulator.step(batch, token_loss) for it in runs]
    assert [step.applied for step in steps] == [True, True]
    assert steps[0].fused == 4 - 1
    assert relative_error(runs[0].updates[0], runs[1].updates[0]) <= 2 * torch.finfo(torch.float16).eps
    assert relative_error({n: g * 2 for n, g in runs[0].updates[0].items()}, runs[1].updates[0]) > WRONG


class Renormed(nn.Module):
    """Read with an embedding that renormalises its rows as they are used, and predict with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDE, max_norm=0.3)
        self.head = nn.Linear(WIDE, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        return F.linear(self.embedding(tokens), self.head.weight)


def test_a_weight_that_changes_within_the_window_is_cast_again() -> None:
    model, batch = filled(Renormed(), 0, "cpu", torch.float32), sentences(0, [8, 8, 8, 8])
    batch["tokens"] = torch.arange(4).unsqueeze(1).expand(4, LONG).contiguous()  # each microbatch shortens another row
    fused, plain = both(model, size=1, autocast=torch.bfloat16)
    for it in (fused, plain):
        it.accumulator.step(batch, token_loss)
    assert relative_error(fused.updates[0], plain.updates[0]) <= torch.finfo(torch.bfloat16).eps
    other = subject(filled(Renormed(), 1, "cpu", torch.float32), size=1)
    other.accumulator.step(batch, token_loss)
    assert relative_error(other.updates[0], plain.updates[0]) > WRONG


def test_casts_are_of_this_window() -> None:
    model, batch = network(["linear"], dtype=torch.float32), sentences(0, RAGGED)
    runs = []
    for fuse in (True, False):
        twin = copy.deepcopy(model)
        runs.append(
            subject(twin, SGD(twin.parameters(), lr=1.0), size=2, autocast=torch.bfloat16, sums=mb.Sums(fuse=fuse))
        )
    for it in runs:
        for _ in range(3):
            it.accumulator.step(batch, token_loss)
    assert relative_error(runs[0].updates[-1], runs[1].updates[-1]) <= 4 * torch.finfo(torch.bfloat16).eps
    assert relative_error(runs[0].updates[0], runs[1].updates[-1]) > 8 * torch.finfo(torch.bfloat16).eps


# -- losses that differentiate by themselves -----------------------------------------------------------------------


def total_of(model: Network, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.logits(hidden).flatten(0, 1), labels.flatten(), reduction="sum")


def loss_of(sum_: Tensor, labels: Tensor) -> mb.Loss:
    return mb.Loss(sum=sum_, count=(labels >= 0).sum())


def rows_of(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    return [(batch["tokens"][i : i + 1], batch["labels"][i : i + 1]) for i in range(len(batch["tokens"]))]


def first_weight(model: Any) -> Tensor:
    return model.layers[0].inner.weight


def input_penalty(model: Network, batch: Batch) -> mb.Loss:
    """Penalise the gradient with respect to the embeddings, as in WGAN-GP."""
    hidden = model.embedding(batch["tokens"])
    sum_ = total_of(model, hidden, batch["labels"])
    (gradient,) = torch.autograd.grad(sum_, hidden, create_graph=True)
    return loss_of(sum_ + gradient.square().sum(), batch["labels"])


def weight_penalty(model: Network, batch: Batch) -> mb.Loss:
    """Penalise each row's gradient with respect to a weight that is fused, and to the embedding."""
    sums: list[Tensor] = []
    for tokens, labels in rows_of(batch):
        sum_ = total_of(model, model.embedding(tokens), labels)
        weights = [first_weight(model), model.embedding.weight]
        gradients = torch.autograd.grad(sum_, weights, create_graph=True)
        sums.append(sum_ + sum((each.square().sum() for each in gradients), torch.zeros_like(sum_)))
    return loss_of(torch.stack(sums).sum(), batch["labels"])


def weighed_by_gradient(model: Network, batch: Batch) -> mb.Loss:
    """Weigh each row by the length of its gradient."""
    sums: list[Tensor] = []
    for tokens, labels in rows_of(batch):
        sum_ = total_of(model, model.embedding(tokens), labels)
        (gradient,) = torch.autograd.grad(sum_, first_weight(model), retain_graph=True)
        sums.append(sum_ * gradient.norm())
    return loss_of(torch.stack(sums).sum(), batch["labels"])


def by_vmap(model: Network, batch: Batch) -> mb.Loss:
    logits = vmap(lambda tokens: model(tokens.unsqueeze(0)).squeeze(0))(batch["tokens"])
    sum_ = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    return loss_of(sum_, batch["labels"])


def by_func_grad(model: Network, batch: Batch) -> mb.Loss:
    """Weigh each row by its gradient's length, by torch.func."""

    def one(parameters: Mapping[str, Tensor], tokens: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(model, dict(parameters), (tokens.unsqueeze(0),)).squeeze(0)
        return F.cross_entropy(logits, labels, reduction="sum")

    parameters = dict(model.named_parameters())
    gradients = vmap(torch.func.grad(one), (None, 0, 0))(parameters, batch["tokens"], batch["labels"])
    lengths = gradients["layers.0.inner.weight"].flatten(1).norm(dim=1).detach()
    logits = model(batch["tokens"]).mT
    each = F.cross_entropy(logits, batch["labels"], reduction="none").sum(1)
    return loss_of((each * lengths).sum(), batch["labels"])


def by_functional_call(model: Network, batch: Batch) -> mb.Loss:
    logits = functional_call(model, dict(model.named_parameters()), (batch["tokens"],))
    return loss_of(F.cross_entropy(logits.mT, batch["labels"], reduction="sum"), batch["labels"])


def by_forward_mode(model: Network, batch: Batch) -> mb.Loss:
    """Penalise a directional derivative."""
    hidden = model.embedding(batch["tokens"])
    with fw.dual_level():
        primal, tangent = fw.unpack_dual(model.logits(fw.make_dual(hidden, torch.ones_like(hidden))))
    sum_ = F.cross_entropy(primal.mT, batch["labels"], reduction="sum")
    assert tangent is not None
    return loss_of(sum_ + tangent.square().sum(), batch["labels"])


def by_jvp(model: Network, batch: Batch) -> mb.Loss:
    hidden = model.embedding(batch["tokens"])
    primal, tangent = cast("tuple[Tensor, Tensor]", jvp(model.logits, (hidden,), (torch.ones_like(hidden),)))
    sum_ = F.cross_entropy(primal.mT, batch["labels"], reduction="sum")
    return loss_of(sum_ + tangent.square().sum(), batch["labels"])


def on_the_host(model: Network, batch: Batch) -> mb.Loss:
    with save_on_cpu():
        return token_loss(model, batch)


def packed(model: Network, batch: Batch) -> mb.Loss:
    with saved_tensors_hooks(lambda kept: (kept + 1, kept.dtype), lambda held: (held[0] - 1).to(held[1])):
        return token_loss(model, batch)


def validated(model: Network, batch: Batch) -> mb.Loss:
    """Look at the model before and after, without a graph, and with one that is thrown away."""
    with torch.no_grad():
        model(batch["tokens"])
    model(batch["tokens"])
    loss = token_loss(model, batch)
    with torch.inference_mode():
        model(batch["tokens"])
    return loss


def implicit(model: Network, batch: Batch) -> mb.Loss:
    """Ask for a gradient inside of backward, as layers do that are defined by an equation."""
    hidden = model.embedding(batch["tokens"])
    with torch.enable_grad():
        start = hidden.detach().requires_grad_()
        moved_on = model.layers[0](start)

    def solve(gradient: Tensor) -> Tensor:
        return gradient + torch.autograd.grad(moved_on, start, gradient, retain_graph=True)[0]

    hidden.register_hook(solve)
    return loss_of(total_of(model, hidden, batch["labels"]), batch["labels"])


LOSSES: dict[str, Callable[[Any, Batch], mb.Loss]] = {
    "plain": token_loss,
    "gradient penalty": input_penalty,
    "penalty on a weight's gradient": weight_penalty,
    "autograd.grad": weighed_by_gradient,
    "vmap": by_vmap,
    "func.grad": by_func_grad,
    "functional_call": by_functional_call,
    "forward mode": by_forward_mode,
    "func.jvp": by_jvp,
    "save_on_cpu": on_the_host,
    "saved_tensors_hooks": packed,
    "validation": validated,
    "autograd.grad inside of backward": implicit,
}

TRANSFORMED = {"vmap", "func.grad", "forward mode", "func.jvp"}


def meaned(loss_fn: Callable[[Any, Batch], mb.Loss]) -> Callable[[nn.Module, Batch], Tensor]:
    return lambda model, batch: loss_fn(model, batch).mean


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # by torch's own forward mode
@through_each_door
@on_each_device
@pytest.mark.parametrize("name", LOSSES)
@fewer
@given(
    kinds=st.lists(st.sampled_from(SIMPLE), min_size=1, max_size=3),
    tied=st.booleans(),
    targets=TARGETS,
    size=SIZES,
    seed=SEEDS,
)
@example(kinds=["linear"], tied=False, targets=[8, 1, 0, 2, 5], size=2, seed=0)
def test_losses_that_differentiate_by_themselves(
    door: Door, device: str, name: str, kinds: list[str], tied: bool, targets: list[int], size: int, seed: int
) -> None:
    if name in TRANSFORMED:
        kinds = [kind for kind in kinds if kind != "checkpoint"]  # which torch cannot transform
        kinds, targets = kinds or ["linear"], [max(1, count) for count in targets]  # without labels, a term is left
    model, batch = network(kinds, seed, device, tied=tied), sentences(seed, targets)
    reference = full_batch(model, meaned(LOSSES[name]), batch)
    fused, plain = both(model, size=size)
    for it in (plain, fused):
        door(it, batch, LOSSES[name], size=size)
        assert relative_error(it.updates[0], reference) <= (1e-9 if name == "saved_tensors_hooks" else EXACT)
    if name not in {"plain", "vmap", "functional_call", "save_on_cpu", "saved_tensors_hooks", "validation"}:
        assert relative_error(full_batch(model, token_mean, batch), reference) > WRONG


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # by torch's own forward mode
@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_differentiate_by_themselves_under_autocast(name: str) -> None:
    model, batch = network(["linear", "twice"], dtype=torch.float32), sentences(0, RAGGED)
    reference = full_batch(model, meaned(LOSSES[name]), batch)
    fused, plain = both(model, size=2, autocast=torch.bfloat16)
    for it in (fused, plain):
        it.accumulator.step(batch, LOSSES[name])
    own, unit = relative_error(plain.updates[0], reference), torch.finfo(torch.bfloat16).eps
    assert own < 0.1
    assert relative_error(fused.updates[0], reference) <= own + 2 * unit


def test_by_hand_a_gradient_that_is_only_asked_for_is_added() -> None:
    model, batch = network(["linear"]), sentences(0, RAGGED)
    reference = full_batch(model, meaned(implicit), batch)
    assert relative_error(naively(model, batch, tell=False, loss=implicit), reference) > WRONG


# -- hooks ---------------------------------------------------------------------------------------------------------

Seen = list[tuple[str, Tensor | None]]
Watch = Callable[[nn.Module, Seen], object]


def copied(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach().clone()


def after_accumulation(model: nn.Module, seen: Seen) -> object:
    def watch(name: str, parameter: Tensor) -> None:
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append((name, copied(p.grad))))

    return [watch(name, parameter) for name, parameter in model.named_parameters()]


def nodes_of(model: nn.Module) -> dict[str, Any]:
    return {
        name: cast("Any", parameter.view_as(parameter).grad_fn).next_functions[0][0]
        for name, parameter in model.named_parameters()
    }


def after_the_node(model: nn.Module, seen: Seen) -> object:
    nodes = nodes_of(model)

    def watch(name: str, node: Any) -> None:
        node.register_hook(lambda *_: seen.append((name, copied(model.get_parameter(name).grad))))

    for name, node in nodes.items():
        watch(name, node)
    return nodes


def before_the_node(model: nn.Module, seen: Seen) -> object:
    nodes = nodes_of(model)

    def watch(name: str, node: Any) -> None:
        node.register_prehook(lambda grads: seen.append((name, None if grads[0] is None else torch.ones(1))))

    for name, node in nodes.items():
        watch(name, node)
    return nodes


def of_several(model: nn.Module, seen: Seen) -> object:
    register_multi_grad_hook(
        [*model.parameters()], lambda grads: seen.append((str([not isinstance(each, Tensor) for each in grads]), None))
    )
    return None


def of_modules(model: nn.Module, seen: Seen) -> object:
    def watch(name: str, module: nn.Module) -> None:
        def note(_: nn.Module, inputs: Any, outputs: Any) -> None:
            seen.extend((name, copied(each)) for each in (*inputs, *outputs))

        module.register_full_backward_hook(note)

    return [watch(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Network)]


def of_tensors(model: nn.Module, seen: Seen) -> object:
    def watch(name: str, parameter: Tensor) -> None:
        parameter.register_hook(lambda grad: seen.append((name, copied(grad))))

    return [watch(name, parameter) for name, parameter in model.named_parameters()]


HOOKS: dict[str, Watch] = {
    "post-accumulate": after_accumulation,
    "AccumulateGrad": after_the_node,
    "before AccumulateGrad": before_the_node,
    "several": of_several,
    "module": of_modules,
    "tensor": of_tensors,
}


def watched(
    watch: Watch, kinds: list[str], *, tied: bool, fuse: bool, dtype: torch.dtype, batch: Batch, size: int, door: Door
) -> tuple[Seen, Gradients]:
    model, seen = network(kinds, 1, "cpu", dtype, tied=tied), cast("Seen", [])
    kept = watch(model, seen)
    it = subject(model, SGD(model.parameters(), lr=0.0), size=size, sums=mb.Sums(fuse=fuse))
    door(it, batch, token_loss, size=size)
    del kept
    return seen, it.updates[0]


@through_each_door
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@fewer
@given(
    kinds=st.lists(st.sampled_from([*SIMPLE, "norm", "reentrant"]), min_size=1, max_size=3),
    tied=st.booleans(),
    targets=TARGETS,
    size=SIZES,
)
@example(kinds=["twice"], tied=True, targets=[8, 1, 2, 5], size=1)
def test_hooks_fire_as_often_and_see_the_same(
    door: Door, hook: str, dtype: torch.dtype, kinds: list[str], tied: bool, targets: list[int], size: int
) -> None:
    if hook == "several":  # whose calls depend on the order of nodes, and a backward within one has its own
        kinds = ["linear" if kind == "reentrant" else kind for kind in kinds]
    batch = sentences(0, targets)
    (seen, fused), (expected, plain) = (
        watched(HOOKS[hook], kinds, tied=tied, fuse=fuse, dtype=dtype, batch=batch, size=size, door=door)
        for fuse in (True, False)
    )
    assert len(expected) > 0
    assert sorted(name for name, _ in seen) == sorted(name for name, _ in expected)
    close = EXACT if dtype == torch.float64 else 0.05
    assert relative_error(fused, plain) <= close
    for name in {name for name, _ in expected}:
        pairs = zip([g for n, g in seen if n == name], [g for n, g in expected if n == name], strict=True)
        for got, want in pairs:
            # The sum of a narrow weight is not autograd's: to a hook before its node, there is nothing to see.
            if hook != "before AccumulateGrad" or dtype == torch.float64:
                assert (got is None) == (want is None)
            if got is not None and want is not None:
                assert (got - want).abs().max() <= 10 * close * (1 + want.abs().max())


@pytest.mark.parametrize("hook", ["tensor", "before AccumulateGrad"])
def test_by_hand_hooks_see_nothing(hook: str) -> None:
    model, batch, seen = network(["linear"]), sentences(0, RAGGED), cast("Seen", [])
    kept = HOOKS[hook](model, seen)
    for piece in pieces_of(batch, 2):
        with Naive(tell=False):
            loss = token_loss(model, piece)
        loss.sum.backward()
    del kept
    assert "embedding.weight" in {name for name, _ in seen}
    given = [grad for name, grad in seen if name == "head.weight"]
    assert given == [None] * len(given)


@through_each_door
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "twice", "embedding"])
def test_a_tensor_hook_that_changes_the_gradient(door: Door, late: bool, dtype: torch.dtype, kind: str) -> None:
    """It has to be given this microbatch's gradient and not the sum, also if it comes after the forward."""

    def run(*, fuse: bool) -> Gradients:
        model, batch = network([kind], 1, "cpu", dtype), sentences(0, RAGGED)
        weight, held = first_weight(model), cast("list[Any]", [])

        def hooked() -> None:
            held.append(weight.register_hook(lambda gradient: gradient * 2))

        def loss_fn(model: nn.Module, batch: Batch) -> mb.Loss:
            while held and late:
                held.pop().remove()
            loss = token_loss(model, batch)
            if late:
                hooked()
            return loss

        if not late:
            hooked()
        it = subject(model, SGD(model.parameters(), lr=0.0), size=2, sums=mb.Sums(fuse=fuse))
        door(it, batch, loss_fn, size=2)
        return it.updates[0]

    model, batch = network([kind], 1, "cpu", dtype), sentences(0, RAGGED)
    reference = full_batch(model, token_mean, batch)
    doubled = {**reference, "layers.0.inner.weight": reference["layers.0.inner.weight"] * 2}
    close = EXACT if dtype == torch.float64 else 0.05
    assert relative_error(run(fuse=False), doubled) <= close
    assert relative_error(run(fuse=True), doubled) <= close
    assert relative_error(reference, doubled) > 2 * close


def test_a_weight_with_a_hook_is_said_not_to_be_fused() -> None:
    model = network(["linear"])
    first_weight(model).register_hook(lambda _: None)
    it = subject(model, SGD(model.parameters(), lr=0.0), size=2, sums=mb.Sums(fuse=True))
    step = it.accumulator.step(sentences(0, RAGGED), token_loss)
    assert it.accumulator.fusion()["layers.0.inner.weight"] != "fused"
    assert it.accumulator.fusion()["head.weight"] == "fused"
    assert step.fused == 2


def test_a_hook_that_takes_gradients_away() -> None:
    def run(*, fuse: bool) -> tuple[list[Tensor], Gradients]:
        model, taken = network(["twice"], tied=True), cast("list[Tensor]", [])

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            taken.append(parameter.grad)
            parameter.grad = None

        model.embedding.weight.register_post_accumulate_grad_hook(take)
        it = subject(model, SGD(model.parameters(), lr=0.0), size=2, sums=mb.Sums(fuse=fuse))
        it.accumulator.step(sentences(0, RAGGED), token_loss)
        return taken, it.updates[0]

    (taken, rest), (expected, expected_rest) = run(fuse=True), run(fuse=False)
    assert relative_error(dict(enumerate(taken)), dict(enumerate(expected))) <= EXACT  # type: ignore[arg-type]
    assert relative_error(rest, expected_rest) <= EXACT
    assert len(taken) == 3
    assert "embedding.weight" not in rest
    assert relative_error({"": taken[0]}, {"": taken[1]}) > WRONG


# -- what else people do -------------------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Iterator[None]:
    """Leave no compiled code to the next test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("what", ["model", "layer", "head", "loss"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_compiled_regions(what: str, autocast: torch.dtype | None, compiler: None) -> None:
    dtype = torch.float64 if autocast is None else torch.float32
    model, batch = network(["linear", "twice"], 1, "cpu", dtype, tied=True), sentences(0, RAGGED)
    reference = full_batch(model, token_mean, batch)
    fused, plain = both(model, size=2, autocast=autocast)
    loss_fn: Any = token_loss
    for it in (fused, plain):
        module = cast("Any", it.model)
        if what == "loss":
            loss_fn = torch.compile(token_mean, backend="aot_eager")
        elif what == "model":
            module.compile(backend="aot_eager")
        else:
            (module.layers[0] if what == "layer" else module.head).compile(backend="aot_eager")
        if what == "loss":
            full = sentences(0, [8, 8, 8, 8])
            reference = full_batch(model, token_mean, full)
            it.accumulator.step(full, lambda model, batch, run=loss_fn: run(model, batch))
        else:
            for _ in range(2):
                it.accumulator.step(batch, token_loss)
    close = EXACT if autocast is None else 0.05
    for update in [*fused.updates, *plain.updates]:
        assert relative_error(update, reference) <= close


class BrokenError(RuntimeError):
    """What a backward of the user's raises."""


class Breaks(torch.autograd.Function):
    """Pass forward, and raise on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - autograd's form
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004 - likewise
        raise BrokenError


@through_each_door
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_an_exception_in_the_middle_of_backward(door: Door, dtype: torch.dtype) -> None:
    model, batch = network(["linear", "twice"], 1, "cpu", dtype), sentences(0, [8, 1, 2, 5])
    reference = full_batch(model, token_mean, batch)
    it = subject(model, SGD(model.parameters(), lr=0.0), size=1, sums=mb.Sums(fuse=True))
    before = {name: torch.ones_like(each) for name, each in model.named_parameters()}
    for name, each in model.named_parameters():
        each.grad = before[name]
    calls: list[int] = []

    def loss_fn(model: Any, batch: Batch) -> mb.Loss:
        calls.append(1)
        hidden = model.embedding(batch["tokens"])
        if len(calls) == 3:
            hidden = Breaks.apply(hidden)
        return loss_of(total_of(model, hidden, batch["labels"]), batch["labels"])

    with pytest.raises(BrokenError):
        door(it, batch, loss_fn, size=1)
    for name, each in model.named_parameters():
        assert each.grad is before[name]
        assert before[name].min() == before[name].max() == 1
    step = door(it, batch, loss_fn, size=1)
    assert step.fused == 4
    close = EXACT if dtype == torch.float64 else 0.05
    assert relative_error(it.updates[-1], reference) <= close
    assert relative_error({name: grad + 1 for name, grad in it.updates[-1].items()}, reference) > 2 * close


@through_each_door
@few
@given(kinds=st.lists(st.sampled_from(SIMPLE), max_size=2), tied=st.booleans(), targets=TARGETS, size=SIZES)
def test_somebody_who_keeps_the_gradient(
    door: Door, kinds: list[str], tied: bool, targets: list[int], size: int
) -> None:
    model, batch = network(kinds, tied=tied), sentences(0, targets)
    kept: list[Any] = []

    def loss_fn(model: nn.Module, batch: Batch) -> mb.Loss:
        kept.extend(each.grad for each in model.parameters())
        kept.extend(None if each.grad is None else each.grad.view(-1) for each in model.parameters())
        return token_loss(model, batch)

    it = subject(model, size=size, sums=mb.Sums(fuse=True))
    door(it, batch, loss_fn, size=size)
    assert relative_error(it.updates[0], full_batch(model, token_mean, batch)) <= EXACT
    assert relative_error(it.updates[0], full_batch(network(kinds, 1, tied=tied), token_mean, batch)) > WRONG


def test_windows_of_two_accumulators() -> None:
    """One inside the other, and one after another with the same model in both."""
    models, batch = [network(["linear"], seed, tied=True) for seed in (0, 1)], sentences(0, [8, 1, 2, 5])
    references = [full_batch(model, token_mean, batch) for model in models]
    runs = [subject(model, size=1, sums=mb.Sums(fuse=True)) for model in models]
    with runs[0].accumulator.window() as outer, runs[1].accumulator.window() as inner:
        for left, right in zip(outer.split(batch), inner.split(batch), strict=True):
            outer.backward(token_loss(runs[0].model, left))
            inner.backward(token_loss(runs[1].model, right))
    assert [relative_error(it.updates[0], each) <= EXACT for it, each in zip(runs, references, strict=True)] == [
        True
    ] * 2
    pieces = pieces_of(batch, 1)
    loaders = [it.accumulator.windows(pieces * 2, microbatches=4) for it in runs]
    for outer, inner in zip(*loaders, strict=True):
        for left, right in zip(outer, inner, strict=True):
            outer.backward(token_loss(runs[0].model, left))
            inner.backward(token_loss(runs[1].model, right))
    for it, each in zip(runs, references, strict=True):
        assert [relative_error(update, each) <= EXACT for update in it.updates] == [True] * 3
    assert [it.accumulator.fusion()["head.weight"] for it in runs if "head.weight" in it.accumulator.fusion()] == []
    assert torch._C._len_torch_function_stack() == 0
    assert relative_error(runs[0].updates[0], references[1]) > WRONG


def test_a_bias_for_every_row() -> None:
    """F.linear takes it, for two dimensions."""

    def loss(model: Any, batch: Batch) -> Tensor:
        return F.linear(batch["x"], model.weight, batch["x"] * model.bias).square().sum(1).mean()

    model, batch = filled(nn.Linear(4, 4), 0, "cpu"), {"x": numbers(0, 5, 4)}
    for it in (*both(model, size=2)[::-1],):
        it.accumulator.step(batch, loss)
        assert relative_error(it.updates[0], full_batch(model, loss, batch)) <= EXACT
        assert relative_error(it.updates[0], full_batch(model, lambda m, b: loss(m, b) * 2, batch)) > WRONG


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_bias_for_all_outputs(shape: tuple[int, ...]) -> None:
    def loss(model: Any, batch: Batch) -> Tensor:
        return F.linear(batch["x"], model.weight, model.bias).square().sum(1).mean()

    model: Any = filled(nn.Linear(4, 4), 0, "cpu")
    model.bias = nn.Parameter(torch.full(shape, 0.5, dtype=torch.float64))
    batch = {"x": numbers(0, 5, 4)}
    it = subject(model, size=2, sums=mb.Sums(fuse=True))
    it.accumulator.step(batch, loss)
    assert (it.accumulator.fusion()["weight"] == "fused") == (len(shape) == 1)
    assert relative_error(it.updates[0], full_batch(model, loss, batch)) <= EXACT
    assert relative_error(it.updates[0], full_batch(model, lambda m, b: loss(m, b) * 2, batch)) > WRONG


def test_a_weight_whose_forward_is_thrown_away_is_not_said_to_be_fused() -> None:
    model, batch = network(["linear"]), sentences(0, RAGGED)

    def loss_fn(model: Any, batch: Batch) -> mb.Loss:
        hidden = model.embedding(batch["tokens"])
        model.layers[0](hidden)
        return loss_of(F.cross_entropy(model.head(hidden).mT, batch["labels"], reduction="sum"), batch["labels"])

    it = subject(model, size=2, sums=mb.Sums(fuse=True))
    step = it.accumulator.step(batch, loss_fn)
    assert it.accumulator.fusion()["layers.0.inner.weight"] != "fused"
    assert step.fused == 2


# -- memory --------------------------------------------------------------------------------------------------------

SIDE = 768  # so that a weight is larger than those whose narrow products are made whole


class Large(nn.Module):
    """Layers whose weights are far larger than the activations of a row."""

    def __init__(self, layers: int, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2 * SIDE, SIDE)
        self.layers = nn.ModuleList([nn.Linear(SIDE, SIDE) for _ in range(layers)])
        self.head = nn.Linear(SIDE, 2 * SIDE, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return self.head(hidden)


def large(layers: int, dtype: torch.dtype, *, tied: bool = False) -> nn.Module:
    return filled(Large(layers, tied=tied), 0, "cpu", dtype)


@pytest.fixture
def as_it_is(monkeypatch: pytest.MonkeyPatch, everything_is_large: None) -> None:
    """Fuse what is fused outside of these tests."""
    monkeypatch.undo()


def ids(rows: int) -> Batch:
    return {"tokens": torch.arange(4 * rows).view(rows, 4) % (2 * SIDE), "labels": torch.zeros(rows, 4).long()}


def metered(it: Subject, batch: Batch) -> int:
    with mb.MemoryMeter() as meter:
        meter.track(it.model, batch)
        it.accumulator.step(batch, token_loss)
    return meter.peak_bytes


def allocated(it: Subject, batch: Batch) -> int:
    """Count every allocation, also those inside of operators."""
    return allocated_peak(lambda: it.accumulator.step(batch, token_loss))


def tidy(_: object) -> None:
    """Collect what the checks of types, which are there in tests only, hold in cycles."""
    gc.collect(0)


@pytest.mark.parametrize("count", [metered, allocated])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", NARROW)
def test_the_peak_is_never_above_plain(
    count: Any, rows: int, layers: int, tied: bool, precision: str, as_it_is: None
) -> None:
    dtype, autocast = NARROW[precision]
    model, batch = large(layers, dtype, tied=tied), ids(rows)
    fused, plain = (
        # Not as `subject` does, which keeps copies of the gradients.
        Subject(
            twin,
            o,
            mb.Accumulator(twin, o, microbatch_size=1, autocast=autocast, sums=mb.Sums(fuse=fuse), listeners=[tidy]),
            [],
        )
        for fuse in (True, False)
        for twin in [copy.deepcopy(model)]
        for o in [SGD(twin.parameters(), lr=0.0)]
    )
    activations = 65_536  # a few rows of activations more or less are not what is meant
    assert count(fused, batch) <= count(plain, batch) + activations


@pytest.mark.parametrize("count", [metered, allocated])
def test_the_peak_is_lower_by_the_largest_weight(count: Any, as_it_is: None) -> None:
    model, batch = nn.Linear(1024, 1024), {"x": torch.randn(3, 1024)}

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"]).square().mean()

    peaks: list[int] = []
    for fuse in (True, False):
        twin = copy.deepcopy(model)
        accumulator = mb.Accumulator(twin, SGD(twin.parameters(), lr=0.0), microbatch_size=1, sums=mb.Sums(fuse=fuse))
        if count is metered:
            with mb.MemoryMeter() as meter:
                accumulator.step(batch, loss_fn)
            peaks.append(meter.peak_bytes)
        else:
            peaks.append(allocated_peak(partial(accumulator.step, batch, loss_fn)))
    weight = 4 * 1024 * 1024
    assert peaks[1] - peaks[0] == pytest.approx(weight, rel=0.05)


@pytest.mark.parametrize("count", [metered, allocated])
@pytest.mark.parametrize("tokens", [32, 256])
def test_memory_used_again_is_part_of_the_peak_anyway(
    count: Any, tokens: int, as_it_is: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microbatch.gradients.fused_functions._MANY_OUTPUTS", 2 * SIDE)
    monkeypatch.setattr("microbatch.loss.tiled_cross_entropy._IN_CACHE", 2 * SIDE)
    model, batch = large(3, torch.float32), ids(tokens)
    batch = {name: each.view(4, tokens) for name, each in batch.items()}
    peaks: list[int] = []
    for used_again in (True, False):
        monkeypatch.setattr("microbatch.memory.scratch.SMALLEST", 1 if used_again else 1 << 60)
        if not used_again:
            monkeypatch.setattr("microbatch.gradients.fused_matmul.Fuse.is_final", lambda _: False)
        twin = copy.deepcopy(model)
        optimizer = SGD(twin.parameters(), lr=0.0)
        accumulator = mb.Accumulator(twin, optimizer, microbatch_size=1, listeners=[tidy])
        peaks.append(count(Subject(twin, optimizer, accumulator, []), batch))
    assert peaks[0] <= peaks[1] + 4096


class Between:
    """Profile from the end of one microbatch to the end of another."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.recorder = recorder()

    def __call__(self, event: object) -> None:
        """Switch on and off."""
        if isinstance(event, mb.MicrobatchDone) and event.index == self.first:
            self.recorder.start()
        if isinstance(event, mb.MicrobatchDone) and event.index == self.last:
            self.recorder.stop()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("fuse", [True, False])
def test_nothing_as_large_as_a_weight_is_allocated_after_the_first_microbatch(
    tied: bool, precision: str, fuse: bool, as_it_is: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microbatch.products.PIECE", SIDE * SIDE // 8)  # a smaller weight is one piece
    dtype, autocast = NARROW[precision]
    guard = Between(0 if autocast is None else 1, 4)  # casts are kept from the second on
    it = subject(large(3, dtype, tied=tied), size=1, sums=mb.Sums(fuse=fuse), autocast=autocast, listeners=[guard])
    it.accumulator.step(ids(5), token_loss)
    sizes = [size for size in changes(guard.recorder) if size > 0]
    smallest = SIDE * SIDE * min(torch.finfo(autocast or dtype).bits, torch.finfo(dtype).bits) // 8
    large_ones = [size for size in sizes if size >= smallest]
    assert len(sizes) > 10
    if fuse:
        assert large_ones == []
    else:
        assert len(large_ones) >= 3 * 3


def test_small_and_odd_weights_are_said_to_be_left_alone(as_it_is: None) -> None:
    model: Any = large(1, torch.float32)
    model.layers[0] = nn.Linear(SIDE, SIDE, bias=True)
    model.small = nn.Linear(4, 4)
    it = subject(model, size=1, sums=mb.Sums(fuse=True))
    step = it.accumulator.step(ids(2), token_loss)
    report = it.accumulator.fusion()
    assert step.fused == 3
    assert report["layers.0.weight"] == report["embedding.weight"] == report["head.weight"] == "fused"
    assert "1 dimension" in report["layers.0.bias"]
    assert "small" in report["small.weight"]


def test_models_of_many_small_modules_are_left_alone(as_it_is: None) -> None:
    def fused(number: int) -> tuple[int, str]:
        model: Any = large(1, torch.float32)
        model.layers.extend(nn.Identity() for _ in range(number - len(list(model.modules()))))
        it = subject(model, size=1, sums=mb.Sums(fuse=True))
        return it.accumulator.step(ids(2), token_loss).fused, it.accumulator.fusion()["head.weight"]

    each = (1 << 18) // 16
    number = sum(p.numel() for p in large(1, torch.float32).parameters() if p.ndim == 2) // each
    assert fused(number) == (3, "fused")
    none, why = fused(number + 1)
    assert none == 0
    assert f"fewer than {each:,} such elements for each module" in why
