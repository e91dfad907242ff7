"""Draw dropout masks by row, so that a row has the same masks in whichever microbatch it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from microbatch.batch.random_masks import derive, row_mask
from microbatch.errors import ConfigError

_SELU_LIMIT = -1.7580993408473766  # limit of SELU(x) for x -> -inf


@dataclass(frozen=True, slots=True)
class Shown:
    """The rows of the effective batch that are in the current pass.

    Attributes:
        rows: Numbers of the rows in the effective batch, over all ranks; shape ``(rows,)``, int64.
        from_end: Whether the rows were trimmed at their beginning, so that coordinates count from the end.
    """

    rows: Tensor
    from_end: bool = False


@dataclass(frozen=True, slots=True)
class _DropoutCall:
    """One call of a dropout function: its number within the microbatch, and the rows of that microbatch."""

    index: int
    shown: Shown


class ByRow(TorchFunctionMode):
    """Replace torch's dropout functions by versions whose masks depend on the row and not on the microbatch.

    Whether an element is kept depends on the step's seed, the call's number in the microbatch, the row's number, and
    the element's coordinates. So the microbatches' masks, put together, are the full batch's masks, and the accumulated
    gradient is the full batch's gradient.

    The mode covers `F.dropout` and its variants, attention with dropout, and `Tensor.bernoulli_` with one number per
    row (stochastic depth). While attention drops out, it uses the mathematical implementation. The first dimension of
    each tensor must be the microbatch's rows.

    A checkpoint that runs a part of the model again in backward gets the masks of the first run. For this, each call
    also draws one number from the CPU generator as a tag. A checkpoint restores the generator, so the second run draws
    the same tag.

    Args:
        seed: Seed of the step; the same on every rank.

    Source:
        Laws N2, M1, R1, with dropout.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._shown: Shown | None = None
        self._calls: dict[int, _DropoutCall] = {}
        self._index = 0
        self._sizes: set[int] = set()

    def show(self, shown: Shown | None, *, first: int = 0) -> None:
        """Set the rows of the next pass, and restart the count of dropout calls.

        Args:
            shown: The rows of the next microbatch; `None` if they are not known.
            first: Number of the first call.
        """
        self._shown, self._index = shown, first
        if shown is not None:
            self._sizes.add(len(shown.rows))

    def has_one_element_per_row(self, x: Tensor) -> bool:
        """Return whether a tensor has one element for each row of this microbatch; in backward, of any microbatch."""
        if x.ndim == 0 or x.numel() != x.shape[0]:
            return False
        return (
            x.shape[0] in self._sizes
            if _in_backward()
            else self._shown is not None and x.shape[0] == len(self._shown.rows)
        )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace calls that drop elements out; run every other call unchanged."""
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        out = None if replacement is None else replacement(self, *args, **kwargs)
        return func(*args, **kwargs) if out is None else out

    def mask(self, x: Tensor, p: float, *, channels: bool = False) -> Tensor:
        """Draw the mask of kept elements for the next dropout call.

        Args:
            x: The tensor to drop out; shape ``(rows, ...)``.
            p: Probability that an element is dropped.
            channels: Whether all elements of a channel are kept or dropped together.

        Returns:
            True where an element is kept; shape of ``x``, or ``(rows, channels, 1, ...)`` with ``channels``; bool.

        Raises:
            ConfigError: The rows are not known, or are not the first dimension of ``x``. Or a checkpoint runs this call
                again in backward with another random state.
        """
        shown, index = self._find_call(x)
        shape = (*x.shape[:2], *[1] * (x.ndim - 2)) if channels else x.shape
        return row_mask(
            1 - p,
            shape,
            seed=derive(self.seed, index),
            rows=shown.rows.to(x.device),
            from_end=shown.from_end,
            device=x.device,
        )

    def _find_call(self, x: Tensor) -> tuple[Shown, int]:
        """Return the rows and the number of this call: the next call, or one that a checkpoint runs again."""
        tag = int(torch.randint(2**62, (), device="cpu"))
        call, in_backward = self._calls.get(tag), _in_backward()
        if call is None and in_backward:
            raise ConfigError(
                'dropout="by_row": a checkpoint runs a part of the model again in backward with another random state '
                "than in forward, so its masks cannot be found. Checkpoint with preserve_rng_state=True, the default"
            )
        if call is not None and (in_backward or call.shown is self._shown):
            return call.shown, call.index
        if self._shown is None:
            raise ConfigError(
                'dropout="by_row" has to know which rows of the batch are in the microbatch, and this microbatch does '
                "not come from the window. Use accumulator.step, window.split, or iterate over the window"
            )
        rows = len(self._shown.rows)
        if x.ndim == 0 or x.shape[0] != rows:
            raise ConfigError(
                f'dropout="by_row" needs the microbatch\'s {rows} rows in the first dimension of the tensor that is '
                f"dropped out, and its shape is {tuple(x.shape)}. Put the rows first (batch_first=True), or split them "
                "from the first dimension before the dropout: x.unflatten(0, (rows, -1))"
            )
        self._calls[tag] = _DropoutCall(self._index, self._shown)
        self._index += 1
        return self._shown, self._index - 1


def _in_backward() -> bool:
    # There is no public function for this.
    return bool(torch._C._current_autograd_node())  # pyright: ignore[reportPrivateUsage]


def _apply_dropout(mode: ByRow, x: Tensor, p: float, *, inplace: bool = False, channels: bool = False) -> Tensor:
    if not 0 <= p <= 1:
        raise ConfigError(f"the probability of dropout must be between 0 and 1, not {p}")
    if p == 1:
        return x.mul_(0) if inplace else x * 0
    kept = mode.mask(x, p, channels=channels)
    return (x.mul_(kept) if inplace else x * kept).mul_(1 / (1 - p))


def _apply_alpha_dropout(mode: ByRow, x: Tensor, p: float, *, inplace: bool = False, channels: bool = False) -> Tensor:
    if not 0 <= p < 1:
        raise ConfigError(f"the probability of alpha dropout must be at least 0 and below 1, not {p}")
    scale = 1 / math.sqrt((1 - p) * (1 + p * _SELU_LIMIT**2))
    kept = mode.mask(x, p, channels=channels).to(x.dtype)
    shift = (kept - 1).mul_(-_SELU_LIMIT).add_(-_SELU_LIMIT * p).mul_(scale)
    kept.mul_(scale)
    return x.mul_(kept).add_(shift) if inplace else x * kept + shift


def _dropout(
    mode: ByRow,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    channels: bool = False,
    drop: Callable[..., Tensor] = _apply_dropout,
) -> Tensor | None:
    return drop(mode, input, p, inplace=inplace, channels=channels) if training and p else None


def _torch_dropout(mode: ByRow, input: Tensor, p: float, train: bool, *, inplace: bool = False) -> Tensor | None:
    return _dropout(mode, input, p, train, inplace)


def _attention(  # noqa: PLR0913 - torch's own signature
    mode: ByRow,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if not dropout_p:
        return None
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    logits = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    # As in torch, a query that may attend to no key gets zeros.
    fully_masked = (logits == -math.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(fully_masked, 0).softmax(-1).masked_fill(fully_masked, 0)
    return _apply_dropout(mode, weights, dropout_p).to(value.dtype) @ value


def _multi_head_attention(mode: ByRow, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    # Torch switches the mode off inside this call, and with the mode on, the function would dispatch to the mode again.
    # So this runs a copy of torch's function, in which the names of the dropout functions are bound to our versions.
    rows = query.shape[1] if query.ndim == 3 else 1  # (queries, rows, width)

    def dropout_of_weights(weights: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        out = _dropout(mode, weights.unflatten(0, (rows, -1)), p, training)  # (rows * heads, queries, keys)
        return weights if out is None else out.flatten(0, 1)

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        out = _attention(mode, *args, **kwargs)
        return F.scaled_dot_product_attention(*args, **kwargs) if out is None else out

    original = F.multi_head_attention_forward
    replaced = {"has_torch_function": _is_overridden, "dropout": dropout_of_weights}
    namespace = {**original.__globals__, **replaced, "scaled_dot_product_attention": attention}
    copied = FunctionType(original.__code__, namespace, original.__name__, original.__defaults__)
    copied.__kwdefaults__ = original.__kwdefaults__
    return copied(query, *args, **kwargs)


def _is_overridden(tensors: Any) -> bool:
    del tensors
    return False


def _bernoulli_(mode: ByRow, input: Tensor, p: Any = 0.5, *, generator: Any = None) -> Tensor | None:
    # Stochastic depth draws one number per row.
    if generator is not None or isinstance(p, Tensor) or not 0 < p < 1 or not mode.has_one_element_per_row(input):
        return None
    return input.copy_(mode.mask(input, 1 - p))


def _refuse_recurrent(mode: ByRow, *args: Any, **kwargs: Any) -> None:
    del mode
    # (input, [batch_sizes,] hidden, weights, has_biases, num_layers, dropout, train, ...)
    numbers = [each for each in args if isinstance(each, bool | int | float)]
    dropout, train = (
        (numbers[2], numbers[3]) if len(numbers) > 3 else (kwargs.get("dropout", 0), kwargs.get("train", False))
    )
    if dropout and train:
        raise ConfigError(
            f'dropout="by_row" cannot replace the dropout={dropout} inside of a recurrent module. Set its dropout=0, '
            "or build its layers one by one, with batch_first=True and nn.Dropout between them"
        )


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    torch.dropout_: partial(_torch_dropout, inplace=True),
    **dict.fromkeys((F.dropout1d, F.dropout2d, F.dropout3d), partial(_dropout, channels=True)),
    F.alpha_dropout: partial(_dropout, drop=_apply_alpha_dropout),
    F.feature_alpha_dropout: partial(_dropout, drop=_apply_alpha_dropout, channels=True),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    Tensor.bernoulli_: _bernoulli_,
    torch.lstm: _refuse_recurrent,
    torch.gru: _refuse_recurrent,
    torch.rnn_tanh: _refuse_recurrent,
    torch.rnn_relu: _refuse_recurrent,
}
