"""Out-of-memory errors: detection, release of what they keep alive, and an error that explains what to try."""

from __future__ import annotations

import gc
import re
import traceback

import torch
from torch import nn

from microbatch.devices.device_memory import bytes_in_use, empty_cache
from microbatch.errors import MicrobatchError, OutOfMemoryError
from microbatch.failed_layer import failed_layer, named_layer
from microbatch.memory.budget import format_bytes, parse_bytes

# The libraries' own wordings. A failed search for an algorithm or engine usually means too little memory for its
# workspace. An error text of the user that merely mentions memory matches none of these.
_SPELLINGS = re.compile(
    r"""
      ^(CUDA|HIP|XPU|NPU|HPU|MLU|MUSA)\ out\ of\ memory\b  # the caching allocators
    | \b(CUDA|HIP|XPU|NPU|HPU|MLU|MUSA)\ out\ of\ memory\.\ Tried\ to\ allocate\b  # inside another library's text
    | ^(CUDA|HIP)\ error:\ out\ of\ memory\b            # the runtimes, outside of the caching allocator
    | \b(cuda|hip)Error(MemoryAllocation|OutOfMemory)\b
    | \b(CU|HIP|MIOPEN)[A-Z]*_(STATUS_)?[A-Z_]*ALLOC(ATION)?_FAILED\b  # cuBLAS, cuDNN, cuSPARSE, cuSOLVER, cuFFT
    | \bmiopenStatusAllocFailed\b | \brocblas_status_memory_error\b
    | Unable\ to\ find\ a\ valid\ cuDNN\ algorithm\ to\ run\ convolution
    | \b(GET|FIND)\ was\ unable\ to\ find\ an\ engine\ to\ execute\ this\ computation
    | \bUR_RESULT_ERROR_OUT_OF_(DEVICE|HOST)_MEMORY\b   # XPU
    | ^MPS\ backend\ out\ of\ memory\b
    | \bPT_DEVMEM\ Allocation\ failed\ for\ size\b       # HPU
    | DefaultCPUAllocator:\ (can't\ allocate|not\ enough)\ memory\b
    | \bunable\ to\ mmap\ \d+\ bytes\b.*Cannot\ allocate\ memory
    | ^std::bad_alloc$
    """,
    re.VERBOSE,
)
_ASKED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)\b")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device, and not only mentions memory.

    Python's own `MemoryError` counts too. NumPy, which a loss function may call, raises it when host memory runs out,
    and a smaller microbatch needs less of that.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
        True
        >>> is_out_of_memory(RuntimeError("unsupported memory format option ChannelsLast"))
        False

    Source:
        Law M2.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, MicrobatchError):  # which may quote another rank's error
        return False
    return isinstance(error, RuntimeError) and _SPELLINGS.search(str(error)) is not None


def let_go(error: BaseException, device: torch.device) -> None:
    """Free the tensors that an exception and its causes keep alive, so that the next attempt has more memory.

    The frames of a traceback hold the tensors of the failed forward or backward. The autograd engine also holds
    gradients until it runs again. Call this function outside of the ``except`` block, where nothing else refers to the
    exception.

    Cost:
        One garbage collection; on an accelerator, the allocator's cache is emptied.

    Source:
        Law M3.
    """
    _forget_frames(error, set())
    gc.collect()
    # A minimal backward on each engine thread that may hold gradients.
    for where in {torch.device("cpu"), device}:
        with torch.enable_grad():
            torch.zeros((), device=where, requires_grad=True).clone().backward()
    empty_cache(device)


def let_go_of_locals(error: BaseException, model: nn.Module) -> None:
    """Free the local variables of the frames that an exception has passed, but keep its traceback.

    Args:
        error: The exception. An out-of-memory error first gets an attribute ``module``, because the failed module
            cannot be found without the local variables.
        model: The model, in which the failed module is searched for.
    """
    if getattr(error, "module", None) is None and isinstance(error, torch.OutOfMemoryError):
        vars(error)["module"] = failed_layer(error, model)
    if error.__traceback__ is not None:
        traceback.clear_frames(error.__traceback__)


def _forget_frames(error: BaseException | None, seen: set[int]) -> None:
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    if error.__traceback__ is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
    _forget_frames(error.__cause__, seen)
    _forget_frames(error.__context__, seen)


def explained(error: BaseException, *, model: nn.Module, device: torch.device, limit: str) -> OutOfMemoryError:
    """Make the final error of a window that ran out of memory: with the known bytes and module, and what to try."""
    asked, in_use = _asked(error), _in_use(error, device)
    operator = getattr(error, "operator", None)
    allowed = getattr(error, "budget", None)
    module = getattr(error, "module", None)
    module = failed_layer(error, model) if module is None else module
    facts = [f"{operator or 'an operator'} asked for {_amount(asked)}"]
    where = "in backward, or outside of the model's modules"
    facts += [where if module is None else f"in module {named_layer(module, model)}"]
    facts += [f"with {_amount(in_use)} in use" if in_use is not None else ""]
    facts += [f"of {format_bytes(allowed)} allowed" if allowed is not None else ""]
    return OutOfMemoryError(
        f"out of memory {limit}: {' '.join(part for part in facts if part)}. The largest parameter is "
        f"{_largest(model)}. Weights, gradients, buffers and random state are as before the window. Try activation "
        'checkpointing (checkpoint="all"), mb.linear_cross_entropy for a large vocabulary, shorter rows, a narrower '
        "autocast dtype, activations or the optimizer's state offloaded to the host, or a larger memory_budget. "
        f"The original error: {type(error).__name__}: {error}",
        asked=asked,
        in_use=in_use,
        budget=allowed,
        operator=operator,
        module=module,
    )


def _asked(error: BaseException) -> int | None:
    if isinstance(error, OutOfMemoryError):
        return error.asked
    match = _ASKED.search(str(error))
    return None if match is None else parse_bytes(f"{match[1]} {'B' if match[2] == 'bytes' else match[2]}")


def _in_use(error: BaseException, device: torch.device) -> int | None:
    if isinstance(error, OutOfMemoryError):
        return error.in_use
    return bytes_in_use(device)


def _amount(size: int | None) -> str:
    return "an unknown number of bytes" if size is None else format_bytes(size)


def _largest(model: nn.Module) -> str:
    sizes = [(parameter.numel() * parameter.element_size(), name) for name, parameter in model.named_parameters()]
    size, name = max(sizes, default=(0, "none"))
    return f"{name!r}, {format_bytes(size)}"
