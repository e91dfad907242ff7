"""Losses with their counts: over targets, of models, and over all pairs of a batch.

`cross_entropy`, `causal_lm`, `mse` and `bce` sum over targets; `from_model` uses the loss that a model computes.

`clip`, `info_nce` and `siglip` sum over pairs, one tile of rows at a time, so that the similarity matrix is never
complete. Each of these takes the representations of the whole batch, as ``accumulator.step(batch, loss_fn,
encode=...)`` passes them, or of any batch that fits in memory. For cosine similarity, normalise the representations
first, for example with ``torch.nn.functional.normalize(x, dim=1)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from microbatch.errors import LossError
from microbatch.loss.coupling import notice
from microbatch.loss.loss import Loss
from microbatch.loss.model_loss import from_model
from microbatch.loss.target_losses import bce, causal_lm, cross_entropy, mse

__all__ = ["bce", "causal_lm", "clip", "cross_entropy", "from_model", "info_nce", "mse", "siglip"]

# Similarities of a tile: few enough for the cache on the CPU, and enough for a fast matrix product on other devices.
_TILE_ON_CPU, _TILE_ON_DEVICE = 1 << 20, 1 << 24


def info_nce(queries: Tensor, keys: Tensor, *, temperature: float | Tensor = 0.07, tile: int | None = None) -> Loss:
    r"""Sum the cross-entropy of every query finding its own key among all keys.

    The loss is ``-log exp(q_i k_i / t) / sum_j exp(q_i k_j / t)``, summed over the queries ``i``. Row ``i`` of ``keys``
    belongs to query ``i``. Further keys, such as those of a queue, serve as negatives only.

    Args:
        queries: Shape ``(N, width)``, floating point, N at least 1.
        keys: Shape ``(M, width)``, floating point, ``M >= N``.
        temperature: ``t``; above 0. A tensor of one element may be learned.
        tile: Number of queries whose similarities exist at once, at least 1. `None` takes about a million similarities
            on the CPU, and 16 million on other devices.

    Returns:
        The sum, in nats, and the count ``N``. The sum is float32, or float64 for float64 input.

    Raises:
        LossError: Shapes or dtypes do not fit, or ``tile`` is below 1.

    Cost:
        Four matrix products of ``N * M * width``, where the plain formula takes three, because backward computes the
        similarities again. Memory for a few tiles, and no host synchronisation. A second derivative needs the complete
        matrix.

    Example:
        >>> same = torch.ones(4, 2)
        >>> round(info_nce(same, same).mean.item(), 4)  # log 4: all keys are equal
        1.3863

    Source:
        van den Oord, Li, Vinyals 2018, "Representation learning with contrastive predictive coding".
    """
    _check("info_nce", queries, keys, tile)
    scale = _as_tensor(1 / temperature)
    return _tiled_loss(_SoftmaxLoss(columns=0.0), queries, keys, scale=scale, bias=None, tile=tile)


def clip(images: Tensor, texts: Tensor, *, scale: float | Tensor, tile: int | None = None) -> Loss:
    r"""Sum the cross-entropy of every image finding its text and of every text finding its image, halved.

    The loss is ``1/2 (-log softmax_j(s x_i y_j)[i] - log softmax_j(s x_j y_i)[i])``, summed over the pairs ``i``.

    Args:
        images: Shape ``(N, width)``, floating point, N at least 1.
        texts: Shape ``(N, width)``, floating point; row ``i`` belongs to image ``i``.
        scale: ``s``, the inverse of the temperature. A tensor of one element may be learned; it is usually the
            ``exp()`` of a parameter that starts at ``log(1 / 0.07)``.
        tile: As for `info_nce`, in images.

    Returns:
        The sum, in nats, and the count ``N``. The sum is float32, or float64 for float64 input.

    Raises:
        LossError: Shapes or dtypes do not fit, or ``tile`` is below 1.

    Cost:
        As `info_nce`.

    Example:
        >>> x = torch.eye(2)
        >>> round(clip(x, x, scale=1.0).mean.item(), 4)  # log(1 + exp(-1))
        0.3133

    Source:
        Radford et al. 2021, "Learning transferable visual models from natural language supervision".
    """
    _check("clip", images, texts, tile)
    _check_pairs("clip", images, texts)
    return _tiled_loss(_SoftmaxLoss(columns=0.5), images, texts, scale=_as_tensor(scale), bias=None, tile=tile)


def siglip(
    images: Tensor, texts: Tensor, *, scale: float | Tensor, bias: float | Tensor, tile: int | None = None
) -> Loss:
    r"""Sum the binary cross-entropy of every pair of an image and a text: whether the two belong together.

    The loss is ``-log sigmoid(z_ij (s x_i y_j + b))``, summed over all ``N * N`` pairs; ``z_ij`` is 1 for ``i = j`` and
    -1 for other pairs. The mean is over the images, as in the paper, and not over the pairs.

    Args:
        images: Shape ``(N, width)``, floating point, N at least 1.
        texts: Shape ``(N, width)``, floating point; row ``i`` belongs to image ``i``.
        scale: ``s``. A tensor of one element may be learned; it is usually the ``exp()`` of a parameter that starts at
            ``log 10``.
        bias: ``b``. A tensor of one element may be learned; it usually starts at -10, because nearly all pairs are
            negative.
        tile: As for `info_nce`, in images.

    Returns:
        The sum, in nats, and the count ``N``. The sum is float32, or float64 for float64 input.

    Raises:
        LossError: Shapes or dtypes do not fit, or ``tile`` is below 1.

    Cost:
        As `info_nce`.

    Example:
        >>> x = torch.eye(2)
        >>> round(siglip(x, x, scale=0.0, bias=0.0).mean.item(), 4)  # two pairs per image, log 2 each
        1.3863

    Source:
        Zhai, Mustafa, Kolesnikov, Beyer 2023, "Sigmoid loss for language image pre-training".
    """
    _check("siglip", images, texts, tile)
    _check_pairs("siglip", images, texts)
    return _tiled_loss(_SigmoidLoss(), images, texts, scale=_as_tensor(scale), bias=_as_tensor(bias), tile=tile)


# -- the losses of one tile of logits ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _SoftmaxLoss:
    """Weighted cross-entropy of the diagonal entries, in the softmax over rows and over columns.

    Attributes:
        columns: Weight of the softmax over columns, from 0 to 1; the softmax over rows has the rest.
    """

    columns: float

    def full_value(self, logits: Tensor) -> Tensor:
        """Compute the sum from the complete matrix of logits, in operators of autograd."""
        along_rows, along_columns = logits.logsumexp(1).sum(), logits.logsumexp(0).sum()
        return along_rows.lerp(along_columns, self.columns) - logits.diagonal().sum()

    def init(self, rows: Tensor, columns: Tensor) -> list[Tensor]:
        """Allocate the state that `add` fills tile by tile.

        Args:
            rows: Shape ``(N, width)``.
            columns: Shape ``(M, width)``.

        Returns:
            The largest logit of each row, and the logarithm of the row's sum of ``exp(logit - largest)``. The same of
            each column. And the diagonal. The two numbers are kept apart, because their sum would round away a small
            loss.
        """
        number = len(columns) if self.columns else 0
        along_rows = [rows.new_empty(len(rows)), rows.new_empty(len(rows))]
        along_columns = [rows.new_full((number,), -torch.inf), rows.new_zeros(number)]
        return [*along_rows, *along_columns, rows.new_empty(len(rows))]

    def add(self, logits: Tensor, state: list[Tensor], first: int) -> Tensor:
        """Update the state with a tile that begins at row ``first``; return the tile's part of the sum over rows."""
        largest, log_sum, diagonal = (state[i][first : first + len(logits)] for i in (0, 1, 4))
        diagonal.copy_(logits.diagonal(first))
        torch.amax(logits, 1, out=largest)
        torch.sum((logits - largest[:, None]).exp_(), 1, out=log_sum)
        if self.columns:
            before, total = state[2:4]
            now = torch.maximum(before, logits.amax(0))
            total.mul_((before - now).exp_()).add_((logits - now).exp_().sum(0))
            before.copy_(now)
        return (1 - self.columns) * (largest - diagonal + log_sum.log_()).sum()

    def finish(self, state: list[Tensor]) -> Tensor:
        """Return the part of the sum over columns, which needs all tiles."""
        _, _, largest, log_sum, diagonal = state
        return self.columns * (largest - diagonal + log_sum.log_()).sum() if self.columns else diagonal.new_zeros(())

    def gradient(self, logits: Tensor, state: list[Tensor], first: int) -> Tensor:
        """Return the derivative of the sum by a tile's logits; the logits may be overwritten."""
        largest, log_sum = (each[first : first + len(logits), None] for each in state[:2])
        result = (logits - largest).sub_(log_sum).exp_()
        if self.columns:
            largest, log_sum = state[2:4]
            result.lerp_(logits.sub_(largest).sub_(log_sum).exp_(), self.columns)
        result.diagonal(first).sub_(1)
        return result


@dataclass(frozen=True, slots=True)
class _SigmoidLoss:
    """Binary cross-entropy of every entry; the diagonal entries are the positive pairs."""

    def full_value(self, logits: Tensor) -> Tensor:
        """Compute the sum from the complete matrix of logits, in operators of autograd."""
        signs = 1 - 2 * torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device)
        return -F.logsigmoid(-signs * logits).sum()

    def init(self, rows: Tensor, columns: Tensor) -> list[Tensor]:
        """Return no state, because the entries do not depend on each other."""
        del rows, columns
        return []

    def add(self, logits: Tensor, state: list[Tensor], first: int) -> Tensor:
        """Return a tile's part of the sum; the logits may be overwritten."""
        del state
        logits.diagonal(first).neg_()
        # Not softplus, because torch replaces softplus by the identity above 20, which is off by 2e-9 there.
        return -F.logsigmoid(logits.neg_()).sum()

    def finish(self, state: list[Tensor]) -> Tensor:
        """Return 0, because every tile's part is already added."""
        del state
        return torch.zeros(())

    def gradient(self, logits: Tensor, state: list[Tensor], first: int) -> Tensor:
        """Return the derivative of the sum by a tile's logits; the logits may be overwritten."""
        del state
        logits.diagonal(first).neg_()
        result = logits.sigmoid_()
        result.diagonal(first).neg_()
        return result


_TileLoss: TypeAlias = _SoftmaxLoss | _SigmoidLoss


# -- the tiles --------------------------------------------------------------------------------------------------------


def _tiled_loss(
    tile_loss: _TileLoss, rows: Tensor, columns: Tensor, *, scale: Tensor, bias: Tensor | None, tile: int | None
) -> Loss:
    # At least float32, because bfloat16 rounds a similarity of 50 by up to 0.1.
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    rows, columns = rows.to(dtype), columns.to(dtype)
    scale = scale.reshape(()).to(rows.device, dtype)
    bias = None if bias is None else bias.reshape(()).to(rows.device, dtype)
    if tile is None:
        tile = max(1, (_TILE_ON_CPU if rows.device.type == "cpu" else _TILE_ON_DEVICE) // max(1, len(columns)))
    with torch.autocast(rows.device.type, enabled=False):
        total = _TiledSum.apply(rows, columns, scale, bias, tile_loss, tile)
    return Loss(sum=cast("Tensor", total), count=len(rows))


class _TiledSum(torch.autograd.Function):
    """Sum a loss over the logits ``scale * rows columns^T + bias``, one tile of rows at a time.

    Forward keeps no logits; backward computes each tile again.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, tile_loss: _TileLoss, tile: int
    ) -> Tensor:
        state = tile_loss.init(rows, columns)
        parts = [
            tile_loss.add(_logits(part, columns, scale, bias), state, tile_index * tile)
            for tile_index, part in enumerate(rows.split(tile))
        ]
        ctx.save_for_backward(rows, columns, scale, bias, *state)
        ctx.tile_loss, ctx.tile = tile_loss, tile
        return torch.stack(parts).sum() + tile_loss.finish(state).to(rows.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, bias, *state = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradients need a graph of their own
            return *_second_order_gradients(ctx, (rows, columns, scale, bias), grads[0]), None, None
        grad_rows, grad_columns = torch.empty_like(rows), torch.zeros_like(columns)
        bias_gradients: list[Tensor] = []
        for tile_index, (part, out) in enumerate(zip(rows.split(ctx.tile), grad_rows.split(ctx.tile), strict=True)):
            gradient = ctx.tile_loss.gradient(_logits(part, columns, scale, bias), state, tile_index * ctx.tile)
            torch.mm(gradient, columns, out=out)
            grad_columns.addmm_(gradient.T, part)
            bias_gradients.append(gradient.sum())
        scale_gradient = torch.einsum("nw,nw->", rows, grad_rows) * grads[0] if ctx.needs_input_grad[2] else None
        factor = scale * grads[0]
        return (
            grad_rows.mul_(factor) if ctx.needs_input_grad[0] else None,
            grad_columns.mul_(factor) if ctx.needs_input_grad[1] else None,
            scale_gradient,
            torch.stack(bias_gradients).sum() * grads[0] if ctx.needs_input_grad[3] else None,
            None,
            None,
        )


def _logits(part: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = (part @ columns.T).mul_(scale)
    return logits if bias is None else logits.add_(bias)


def _second_order_gradients(ctx: Any, inputs: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor | None]:
    """Compute the gradients of the complete matrix by autograd, so that the gradients have a graph."""
    rows, columns, scale, bias = inputs
    logits = cast("Tensor", scale) * (cast("Tensor", rows) @ cast("Tensor", columns).T)
    value = ctx.tile_loss.full_value(logits if bias is None else logits + bias)
    inputs_with_grad = [
        each for each, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed and each is not None
    ]
    gradients = iter(torch.autograd.grad(value, inputs_with_grad, grad, create_graph=True))
    return [next(gradients) if needed else None for needed in ctx.needs_input_grad[:4]]


def _as_tensor(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _check(name: str, rows: Tensor, columns: Tensor, tile: int | None) -> None:
    """Check the arguments of a loss over pairs, and let an open window know that it was called."""
    shapes = f"{tuple(rows.shape)} and {tuple(columns.shape)}"
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1] or not 1 <= len(rows) <= len(columns):
        raise LossError(
            f"{name}: representations of the shapes {shapes} do not fit. Pass two of shape (rows, width), of the same "
            "width, the second with at least as many rows as the first"
        )
    if not (rows.dtype.is_floating_point and columns.dtype.is_floating_point):
        raise LossError(f"{name}: representations must be floating point, not {rows.dtype} and {columns.dtype}")
    if tile is not None and tile < 1:
        raise LossError(f"{name}: tile must be at least 1 row, not {tile}")
    if len(rows) == len(columns):  # more columns are a queue of earlier keys, which no cut changes
        notice(name)


def _check_pairs(name: str, rows: Tensor, columns: Tensor) -> None:
    if len(rows) != len(columns):
        raise LossError(
            f"{name}: there are {len(rows)} and {len(columns)} representations; pass as many texts as images, because "
            "text i belongs to image i"
        )
