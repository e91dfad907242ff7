"""Send microbatches to the device, the next one while this one computes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from microbatch.batch.batch_tree import leaves, map_tensors


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


def is_there(batch: object, device: torch.device) -> bool:
    """Tell whether a batch is on ``device``, so that its microbatches need no feeding.

    Args:
        batch: What `cut` accepts.
        device: Where the model is.

    Returns:
        Whether it is made of tensors on the device, numbers and texts alone; `feed` would yield its microbatches as
        they are.
    """
    return all(
        leaf.device == device if isinstance(leaf, Tensor) else isinstance(leaf, int | float | str | None)
        for _, leaf in leaves(batch)
    )


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    # One for the whole process: the allocator keeps the memory of each stream apart.
    return torch.cuda.Stream(device)


def _feed_cuda(microbatches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    stream, current = _copying(device), torch.cuda.current_stream(device)

    def send(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        source = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
        return source.to(device, non_blocking=True)

    def start(microbatch: Any) -> Any:
        # The copy waits for the work that was queued before it. So the memory that it is given, freed by an earlier
        # microbatch, has been read by then, and two microbatches of inputs are all that the device ever holds.
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            return map_tensors(send, microbatch)

    source = iter(microbatches)
    held = [start(microbatch) for microbatch in islice(source, 1)]
    while held:
        current.wait_stream(stream)
        held += [start(microbatch) for microbatch in islice(source, 1)]
        yield held.pop(0)
