"""Tell running out of memory from everything else, let go of what the failure holds, and say what to try."""

from __future__ import annotations

import gc
import re
import traceback

import torch
from torch import nn

from microbatch.errors import OutOfMemoryError
from microbatch.failed_layer import failed_layer, named_layer
from microbatch.memory.budget import format_bytes, parse_bytes

# As the libraries write it; where one of them only says that it found no way, too little memory for its workspace is
# the usual reason. A text of the user's own that mentions memory has none of these.
_SPELLINGS = re.compile(
    r"""
      ^(CUDA|HIP|XPU)\ out\ of\ memory\b                # the caching allocators
    | \b(CUDA|HIP|XPU)\ out\ of\ memory\.\ Tried\ to\ allocate\b  # the same, inside another library's text
    | ^(CUDA|HIP)\ error:\ out\ of\ memory\b            # the runtimes, outside of the caching allocator
    | \b(cuda|hip)Error(MemoryAllocation|OutOfMemory)\b
    | \b(CU|HIP|MIOPEN)[A-Z]*_(STATUS_)?[A-Z_]*ALLOC(ATION)?_FAILED\b  # cuBLAS, cuDNN, cuSPARSE, cuSOLVER, cuFFT
    | \bmiopenStatusAllocFailed\b | \brocblas_status_memory_error\b
    | Unable\ to\ find\ a\ valid\ cuDNN\ algorithm\ to\ run\ convolution
    | \b(GET|FIND)\ was\ unable\ to\ find\ an\ engine\ to\ execute\ this\ computation
    | \bUR_RESULT_ERROR_OUT_OF_(DEVICE|HOST)_MEMORY\b   # XPU
    | ^MPS\ backend\ out\ of\ memory\b
    | DefaultCPUAllocator:\ (can't\ allocate|not\ enough)\ memory\b
    | \bunable\ to\ mmap\ \d+\ bytes\b.*Cannot\ allocate\ memory
    | ^std::bad_alloc$
    """,
    re.VERBOSE,
)
_ASKED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)\b")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on any device.

    Python's own `MemoryError` counts: it is what NumPy, and others that a loss function may call, raise when the host's
    memory ends, and what they ask for shrinks with the microbatch.

    Args:
        error: What was raised.

    Returns:
        False for everything else, also for a RuntimeError that merely mentions memory.

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
    return isinstance(error, RuntimeError) and _SPELLINGS.search(str(error)) is not None


def let_go(error: BaseException, device: torch.device) -> None:
    """Free what a failure keeps alive, so that what is tried next has room.

    The frames of a traceback hold the tensors of the forward or backward that failed, and the autograd engine keeps
    the gradients that it was about to hand on until it runs again. To be called outside of the ``except`` block, where
    nobody else holds the error.

    Args:
        error: What was raised; it loses its traceback, and so do the errors that it came from.
        device: Where the memory ran out.

    Cost:
        A garbage collection; on CUDA the allocator's cache is emptied.

    Source:
        Law M3.
    """
    _forget_frames(error, set())
    gc.collect()
    # The smallest backward there is, by each of the engine's threads that may hold something.
    for where in {torch.device("cpu"), device}:
        with torch.enable_grad():
            torch.zeros((), device=where, requires_grad=True).clone().backward()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def let_go_of_locals(error: BaseException, model: nn.Module) -> None:
    """Free what the functions held that an error has left, where it is not known yet what will be tried next.

    Args:
        error: What was raised; it is told the module that it was in, which nobody could find out afterwards.
        model: Whose module it is looked for in.
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


def explained(
    error: BaseException, *, model: nn.Module, device: torch.device, budget: int | None, limit: str
) -> OutOfMemoryError:
    """Make one clear error of running out of memory for good.

    Args:
        error: What was raised, with its traceback.
        model: Whose module it is looked for in.
        device: Where the memory ran out.
        budget: Bytes that the user allowed, or `None` for what the device has.
        limit: Why there is no smaller microbatch to try.

    Returns:
        An error that names what is known of bytes and layer, and what to try.

    Source:
        Law M4.
    """
    asked, in_use = _asked(error), _in_use(error, device)
    operator = getattr(error, "operator", None)
    allowed = getattr(error, "budget", None) or budget
    module = getattr(error, "module", None)
    module = failed_layer(error, model) if module is None else module
    told = [f"{operator or 'an operator'} asked for {_amount(asked)}"]
    where = "in backward, or outside of the model's modules"
    told += [where if module is None else f"in module {named_layer(module, model)}"]
    told += [f"with {_amount(in_use)} in use" if in_use is not None else ""]
    told += [f"of {format_bytes(allowed)} allowed" if allowed is not None else ""]
    return OutOfMemoryError(
        f"out of memory {limit}: {' '.join(part for part in told if part)}. The largest parameter is "
        f"{_largest(model)}. Weights, gradients, buffers and random state are as before the window. What can help: "
        'activation checkpointing (checkpoint="all"), mb.linear_cross_entropy for a large vocabulary, shorter '
        "rows, a narrower autocast, the optimizer's state or activations offloaded to the host, or a larger "
        f"memory_budget. The error itself: {type(error).__name__}: {error}",
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
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _amount(size: int | None) -> str:
    return "an unknown number of bytes" if size is None else format_bytes(size)


def _largest(model: nn.Module) -> str:
    sizes = [(parameter.numel() * parameter.element_size(), name) for name, parameter in model.named_parameters()]
    size, name = max(sizes, default=(0, "none"))
    return f"{name!r}, {format_bytes(size)}"
