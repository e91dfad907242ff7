"""Dropout by row: with dropout too, the gradient is the full batch's, whatever the cut."""

import copy
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from microbatch.errors import ConfigError
from microbatch.gradients import fused_matmul

from .reference import (
    EXACT,
    WRONG,
    Batch,
    Door,
    Gradients,
    few,
    filled,
    gradients_of,
    numbers,
    on_each_device,
    relative_error,
    subject,
    through_each_door,
)

SEEDS = st.integers(0, 2**16)
COLUMNS = 4


class Net(nn.Module):
    """Drop out in every way that a mask can be seen from outside: elements, channels, alpha, attention."""

    def __init__(self, *, again: str = "never") -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        """Return shape ``(rows, columns, 2)``."""
        hidden = F.dropout(self.inside(x).tanh(), 0.3, self.training)
        if self.again == "never":
            hidden = self.block(hidden)
        else:
            hidden = checkpoint(self.block, hidden, use_reentrant=self.again == "reentrant")
        return self.head(F.alpha_dropout(hidden, 0.25, self.training))

    def block(self, hidden: Tensor) -> Tensor:
        layers, rate = (self.query, self.key, self.value), 0.2 if self.training else 0.0
        query, key, value = (layer(hidden).unflatten(-1, (2, 4)).transpose(1, 2) for layer in layers)
        heads = F.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        hidden = hidden + heads.transpose(1, 2).flatten(2)
        return F.dropout1d(hidden.tanh(), 0.4, self.training)


def net(seed: int, device: str, **options: Any) -> nn.Module:
    return filled(Net(**options), seed, device).train()


def batch_of(seed: int, rows: int) -> Batch:
    return {"x": numbers(seed + 1, rows, COLUMNS, 3), "y": numbers(seed + 2, rows, COLUMNS, 2)}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def kept_of(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Ask a dropout function which elements it keeps, with one call of it."""
    if func is F.scaled_dot_product_attention:
        query, key, _ = args
        unit = torch.eye(key.shape[-2], dtype=query.dtype, device=query.device).expand(*key.shape[:-2], -1, -1)
        return func(query, key, unit, **kwargs) != 0
    if func is F.alpha_dropout:
        out = func(torch.zeros_like(args[0]), **kwargs)
        return out > 0  # what is dropped falls to the floor, and the mean is kept
    return func(torch.ones_like(args[0]), **kwargs) != 0


def applied(func: Any, args: Any, kwargs: Any, kept: Tensor) -> Tensor:
    """Drop out by a mask, as the documentation of torch has it."""
    if func is F.scaled_dot_product_attention:
        query, key, value = args
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return (weights * kept / (1 - kwargs["dropout_p"])) @ value
    x, p = args[0], kwargs["p"]
    if func is F.alpha_dropout:
        floor = -1.0507009873554805 * 1.6732632423543772
        a = ((1 - p) * (1 + p * floor**2)) ** -0.5
        return a * torch.where(kept, x, floor) - a * p * floor
    return x * kept / (1 - p)


class Masks(TorchFunctionMode):
    """Write down the masks of every call, or drop out by those that were written down."""

    def __init__(self, given: list[Tensor] | None = None) -> None:
        super().__init__()
        self.given = given
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in {F.dropout, F.dropout1d, F.alpha_dropout, F.scaled_dot_product_attention}:
            return func(*args, **kwargs)
        if self.given is not None:
            return applied(func, args, kwargs, self.given.pop(0))
        kept = kept_of(func, args, kwargs)
        self.seen.append(kept)
        return applied(func, args, kwargs, kept)


def masks_by_row(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Run the batch row by row, and put the masks of each call together."""
    it, seen = subject(copy.deepcopy(model), dropout="by_row"), list[list[Tensor]]()

    def noted(model: nn.Module, piece: Batch) -> Tensor:
        with Masks() as masks:
            value = loss(model, piece)
        seen.append(masks.seen)
        return value

    it.accumulator.step(batch, noted)
    return [torch.cat(masks) for masks in zip(*seen, strict=True)]


def reference_of(model: nn.Module, batch: Batch, masks: list[Tensor]) -> Gradients:
    """Return the full batch's gradient under given masks, by plain PyTorch."""
    twin = copy.deepcopy(model)
    if isinstance(twin, Net):
        twin.again = "never"
    device = next(twin.parameters()).device
    with Masks([*masks]):
        loss(twin, {name: each.to(device) for name, each in batch.items()}).backward()
    return gradients_of(twin)


# -- the law -------------------------------------------------------------------------------------------------------


@on_each_device
@few
@given(
    rows=st.integers(1, 7),
    size=st.integers(1, 7),
    again=st.sampled_from(["never", "reentrant", "not reentrant"]),
    fused=st.booleans(),
    seed=SEEDS,
)
@example(rows=7, size=3, again="not reentrant", fused=False, seed=0)
@example(rows=7, size=3, again="reentrant", fused=True, seed=0)
@example(rows=7, size=7, again="never", fused=True, seed=1)
def test_the_full_batchs_gradient_under_the_same_masks(
    device: str, rows: int, size: int, again: str, fused: bool, seed: int
) -> None:
    model, batch = net(seed, device, again=again), batch_of(seed, rows)
    torch.manual_seed(seed)
    masks = masks_by_row(net(seed, device), batch)
    reference = reference_of(model, batch, masks)
    torch.manual_seed(seed)
    with smallest(1 if fused else 1 << 18):
        it = subject(model, size=size, dropout="by_row", sums=mb.Sums(fuse=fused))
        it.accumulator.step(batch, loss)
    assert relative_error(it.updates[0], reference) <= EXACT


@contextmanager
def smallest(elements: int) -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_matmul, "SMALLEST", elements)
        yield


@on_each_device
@pytest.mark.parametrize("seed", range(3))
def test_ordinary_dropout_is_rejected_by_the_same_comparison(device: str, seed: int) -> None:
    model, batch = net(seed, device), batch_of(seed, 6)
    reference = reference_of(model, batch, masks_by_row(model, batch))
    for size in (1, 2, 6):
        it = subject(model, size=size)
        it.accumulator.step(batch, loss)
        assert relative_error(it.updates[0], reference) > WRONG


def encoded(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).mean(1)


def contrasted(_: nn.Module, z: Tensor) -> Tensor:
    """Return a loss that couples samples, and drops out itself."""
    z = F.dropout(z, 0.3)
    return (z @ z.T).logsumexp(1).mean()


@on_each_device
@pytest.mark.parametrize("way", ["twice", "keep"])
@pytest.mark.parametrize("again", ["never", "not reentrant"])
def test_a_loss_that_couples_samples(device: str, way: str, again: str) -> None:
    model, batch, seen = net(0, device), batch_of(0, 6), list[list[Tensor]]()

    def noted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any) -> Tensor:
            with Masks() as masks:
                value = function(*args)
            seen.append(masks.seen)
            return value

        return wrapped

    alone = subject(model, dropout="by_row", coupled="keep")
    alone.accumulator.step(batch, noted(contrasted), encode=noted(encoded))
    *rows, own = seen
    twin = copy.deepcopy(model)
    with Masks([*(torch.cat(masks) for masks in zip(*rows, strict=True)), *own]):
        contrasted(twin, encoded(twin, {"x": batch["x"].to(device)})).backward()
    for size in (1, 4, 6):
        it = subject(net(0, device, again=again), size=size, dropout="by_row", coupled=way)
        it.accumulator.step(batch, contrasted, encode=encoded)
        assert relative_error(it.updates[0], gradients_of(twin)) <= EXACT
    ordinary = subject(model, size=4, coupled=way)
    ordinary.accumulator.step(batch, contrasted, encode=encoded)
    assert relative_error(ordinary.updates[0], gradients_of(twin)) > WRONG


def test_a_loss_of_the_whole_batch_has_no_masks_of_an_encoders() -> None:
    seen: list[Tensor] = []

    def drop(z: Tensor) -> Tensor:
        seen.append(F.dropout(torch.ones(len(z), 64)))
        return z

    def encode(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model.head(model.inside(drop(batch["x"])))[:, 0]

    it = subject(net(0, "cpu"), size=5, dropout="by_row", coupled="keep")
    it.accumulator.step(batch_of(0, 5), lambda _, z: drop(z).square().mean(), encode=encode)
    assert 0.3 < (seen[0] == seen[1]).double().mean().item() < 0.7


@through_each_door
@on_each_device
def test_through_every_door_that_hands_rows_out(door: Door, device: str) -> None:
    model, batch = net(0, device), batch_of(0, 5)
    whole = subject(model, size=5, dropout="by_row")
    whole.accumulator.step(batch, loss)
    it = subject(model, size=2, dropout="by_row")
    if door.__name__ == "by_count":
        with pytest.raises(ConfigError, match="which rows of the batch"):
            door(it, batch, loss, size=2)
        return
    door(it, batch, loss, size=2)
    assert relative_error(it.updates[0], whole.updates[0]) <= EXACT


@on_each_device
def test_a_second_batch_in_the_window_is_numbered_on(device: str) -> None:
    model, batch = net(0, device), batch_of(0, 5)
    whole, it = subject(model, size=5, dropout="by_row"), subject(model, size=2, dropout="by_row")
    whole.accumulator.step(batch, loss)
    with it.accumulator.window() as window:
        for rows in (slice(3), slice(3, 5)):
            for piece in window.split({name: each[rows] for name, each in batch.items()}):
                window.backward(loss(it.model, piece))
    assert relative_error(it.updates[0], whole.updates[0]) <= EXACT


class Kinds(nn.Module):
    """Drop out in the ways whose masks stay inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return shape ``(rows, columns, 2)``."""
        hidden = torch.cat([x, x[..., :1]], -1).tanh()
        deep = hidden.new_empty(len(hidden), 1, 1).bernoulli_(0.6).div_(0.6)  # as timm drops whole branches
        hidden = hidden + deep * self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        hidden = torch.dropout(hidden, 0.2, train=True)
        hidden = F.feature_alpha_dropout(hidden.unsqueeze(-1), 0.2, training=True)
        return self.head(F.dropout2d(hidden, 0.2, inplace=True).squeeze(-1))


@on_each_device
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_other_kinds_do_not_depend_on_the_cut_either(device: str, size: int) -> None:
    model, batch = filled(Kinds(), 0, device), batch_of(0, 5)
    whole, it, ordinary = (
        subject(model, size=5, dropout="by_row"),
        subject(model, size=size, dropout="by_row"),
        subject(model, size=size),
    )
    for each in (whole, it, ordinary):
        each.accumulator.step(batch, loss)
    assert relative_error(it.updates[0], whole.updates[0]) <= EXACT
    assert relative_error(ordinary.updates[0], whole.updates[0]) > WRONG


@on_each_device
def test_a_transformer_layer_of_torchs(device: str) -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.2, batch_first=True)
    model, batch = filled(nn.Sequential(nn.Linear(3, 6), layer, nn.Linear(6, 2)), 0, device).train(), batch_of(1, 5)
    whole, it = (subject(model, size=size, dropout="by_row") for size in (5, 2))
    for each in (whole, it):
        each.accumulator.step(batch, loss)
    assert relative_error(it.updates[0], whole.updates[0]) <= EXACT


@on_each_device
@pytest.mark.parametrize("how", ["plain", "causal", "bool", "float", "nowhere", "grouped", "scaled"])
def test_attention_on_the_mathematical_path_is_torchs(device: str, how: str) -> None:
    heads = 4 if how == "grouped" else 2
    query = numbers(0, 3, heads, 5, 4).to(device)
    key, value = (numbers(seed, 3, 2, 5, 4).to(device) for seed in (1, 2))
    options: dict[str, Any] = {}
    if how == "causal":
        options["is_causal"] = True
    elif how == "bool":
        options["attn_mask"] = (numbers(3, 5, 5) > 0).logical_or(torch.eye(5).bool()).to(device)
    elif how == "nowhere":
        options["attn_mask"] = torch.ones(5, 5, dtype=torch.bool, device=device).tril(-1)
    elif how == "float":
        options["attn_mask"] = numbers(3, 3, 1, 5, 5).to(device)
    elif how == "grouped":
        options["enable_gqa"] = True
    elif how == "scaled":
        options["scale"] = 0.3

    def attend(model: nn.Module, batch: Batch) -> Tensor:
        found.append(F.scaled_dot_product_attention(query, key, value, dropout_p=1e-9, **options))
        return model(batch["x"]).square().mean()

    found: list[Tensor] = []
    it = subject(filled(nn.Linear(3, 2), 0, device), size=3, dropout="by_row")
    it.accumulator.step({"x": numbers(0, 3, 3)}, attend)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    assert torch.allclose(found[0], expected, rtol=1e-7, atol=1e-9)


# -- what else goes on in a window -----------------------------------------------------------------------------------


class Padded(nn.Module):
    """Drop out over tokens that may be padding, and attend to those that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the sum over each row's tokens of what is seen there."""
        hidden = F.dropout(self.embedding(tokens), 0.3)
        hidden = F.scaled_dot_product_attention(
            hidden[:, None], hidden[:, None], hidden[:, None], attn_mask=mask[:, None, None].bool(), dropout_p=0.2
        )[:, 0]
        return (self.head(hidden.tanh()) * mask.unsqueeze(-1)).sum(1)


@pytest.mark.filterwarnings("ignore:the loss is a plain mean")
@on_each_device
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_trimming_leaves_every_token_its_mask(device: str, side: str, size: int) -> None:
    lengths = [3, 9, 1, 5, 5, 7]
    used = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    batch = {"tokens": torch.arange(54).view(6, 9) % 11, "mask": (used if side == "right" else used.flip(1)).long()}

    def far(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["tokens"], batch["mask"]).square().mean()

    model = filled(Padded(), 0, device)
    told = mb.Lengths(of="mask", relative_positions=True)
    # From the left a place is known by its distance from the end, and that there is one only by its lengths.
    whole = subject(model, size=6, dropout="by_row", lengths=told if side == "left" else None)
    it, ordinary = subject(model, size=size, dropout="by_row", lengths=told), subject(model, size=size, lengths=told)
    for each in (whole, it, ordinary):
        each.accumulator.step(batch, far)
    assert it.updates[0].keys() == whole.updates[0].keys()
    assert relative_error(it.updates[0], whole.updates[0]) <= EXACT
    assert relative_error(ordinary.updates[0], whole.updates[0]) > WRONG


def test_padding_on_both_sides_is_refused() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]])
    told = mb.Lengths(of="mask", relative_positions=True)
    it = subject(filled(Padded(), 0, "cpu"), dropout="by_row", lengths=told)
    with pytest.raises(ConfigError, match="on one side"):
        it.accumulator.step({"tokens": mask, "mask": mask}, lambda model, batch: model(**batch).square().mean())


@on_each_device
def test_a_window_that_runs_again_has_the_same_masks(device: str) -> None:
    model, batch, ran = net(0, device), batch_of(0, 6), list[int]()

    def fails_once(model: nn.Module, piece: Batch) -> Tensor:
        value = loss(model, piece)
        ran.append(len(piece["x"]))
        if ran == [2, 2]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return value

    it, small = subject(model, size=2, dropout="by_row"), subject(model, size=1, dropout="by_row")
    step = it.accumulator.step(batch, fails_once)
    small.accumulator.step(batch, loss)
    assert step.retries == 1
    assert relative_error(it.updates[0], small.updates[0]) == 0


@on_each_device
def test_every_step_has_masks_of_its_own_and_a_resumed_run_the_same(device: str) -> None:
    model, batch = net(0, device), batch_of(0, 4)
    it = subject(model, dropout="by_row")
    for _ in range(2):
        it.accumulator.step(batch, loss)
    assert relative_error(it.updates[1], it.updates[0]) > WRONG  # the weights stayed
    first = subject(model, dropout="by_row")
    first.accumulator.step(batch, loss)
    state = first.accumulator.state_dict()
    torch.manual_seed(9)
    second = subject(model, size=3, dropout="by_row")
    second.accumulator.load_state_dict(state)
    second.accumulator.step(batch, loss)
    assert relative_error(second.updates[0], it.updates[1]) <= EXACT


@on_each_device
def test_two_seeds_are_two_sets_of_masks_and_evaluation_has_none(device: str) -> None:
    model, batch = net(0, device), batch_of(0, 4)
    updates: list[Gradients] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        it = subject(model, dropout="by_row")
        it.accumulator.step(batch, loss)
        updates.append(it.updates[0])
    assert relative_error(updates[0], updates[1]) > WRONG
    quiet = subject(model, dropout="by_row")
    quiet.model.eval()
    quiet.accumulator.step(batch, loss)
    twin = copy.deepcopy(model).eval()
    loss(twin, {name: each.to(device) for name, each in batch.items()}).backward()
    assert relative_error(quiet.updates[0], gradients_of(twin)) <= EXACT


@on_each_device
def test_under_autocast(device: str) -> None:
    model, batch = net(0, device).float(), {name: each.float() for name, each in batch_of(0, 6).items()}
    whole, it, ordinary = (
        subject(model, size=6, dropout="by_row", autocast=torch.bfloat16),
        subject(model, size=2, dropout="by_row", autocast=torch.bfloat16),
        subject(model, size=2, autocast=torch.bfloat16),
    )
    for each in (whole, it, ordinary):
        each.accumulator.step(batch, lambda model, batch: loss(model, batch).float())
    assert relative_error(it.updates[0], whole.updates[0]) < 0.02
    assert relative_error(ordinary.updates[0], whole.updates[0]) > 0.2


def test_other_randomness_goes_on_from_microbatch_to_microbatch() -> None:
    seen: list[Tensor] = []

    def noisy(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(torch.randn(3))
        return loss(model, batch)

    subject(net(0, "cpu"), dropout="by_row").accumulator.step(batch_of(0, 3), noisy)
    assert len({each[0].item() for each in seen}) == 3


# -- what is refused -------------------------------------------------------------------------------------------------


def sequence_first(model: nn.Module, batch: Batch) -> Tensor:
    return loss(model, {"x": batch["x"].transpose(0, 1), "y": batch["y"].transpose(0, 1)})


def other_state(model: Any, batch: Batch) -> Tensor:
    hidden = checkpoint(model.block, model.inside(batch["x"]), use_reentrant=False, preserve_rng_state=False)
    return hidden.square().mean()


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [(sequence_first, r"3 rows in the first dimension.*batch_first=True"), (other_state, "preserve_rng_state=True")],
)
def test_rows_elsewhere_are_refused_by_name(loss_fn: Callable[..., Tensor], words: str) -> None:
    it = subject(net(0, "cpu"), size=3, dropout="by_row")
    with pytest.raises(ConfigError, match=words):
        it.accumulator.step(batch_of(0, 3), loss_fn)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_inside_of_a_recurrent_module_is_refused(kind: Any) -> None:
    module = kind(3, 2, num_layers=2, dropout=0.5, batch_first=True)

    def read(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"])[0].square().mean()

    it = subject(filled(module, 0, "cpu"), size=2, dropout="by_row")
    with pytest.raises(ConfigError, match=r"dropout=0\.5 inside of a recurrent"):
        it.accumulator.step(batch_of(0, 4), read)
    it.model.eval()
    it.accumulator.step(batch_of(0, 4), read)


def test_a_compiled_step_and_other_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="compile="):
        subject(net(0, "cpu"), dropout="by_row", compile=True)
    with pytest.raises(ConfigError, match='"by_row" or None'):
        subject(net(0, "cpu"), dropout="rows")
