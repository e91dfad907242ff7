"""Gradients as values: taken from a model, compared, added up, and one explained by others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from microbatch.devices.backend import to_host_in_float64

Gradient: TypeAlias = dict[str, Tensor]
"""By the parameter's name, as `plain` numbers; a parameter that was not reached is left out."""

_COORDINATES = 100_000
"""Numbers that a fit looks at; it is judged by all of them."""


def taken(model: nn.Module) -> Gradient:
    """Copy the gradients that a model has now.

    Args:
        model: Whose names are used; a wrapper's is taken off by the caller.

    Returns:
        The gradient.
    """
    return {name: plain(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host, in float64.

    Args:
        tensor: Of any dtype.

    Returns:
        The copy; of complex numbers, with the real and the imaginary part as one more dimension.
    """
    tensor = tensor.detach()
    return to_host_in_float64(torch.view_as_real(tensor) if tensor.is_complex() else tensor)


def norm(gradient: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm.

    Args:
        gradient: Any.

    Returns:
        At least 0.

    Example:
        >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        5.0
    """
    return math.sqrt(sum(float(each.square().sum()) for each in gradient.values()))


def difference(gradient: Gradient, reference: Gradient) -> Gradient:
    """Subtract one gradient from another; what is left out counts as 0.

    Args:
        gradient: From which.
        reference: What.

    Returns:
        By every name that either has.
    """
    return combined([gradient, reference], [1.0, -1.0])


def combined(parts: Sequence[Gradient], factors: Iterable[float]) -> Gradient:
    """Add up multiples of gradients.

    Args:
        parts: The gradients.
        factors: One for each of them. A factor of 0 leaves its part out, whatever is in it.

    Returns:
        The sum.

    Example:
        >>> combined([{"a": torch.tensor(1.0)}, {"a": torch.tensor(2.0)}], [3.0, -1.0])
        {'a': tensor(1.)}
    """
    total: Gradient = {}
    for part, factor in zip(parts, factors, strict=True):
        if factor == 0:
            continue
        for name, each in part.items():
            total[name] = each * factor if name not in total else total[name] + each * factor
    return total


def relative_error(gradient: Gradient, reference: Gradient) -> float:
    """Return the norm of the difference over the reference's.

    Args:
        gradient: Whose error.
        reference: Against which; not 0.

    Returns:
        At least 0; infinite where the gradient is not finite.

    Example:
        >>> relative_error({"a": torch.tensor([3.0, 4.5])}, {"a": torch.tensor([3.0, 4.0])})
        0.1
    """
    error = norm(difference(gradient, reference)) / norm(reference)
    return error if math.isfinite(error) else math.inf


@dataclass(frozen=True, slots=True)
class Fit:
    """Say how well multiples of some gradients add up to another.

    Attributes:
        weights: The multiples; 0 for a part that is not finite.
        residual: Relative error of their sum; infinite where there are too few numbers to tell.
    """

    weights: tuple[float, ...]
    residual: float


def fit(reference: Gradient, parts: Sequence[Gradient]) -> Fit:
    """Find the multiples of gradients that add up to another as well as any.

    A mean over targets is ``sum_i (c_i / sum c) g_i`` of its microbatches' means, so where the fit is exact, its
    weights are the shares ``c_i / sum c``, without anybody having said what is counted.

    Args:
        reference: What they should add up to.
        parts: What is added up.

    Returns:
        The best multiples, by least squares, and how good they are.

    Example:
        >>> parts = [{"a": torch.tensor([1.0, 0.0, 1.0])}, {"a": torch.tensor([0.0, 1.0, 1.0])}]
        >>> found = fit({"a": torch.tensor([0.25, 0.75, 1.0])}, parts)
        >>> [round(weight, 6) for weight in found.weights], found.residual < 1e-12
        ([0.25, 0.75], True)
    """
    finite = [index for index, part in enumerate(parts) if math.isfinite(norm(part))]
    weights = [0.0] * len(parts)
    if finite and norm(reference) > 0:
        columns = torch.stack([_sampled(parts[index], reference) for index in finite], dim=1)
        if columns.shape[0] <= columns.shape[1]:
            return Fit(tuple(weights), math.inf)
        target = _sampled(reference, reference).unsqueeze(1)
        # The driver that copes with microbatches whose gradients are multiples of each other.
        solution = torch.linalg.lstsq(columns, target, driver="gelsd").solution
        for index, weight in zip(finite, solution.flatten().tolist(), strict=True):
            weights[index] = weight
    return Fit(tuple(weights), relative_error(combined(parts, weights), reference))


def _sampled(gradient: Gradient, like: Gradient) -> Tensor:
    """Lay a gradient out as one row of numbers; every so-manieth of them where they are too many."""
    flat = [gradient[name].flatten() if name in gradient else torch.zeros(each.numel()) for name, each in like.items()]
    row = torch.cat([each.double() for each in flat])
    return row[:: max(1, row.numel() // _COORDINATES)]
