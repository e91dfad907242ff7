"""Gradient norm and clipping: one pass for the norm, and one for all factors together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter, methodcaller

import torch
from torch import Tensor

from microbatch.gradients.parameters import Named
from microbatch.shards import PLAIN, is_shard, local_of, norm_of, shards_among

_NARROW, _STRIDED = {torch.bfloat16, torch.float16}, {torch.strided}
_DTYPE, _LAYOUT, _INDEX = attrgetter("dtype"), attrgetter("layout"), methodcaller("get_device")


def gradient_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the Euclidean norm of all gradients together.

    Args:
        gradients: Tensors of any shapes, dtypes and devices; sparse ones must be coalesced. A `DTensor` counts with the
            shards of all ranks.
        device: Device of the result.

    Returns:
        The norm; shape ``()``. 0 if there are no gradients, infinite or NaN if any gradient is.

    Cost:
        Reads every gradient once; no host synchronisation. For sharded gradients, one all-reduce of 8 bytes for each
        dimension of their mesh.
    """
    shards = shards_among(gradients)
    if shards:
        norms = [norm_of(shards, norm=partial(_norm, device=device))]
        norms += [_norm([gradient for gradient in gradients if not is_shard(gradient)], device=device)]
        return torch.stack([norm.to(norms[0].dtype) for norm in norms]).norm()
    return _norm(gradients, device=device)


def _norm(gradients: Sequence[Tensor], *, device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    plain = PLAIN.issuperset(map(type, gradients)) and _STRIDED.issuperset(map(_LAYOUT, gradients))
    dense = list(gradients) if plain else [_dense(gradient) for gradient in gradients]
    if not _NARROW.isdisjoint(map(_DTYPE, dense)):
        # torch computes the norm of a half-precision gradient in its own dtype.
        return torch.stack([_wide_norm(gradient).to(device) for gradient in dense]).norm()
    # Private by name, as below; get_total_norm would group the gradients by device and dtype first, which takes longer
    # than the norms of a small model.
    norms = torch._foreach_norm(dense)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    together = norms[0].device == device and len(set(map(_INDEX, norms))) == 1
    here = norms if together else [norm.to(device) for norm in norms]
    norm = torch.linalg.vector_norm(torch.stack(here))
    return norm.detach() if norm.requires_grad else norm


def _wide_norm(gradient: Tensor) -> Tensor:
    dtype = torch.float32 if gradient.dtype in _NARROW else gradient.dtype
    return torch.linalg.vector_norm(gradient, dtype=dtype).to(torch.float32)


def clip_factor(norm: float, max_norm: float | None) -> float:
    """Return the factor that clips a gradient of norm ``norm`` to at most ``max_norm``.

    Args:
        norm: Norm of the finished gradient.
        max_norm: Largest norm allowed; `None` for no clipping.

    Returns:
        The factor, at most 1; the same formula as `torch.nn.utils.clip_grad_norm_`.

    Example:
        >>> round(clip_factor(4.0, 1.0), 4), clip_factor(0.5, 1.0)
        (0.25, 1.0)
    """
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))


def scale_(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiply every gradient by one number, in place.

    Cost:
        One pass over the gradients; none for a factor of 1.
    """
    if factor == 1.0 or not gradients:
        return
    # Private by name, but torch's own optimizers and clip_grad_norm_ use it.
    torch._foreach_mul_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        [_dense(gradient) for gradient in gradients], factor
    )


def first_nonfinite(gradients: Sequence[tuple[Named, Tensor]]) -> str | None:
    """Return the name of the first infinite or NaN gradient, or `None`; reads each gradient on the host."""
    for named, gradient in gradients:
        if not bool(torch.isfinite(_dense(gradient)).all()):
            return named.name
    return None


def _dense(gradient: Tensor) -> Tensor:
    # The values of a coalesced gradient are all of its data. values() needs the coalesced flag; _values() does not.
    return gradient._values() if gradient.is_sparse else local_of(gradient)
