"""Find the layer that raised an error, and explain the error of a layer that the processor cannot run."""

from __future__ import annotations

import re
from types import TracebackType

import torch
from torch import nn

# As oneDNN and torch write it where no kernel of theirs takes these dtypes on this processor.
_NO_KERNEL = re.compile(r"\bcould not create a primitive\b|\b(bf16|fp16) path needs the cpu support\b")


def explain_missing_kernel(error: BaseException, model: nn.Module, *, autocast: torch.dtype | None) -> None:
    """Add a note to the error of a layer for which this processor has no kernel in the dtype of autocast.

    Autocast casts the layer's inputs without asking whether the processor has a kernel for them. An LSTM in bfloat16,
    for example, needs AVX-512 instructions; without them torch raises a `RuntimeError` that names neither the dtype nor
    the processor. Other errors stay as they are, and so do an error that has the note already and a
    model on another device.

    Args:
        error: What the loss function or backward raised, with its traceback.
        model: The model that was running, whose layer is looked for in the traceback.
        autocast: The dtype of autocast; `None` where there is none, and then nothing is added.

    Example:
        >>> error = RuntimeError("could not create a primitive descriptor for the LSTM forward propagation primitive.")
        >>> explain_missing_kernel(error, nn.LSTM(4, 4), autocast=torch.bfloat16)
        >>> error.__notes__[0].partition(":")[0]
        'microbatch'
    """
    source = _of_missing_kernel(error)
    on_processor = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if autocast is None or source is None or not on_processor or _has_note(error):
        return
    path = failed_layer(source, model)
    layer = "a layer" if path is None else f"the layer {named_layer(path, model)}"
    error.add_note(
        f"microbatch: this processor has no kernel for {layer} in {str(autocast).removeprefix('torch.')} (torch uses "
        f"its {torch.backends.cpu.get_cpu_capability()} instructions). What can help: run that layer in float32, as "
        'layer(x.float()) inside `with torch.autocast("cpu", enabled=False):`, or leave autocast out.'
    )


def failed_layer(error: BaseException, model: nn.Module) -> str | None:
    """Find the innermost module of a model whose method was running when an error was raised.

    Args:
        error: What was raised, with its traceback.
        model: The model.

    Returns:
        The module's path, which is empty for the model itself; `None` if the traceback holds none of its modules, as
        in backward.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: str | None = None
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = names[id(owner)]
        trace = trace.tb_next
    return found


def named_layer(path: str, model: nn.Module) -> str:
    """Write the path of a module with the name of its class.

    Args:
        path: The module's path, as `failed_layer` returns it.
        model: The model.

    Returns:
        The words; the path alone where the model has no such module.
    """
    try:
        owner = type(model.get_submodule(path)).__name__
    except AttributeError:  # of something else that was running
        return repr(path)
    return f"{path or 'the model itself'!r} ({owner})"


def _of_missing_kernel(error: BaseException | None) -> BaseException | None:
    """Return the error that says that there is no kernel: this one, or one that it was raised from."""
    while error is not None:
        if isinstance(error, RuntimeError) and _NO_KERNEL.search(str(error)):
            return error
        error = error.__cause__  # a stage of a pipeline raises its own error from the layer's
    return None


def _has_note(error: BaseException) -> bool:
    return any(note.startswith("microbatch: this processor") for note in getattr(error, "__notes__", []))
