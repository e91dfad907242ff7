"""Dropout that does not depend on the cut: the same rows get the same masks, whatever microbatch they come in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from microbatch.batch.random_masks import derive, row_mask
from microbatch.errors import ConfigError

_SELU_FLOOR = -1.7580993408473766  # what SELU tends to, far to the left


@dataclass(frozen=True, slots=True)
class Shown:
    """Which rows of the effective batch are going through the model.

    Attributes:
        rows: Their numbers in the effective batch, over all ranks; shape ``(rows,)``, int64.
        from_end: Whether they were trimmed at their beginning, so that places count from the end.
    """

    rows: Tensor
    from_end: bool = False


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of dropout: which it was of its microbatch, and of which rows."""

    index: int
    shown: Shown


class ByRow(TorchFunctionMode):
    """Draw the masks of dropout by row of the effective batch.

    An element is kept or dropped by a function of the step's seed, the number of the call within the microbatch, the
    number of its row, and its place in the row. So the full batch's masks are the microbatches' masks put together, and
    with them the gradient is the full batch's.

    Covered are `F.dropout` and its kin, `Tensor.bernoulli_` with one number a row (stochastic depth), and attention,
    which takes the mathematical path while it drops out. The first dimension must be the microbatch's rows.

    A checkpoint that runs its part of the model again finds the masks of the first time: each call also draws one
    number from the CPU's generator, whose state a checkpoint puts back.

    Args:
        seed: Of the step; the same on every rank.

    Source:
        Laws N2, M1, R1, with dropout.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._shown: Shown | None = None
        self._calls: dict[int, _Call] = {}
        self._index = 0
        self._sizes: set[int] = set()

    def show(self, shown: Shown | None, *, first: int = 0) -> None:
        """Say which rows come next; calls are counted anew.

        Args:
            shown: The next microbatch's rows; `None` where nobody knows.
            first: The number of the first call.
        """
        self._shown, self._index = shown, first
        if shown is not None:
            self._sizes.add(len(shown.rows))

    def is_row_for_row(self, x: Tensor) -> bool:
        """Tell whether a tensor has one element for each row.

        Args:
            x: Any.

        Returns:
            Whether it has; of what is run again in backward, for the rows of any microbatch.
        """
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
        """Take over what drops out; everything else runs as it is."""
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        out = None if rule is None else rule(self, *args, **kwargs)
        return func(*args, **kwargs) if out is None else out

    def mask(self, x: Tensor, p: float, *, channels: bool = False) -> Tensor:
        """Draw which elements of a tensor are kept.

        Args:
            x: Shape ``(rows, ...)``.
            p: Probability of dropping.
            channels: Whether the elements of a channel share their lot.

        Returns:
            Shape of ``x``, or ``(rows, channels, 1, ...)``; bool.

        Raises:
            ConfigError: The rows are not known, or are not the first dimension.
        """
        shown, index = self._call(x)
        shape = (*x.shape[:2], *[1] * (x.ndim - 2)) if channels else x.shape
        return row_mask(
            1 - p,
            shape,
            seed=derive(self.seed, index),
            rows=shown.rows.to(x.device),
            from_end=shown.from_end,
            device=x.device,
        )

    def _call(self, x: Tensor) -> tuple[Shown, int]:
        """Find which call this is: the next one, or one that is being run again."""
        tag = int(torch.randint(2**62, (), device="cpu"))
        found, again = self._calls.get(tag), _in_backward()
        if found is None and again:
            raise ConfigError(
                'dropout="by_row": a part of the model is run again in backward with another random state than the '
                "first time, so its masks cannot be found; checkpoint with preserve_rng_state=True, its default"
            )
        if found is not None and (again or found.shown is self._shown):
            return found.shown, found.index
        if self._shown is None:
            raise ConfigError(
                'dropout="by_row" has to know which rows of the batch go through the model: let the window hand them '
                "out (accumulator.step, window.split, or iterating over the window)"
            )
        rows = len(self._shown.rows)
        if x.ndim == 0 or x.shape[0] != rows:
            raise ConfigError(
                f'dropout="by_row" needs the microbatch\'s {rows} rows in the first dimension of what is dropped out, '
                f"and was given the shape {tuple(x.shape)}; put the rows first (batch_first=True), or give them a "
                "dimension of their own before the dropout: x.unflatten(0, (rows, -1))"
            )
        self._calls[tag] = _Call(self._index, self._shown)
        self._index += 1
        return self._shown, self._index - 1


def _in_backward() -> bool:
    # Private by name; nothing public tells.
    return bool(torch._C._current_autograd_node())  # pyright: ignore[reportPrivateUsage]


def _dropout(
    mode: ByRow,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor | None:
    return _dropped(mode, input, p, inplace=inplace) if training and p else None


def _dropout_c(mode: ByRow, input: Tensor, p: float, train: bool) -> Tensor | None:
    return _dropped(mode, input, p) if train and p else None


def _dropout_c_(mode: ByRow, input: Tensor, p: float, train: bool) -> Tensor | None:
    return _dropped(mode, input, p, inplace=True) if train and p else None


def _channels(
    mode: ByRow,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor | None:
    return _dropped(mode, input, p, inplace=inplace, channels=True) if training and p else None


def _alpha(
    mode: ByRow,
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
) -> Tensor | None:
    return _alpha_dropped(mode, input, p, inplace=inplace) if training and p else None


def _alpha_channels(
    mode: ByRow,
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
) -> Tensor | None:
    return _alpha_dropped(mode, input, p, inplace=inplace, channels=True) if training and p else None


def _dropped(mode: ByRow, x: Tensor, p: float, *, inplace: bool = False, channels: bool = False) -> Tensor:
    if not 0 <= p <= 1:
        raise ConfigError(f"the probability of dropout has to be between 0 and 1, not {p}")
    if p == 1:
        return x.mul_(0) if inplace else x * 0
    kept = mode.mask(x, p, channels=channels)
    return (x.mul_(kept) if inplace else x * kept).mul_(1 / (1 - p))


def _alpha_dropped(mode: ByRow, x: Tensor, p: float, *, inplace: bool = False, channels: bool = False) -> Tensor:
    if not 0 <= p < 1:
        raise ConfigError(f"the probability of alpha dropout has to be at least 0 and below 1, not {p}")
    scale = 1 / math.sqrt((1 - p) * (1 + p * _SELU_FLOOR**2))
    kept = mode.mask(x, p, channels=channels).to(x.dtype)
    shift = (kept - 1).mul_(-_SELU_FLOOR).add_(-_SELU_FLOOR * p).mul_(scale)
    kept.mul_(scale)
    return x.mul_(kept).add_(shift) if inplace else x * kept + shift


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
    # A query that may look nowhere sees zeros, as in torch.
    nowhere = (logits == -math.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(nowhere, 0).softmax(-1).masked_fill(nowhere, 0)
    return _dropped(mode, weights, dropout_p).to(value.dtype) @ value


def _multi_head_attention(mode: ByRow, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    # A copy of torch's function, whose calls of dropout are ours: the mode that sees the call is off inside of it, and
    # would see nothing but the same call again if it were on.
    rows = query.shape[1] if query.ndim == 3 else 1  # (queries, rows, width)

    def weights_dropped(weights: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        out = _dropout(mode, weights.unflatten(0, (rows, -1)), p, training)  # (rows * heads, queries, keys)
        return weights if out is None else out.flatten(0, 1)

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        out = _attention(mode, *args, **kwargs)
        return F.scaled_dot_product_attention(*args, **kwargs) if out is None else out

    of = F.multi_head_attention_forward
    stand_ins = {"has_torch_function": _is_overridden, "dropout": weights_dropped}
    names = {**of.__globals__, **stand_ins, "scaled_dot_product_attention": attention}
    made = FunctionType(of.__code__, names, of.__name__, of.__defaults__)
    made.__kwdefaults__ = of.__kwdefaults__
    return made(query, *args, **kwargs)


def _is_overridden(tensors: Any) -> bool:
    del tensors
    return False


def _bernoulli_(mode: ByRow, input: Tensor, p: Any = 0.5, *, generator: Any = None) -> Tensor | None:
    # One number a row: what stochastic depth draws.
    if generator is not None or isinstance(p, Tensor) or not 0 < p < 1 or not mode.is_row_for_row(input):
        return None
    return input.copy_(mode.mask(input, 1 - p))


def _recurrent(mode: ByRow, *args: Any, **kwargs: Any) -> None:
    del mode
    # (input, [batch_sizes,] hidden, weights, has_biases, num_layers, dropout, train, ...)
    named = [each for each in args if isinstance(each, bool | int | float)]
    dropout, train = (named[2], named[3]) if len(named) > 3 else (kwargs.get("dropout", 0), kwargs.get("train", False))
    if dropout and train:
        raise ConfigError(
            f'dropout="by_row" cannot reach the dropout={dropout} inside of a recurrent module: give it dropout=0, or '
            "make its layers one by one, with nn.Dropout and batch_first=True between them"
        )


_RULES: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _dropout_c,
    torch.dropout_: _dropout_c_,
    F.dropout1d: _channels,
    F.dropout2d: _channels,
    F.dropout3d: _channels,
    F.alpha_dropout: _alpha,
    F.feature_alpha_dropout: _alpha_channels,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    Tensor.bernoulli_: _bernoulli_,
    torch.lstm: _recurrent,
    torch.gru: _recurrent,
    torch.rnn_tanh: _recurrent,
    torch.rnn_relu: _recurrent,
}
