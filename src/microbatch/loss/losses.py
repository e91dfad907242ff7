"""Losses over all pairs of a batch, summed, a tile of rows at a time: the similarity matrix is never held whole.

Each is for representations of the whole batch, as ``accumulator.step(batch, loss_fn, encode=...)`` gives them, or for
those of any batch that fits. Normalise them first if they are to be compared by angle, for example with
``torch.nn.functional.normalize(x, dim=1)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from microbatch.errors import LossError
from microbatch.loss.loss import Loss

__all__ = ["clip", "info_nce", "siglip"]

# Similarities of a tile: on the CPU it stays near the cache, elsewhere it is large enough for a fast product.
_ON_CPU, _ELSEWHERE = 1 << 20, 1 << 24


def info_nce(queries: Tensor, keys: Tensor, *, temperature: float | Tensor = 0.07, tile: int | None = None) -> Loss:
    r"""Sum the cross-entropy of every query finding its own key among all of them.

    ``-log exp(q_i k_i / t) / sum_j exp(q_i k_j / t)``, over the queries ``i``. Row ``i`` of the keys belongs to query
    ``i``; keys beyond the queries are negatives alone, such as those of a queue.

    Args:
        queries: Shape ``(N, width)``, floating point, N at least 1.
        keys: Shape ``(M, width)``, ``M >= N``.
        temperature: ``t``; above 0; a tensor of one element may be learned.
        tile: Queries whose similarities exist at once, at least 1; `None` takes about a million similarities on the
            CPU, 16 million elsewhere.

    Returns:
        The sum, in nats, and its count, ``N``; in float32, or float64 for float64 input.

    Raises:
        LossError: Shapes or dtypes do not fit.

    Cost:
        Four matrix products of ``N * M * width``, where the plain formula has three: backward makes the similarities
        again. Memory for a few tiles; no host synchronisation. A second derivative holds the whole matrix.

    Example:
        >>> same = torch.ones(4, 2)
        >>> round(info_nce(same, same).mean.item(), 4)  # log 4: nothing tells the keys apart
        1.3863

    Source:
        van den Oord, Li, Vinyals 2018, "Representation learning with contrastive predictive coding".
    """
    _check("info_nce", queries, keys, tile)
    scale = 1 / temperature if isinstance(temperature, Tensor) else torch.tensor(1 / temperature, dtype=torch.float64)
    return _summed(_Softmax(columns=0.0), queries, keys, scale=scale, bias=None, tile=tile)


def clip(images: Tensor, texts: Tensor, *, scale: float | Tensor, tile: int | None = None) -> Loss:
    r"""Sum the cross-entropy of every image finding its text and of every text finding its image, halved.

    ``1/2 (-log softmax_j(s x_i y_j)[i] - log softmax_j(s x_j y_i)[i])``, over the pairs ``i``.

    Args:
        images: Shape ``(N, width)``, floating point, N at least 1.
        texts: Shape ``(N, width)``; row ``i`` belongs to image ``i``.
        scale: ``s``, the inverse of the temperature; a tensor of one element may be learned, usually the ``exp()`` of
            a parameter that begins at ``log(1 / 0.07)``.
        tile: As for `info_nce`.

    Returns:
        The sum, in nats, and its count, ``N``; in float32, or float64 for float64 input.

    Raises:
        LossError: Shapes or dtypes do not fit.

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
    return _summed(_Softmax(columns=0.5), images, texts, scale=_number(scale), bias=None, tile=tile)


def siglip(
    images: Tensor, texts: Tensor, *, scale: float | Tensor, bias: float | Tensor, tile: int | None = None
) -> Loss:
    r"""Sum the binary cross-entropy of every pair of an image and a text: do they belong together?

    ``-log sigmoid(z_ij (s x_i y_j + b))`` over all ``N * N`` pairs, where ``z_ij`` is 1 for ``i = j`` and -1 for
    others. The mean is over images, as in the paper, not over pairs.

    Args:
        images: Shape ``(N, width)``, floating point, N at least 1.
        texts: Shape ``(N, width)``; row ``i`` belongs to image ``i``.
        scale: ``s``; a tensor of one element may be learned, usually the ``exp()`` of a parameter that begins at
            ``log 10``.
        bias: ``b``; a tensor of one element may be learned; usually begins at -10, because nearly all pairs are
            negative.
        tile: As for `info_nce`.

    Returns:
        The sum, in nats, and its count, ``N``; in float32, or float64 for float64 input.

    Raises:
        LossError: Shapes or dtypes do not fit.

    Cost:
        As `info_nce`.

    Example:
        >>> x = torch.eye(2)
        >>> round(siglip(x, x, scale=0.0, bias=0.0).mean.item(), 4)  # two pairs an image, log 2 each
        1.3863

    Source:
        Zhai, Mustafa, Kolesnikov, Beyer 2023, "Sigmoid loss for language image pre-training".
    """
    _check("siglip", images, texts, tile)
    _check_pairs("siglip", images, texts)
    return _summed(_Sigmoid(), images, texts, scale=_number(scale), bias=_number(bias), tile=tile)


# -- what is done with a tile of logits -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Softmax:
    """Cross-entropy of finding the diagonal along rows, along columns, or both, weighed."""

    columns: float

    def value(self, logits: Tensor) -> Tensor:
        """Say what is summed, of the whole matrix."""
        along_rows, along_columns = logits.logsumexp(1).sum(), logits.logsumexp(0).sum()
        return along_rows.lerp(along_columns, self.columns) - logits.diagonal().sum()

    def begin(self, rows: Tensor, columns: Tensor) -> list[Tensor]:
        """Make what is to be known of all logits before the first of them has its gradient.

        Args:
            rows: Shape ``(N, width)``.
            columns: Shape ``(M, width)``.

        Returns:
            Of rows, and of columns, the largest logit, and the logarithm of the sum of ``exp(logit - largest)``: added
            up they would lose the digits that a small loss is made of. And the diagonal.
        """
        number = len(columns) if self.columns else 0
        along_rows = [rows.new_empty(len(rows)), rows.new_empty(len(rows))]
        along_columns = [rows.new_full((number,), -torch.inf), rows.new_zeros(number)]
        return [*along_rows, *along_columns, rows.new_empty(len(rows))]

    def add(self, logits: Tensor, known: list[Tensor], first: int) -> Tensor:
        """Learn from a tile that begins at some row; return its part of the sum that is known already."""
        largest, log, diagonal = (known[i][first : first + len(logits)] for i in (0, 1, 4))
        diagonal.copy_(logits.diagonal(first))
        torch.amax(logits, 1, out=largest)
        torch.sum((logits - largest[:, None]).exp_(), 1, out=log)
        if self.columns:
            before, total = known[2:4]
            now = torch.maximum(before, logits.amax(0))
            total.mul_((before - now).exp_()).add_((logits - now).exp_().sum(0))
            before.copy_(now)
        return (1 - self.columns) * (largest - diagonal + log.log_()).sum()

    def end(self, known: list[Tensor]) -> Tensor:
        """Return the part of the sum that needed all tiles."""
        _, _, largest, log, diagonal = known
        return self.columns * (largest - diagonal + log.log_()).sum() if self.columns else diagonal.new_zeros(())

    def gradient(self, logits: Tensor, known: list[Tensor], first: int) -> Tensor:
        """Return the derivative of the sum by a tile's logits, which may be overwritten."""
        largest, log = (each[first : first + len(logits), None] for each in known[:2])
        made = (logits - largest).sub_(log).exp_()
        if self.columns:
            largest, log = known[2:4]
            made.lerp_(logits.sub_(largest).sub_(log).exp_(), self.columns)
        made.diagonal(first).sub_(1)
        return made


@dataclass(frozen=True, slots=True)
class _Sigmoid:
    """Binary cross-entropy of every entry, the diagonal being the positive ones."""

    def value(self, logits: Tensor) -> Tensor:
        """Say what is summed, of the whole matrix."""
        signs = 1 - 2 * torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device)
        return -F.logsigmoid(-signs * logits).sum()

    def begin(self, rows: Tensor, columns: Tensor) -> list[Tensor]:
        """Return nothing: every entry is for itself."""
        del rows, columns
        return []

    def add(self, logits: Tensor, known: list[Tensor], first: int) -> Tensor:
        """Return a tile's part of the sum; the tile may be overwritten."""
        del known
        logits.diagonal(first).neg_()
        # Not softplus, which is linear from 20 on, and off by 2e-9 there.
        return -F.logsigmoid(logits.neg_()).sum()

    def end(self, known: list[Tensor]) -> Tensor:
        """Return 0: nothing is left to add."""
        del known
        return torch.zeros(())

    def gradient(self, logits: Tensor, known: list[Tensor], first: int) -> Tensor:
        """Return the derivative of the sum by a tile's logits, which may be overwritten."""
        del known
        logits.diagonal(first).neg_()
        made = logits.sigmoid_()
        made.diagonal(first).neg_()
        return made


_Kind: TypeAlias = _Softmax | _Sigmoid


# -- the tiles --------------------------------------------------------------------------------------------------------


def _summed(
    kind: _Kind, rows: Tensor, columns: Tensor, *, scale: Tensor, bias: Tensor | None, tile: int | None
) -> Loss:
    # A similarity of 50 is off by 0.1 in bfloat16, which the plain formula under autocast puts up with.
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    rows, columns = rows.to(dtype), columns.to(dtype)
    scale = scale.reshape(()).to(rows.device, dtype)
    bias = None if bias is None else bias.reshape(()).to(rows.device, dtype)
    if tile is None:
        tile = max(1, (_ON_CPU if rows.device.type == "cpu" else _ELSEWHERE) // max(1, len(columns)))
    with torch.autocast(rows.device.type, enabled=False):
        total = _Tiled.apply(rows, columns, scale, bias, kind, tile)
    return Loss(sum=cast("Tensor", total), count=len(rows))


class _Tiled(torch.autograd.Function):
    """A sum over the logits ``scale * rows columns^T + bias``, made a tile of rows at a time, in backward once more."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, kind: _Kind, tile: int
    ) -> Tensor:
        known = kind.begin(rows, columns)
        parts = [
            kind.add(_logits(part, columns, scale, bias), known, at * tile) for at, part in enumerate(rows.split(tile))
        ]
        ctx.save_for_backward(rows, columns, scale, bias, *known)
        ctx.kind, ctx.tile = kind, tile
        return torch.stack(parts).sum() + kind.end(known).to(rows.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, bias, *known = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for, so this has to have a graph of its own
            return *_by_autograd(ctx, (rows, columns, scale, bias), grads[0]), None, None
        grad_rows, grad_columns = torch.empty_like(rows), torch.zeros_like(columns)
        to_bias: list[Tensor] = []
        for at, (part, out) in enumerate(zip(rows.split(ctx.tile), grad_rows.split(ctx.tile), strict=True)):
            gradient = ctx.kind.gradient(_logits(part, columns, scale, bias), known, at * ctx.tile)
            torch.mm(gradient, columns, out=out)
            grad_columns.addmm_(gradient.T, part)
            to_bias.append(gradient.sum())
        to_scale = torch.einsum("nw,nw->", rows, grad_rows) * grads[0] if ctx.needs_input_grad[2] else None
        by = scale * grads[0]
        return (
            grad_rows.mul_(by) if ctx.needs_input_grad[0] else None,
            grad_columns.mul_(by) if ctx.needs_input_grad[1] else None,
            to_scale,
            torch.stack(to_bias).sum() * grads[0] if ctx.needs_input_grad[3] else None,
            None,
            None,
        )


def _logits(part: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = (part @ columns.T).mul_(scale)
    return logits if bias is None else logits.add_(bias)


def _by_autograd(ctx: Any, inputs: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor | None]:
    rows, columns, scale, bias = inputs
    logits = cast("Tensor", scale) * (cast("Tensor", rows) @ cast("Tensor", columns).T)
    value = ctx.kind.value(logits if bias is None else logits + bias)
    wanted = [each for each, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed and each is not None]
    found = iter(torch.autograd.grad(value, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:4]]


def _number(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _check(name: str, rows: Tensor, columns: Tensor, tile: int | None) -> None:
    shapes = f"{tuple(rows.shape)} and {tuple(columns.shape)}"
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1] or not 1 <= len(rows) <= len(columns):
        raise LossError(f"{name}: representations of the shapes {shapes} do not fit; they are (rows, width) each")
    if not (rows.dtype.is_floating_point and columns.dtype.is_floating_point):
        raise LossError(f"{name}: representations must be floating point, not {rows.dtype} and {columns.dtype}")
    if tile is not None and tile < 1:
        raise LossError(f"{name}: tile must be at least 1 row, not {tile}")


def _check_pairs(name: str, rows: Tensor, columns: Tensor) -> None:
    if len(rows) != len(columns):
        raise LossError(
            f"{name}: row i of one belongs to row i of the other, and there are {len(rows)} and {len(columns)} of them"
        )
