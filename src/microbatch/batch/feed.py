"""Send microbatches to the device, the next one while this one computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from microbatch.batch.tree import iterate_tensors, map_tensors


def feed(microbatches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield each microbatch on ``device``.

    On CUDA the next microbatch travels from pinned memory on a stream of its own while this one computes, so the
    device holds two microbatches of inputs and never waits for the host. Elsewhere a microbatch is moved when its
    turn comes, and one that is there already is yielded as it is.

    Args:
        microbatches: Structures of tensors, usually on the host.
        device: Where the model is.

    Yields:
        The same structures with their tensors on ``device``.

    Cost:
        No host synchronisation. On CUDA one pinned host copy and one copy on the device of each microbatch.
    """
    if device.type == "cuda":
        yield from _feed_cuda(microbatches, device)
        return
    for microbatch in microbatches:
        yield map_tensors(lambda tensor: tensor.to(device), microbatch)


def _feed_cuda(microbatches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    stream = torch.cuda.Stream(device)

    def send(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        source = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
        return source.to(device, non_blocking=True)

    def start(microbatch: Any) -> Any:
        # Tensors that are on a device already were written by the stream that the user works on.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            return map_tensors(send, microbatch)

    def arrive(microbatch: Any) -> Any:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in iterate_tensors(microbatch):
            if tensor.device == device:
                # Without this the allocator could give the memory to the copying stream while this one still reads.
                tensor.record_stream(current)
        return microbatch

    waiting: list[Any] = []
    for microbatch in microbatches:
        ready = arrive(waiting.pop()) if waiting else None
        first = ready is None
        waiting.append(start(microbatch))
        if not first:
            yield ready
    if waiting:
        yield arrive(waiting.pop())
