"""Batch normalisation of a microbatch of one row: a wrong kernel of torch's, and a microbatch without a variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.overrides import TorchFunctionMode

from microbatch.errors import BatchStatisticsError
from microbatch.failed_layer import failed_layer, named_layer

NORMS = frozenset({F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm})
"""The functions of torch that end in its kernel of batch normalisation."""
_ONE_VALUE = "Expected more than 1 value per channel when training"  # as torch writes it


class ContiguousNorms(TorchFunctionMode):
    """Normalise one row by contiguous tensors, forward and backward, because torch's CPU kernel needs them.

    On the CPU, the backward of batch normalisation returns wrong numbers for one row whose input and gradient differ in
    their strides (in torch 2.13; by more than the gradient's own size). Such a gradient comes from
    ``flatten(2).transpose(1, 2)`` and a linear layer after the normalisation, for example.
    """

    def __torch_function__(  # noqa: PLR0917 - torch calls it by position
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the normalisations of one row; run every other call unchanged."""
        if func not in NORMS or torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        return normalize_contiguous(func, args, kwargs or {})


def normalize_contiguous(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a normalisation; for one row on the CPU, with contiguous input and gradient."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not needs_contiguous(x):
        return func(*args, **kwargs)
    if args:
        args = (x.contiguous(), *args[1:])
    else:
        kwargs = {**kwargs, "input": x.contiguous()}
    out = func(*args, **kwargs)
    if out.requires_grad:
        out.register_hook(_contiguous)
    return out


def _contiguous(gradient: Tensor) -> Tensor:
    return gradient.contiguous()


def needs_contiguous(x: Tensor) -> bool:
    """Return whether torch's kernel needs contiguous tensors for an input: for one row on the CPU."""
    return x.dim() > 2 and x.shape[0] == 1 and x.device.type == "cpu"


def normalizes_rows(model: nn.Module) -> bool:
    """Return whether a model has layers whose function is one of `NORMS`."""
    return any(isinstance(module, _NormBase) for module in model.modules())


def is_of_one_value(error: BaseException) -> bool:
    """Return whether an error of a forward is torch's refusal to normalise a channel of a single value."""
    return type(error) is ValueError and str(error).startswith(_ONE_VALUE)


def size_without_one_row(rows: int, size: int) -> int | None:
    """Return the next larger microbatch size that leaves no microbatch of one row; `None` if there is none.

    Example:
        >>> size_without_one_row(7, 3), size_without_one_row(7, 1), size_without_one_row(3, 2)
        (4, 4, None)
    """
    return next((each for each in range(max(2, size), rows) if rows % each != 1), None)


def explain_one_value(error: BaseException, model: nn.Module, *, rows: float | None, batch: int, size: int) -> str:
    """Describe which layer got a single value for each channel, and what to do; 0 rows are not known."""
    path = failed_layer(error, model)
    layer = "a batch normalisation" if path is None else f"the batch normalisation {named_layer(path, model)}"
    of_rows = "" if rows is None else f" of {rows:g} row{'s' if rows != 1 else ''}"
    shape = str(error).rpartition("torch.Size(")[2].rstrip(")")
    words = (
        f"{layer} normalises by the statistics of a microbatch, and got one value for each channel from a microbatch"
        f"{of_rows} (its input has the shape {shape}), which has no variance. "
    )
    other = size_without_one_row(batch, size)
    if rows == 1 and other is not None:
        if size > 1:
            words += f"{batch} rows in microbatches of {size} leave one row over. "
        words += f"Take another cut, such as microbatch_size={other}; or batch_norm"
    else:
        words += "Take larger microbatches; or batch_norm"
    return words + '="exact", which normalises over the whole batch, or "frozen", which uses the running statistics'


def one_value_error(place: str, shape: torch.Size) -> BatchStatisticsError:
    """Make the error for a whole batch that has a single value for each channel."""
    return BatchStatisticsError(
        f"the batch normalisation {place} got one value for each channel from the whole batch (its input has the shape "
        f'{tuple(shape)}), which has no variance. Use a batch of more rows, or batch_norm="frozen", which uses the '
        "running statistics"
    )
