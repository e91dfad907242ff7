"""Copy microbatches to the device, the next one while the current one computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from microbatch.arguments import attribute
from microbatch.batch.batch_tree import contents, map_leaves
from microbatch.batch.walk import holds_tensors
from microbatch.devices.copy_streams import current_stream, has_streams, new_stream, on_stream, pinned
from microbatch.errors import BatchError


def feed(microbatches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield each microbatch with its tensors on ``device``.

    On an accelerator with streams, the next microbatch is copied from pinned memory on its own stream while the current
    one computes. So the device never waits for the host. It holds the inputs of two microbatches, and of a third while
    a loop variable of the caller refers to it. On other devices, a microbatch is copied when its turn comes. Tensors
    that are already on ``device`` are not copied.

    Args:
        microbatches: Structures of tensors, usually on the host.
        device: The model's device.

    Yields:
        The same structures with their tensors on ``device``.

    Cost:
        No host synchronisation. With streams, one pinned copy on the host and one copy on the device for each
        microbatch.
    """
    if has_streams(device):
        yield from _feed_ahead(microbatches, device)
        return
    for microbatch in microbatches:
        yield moved(microbatch, device)
        del microbatch  # the next one is made without it


def moved(microbatch: object, device: torch.device, move: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Move a microbatch to a device.

    Args:
        microbatch: A structure of tensors, and of other objects that hold tensors.
        device: The device.
        move: Moves a tensor; `None` for ``tensor.to(device)``.

    Returns:
        The same structure. Tensors that are there already are not copied. An object with a method ``to`` is moved by
        it; other objects and modules stay as they are.

    Raises:
        BatchError: A tensor is on the device ``"meta"``, and has no data.
    """

    def leaf(value: Any, _: str) -> Any:
        if isinstance(value, Tensor):
            if value.is_meta and device.type != "meta":
                raise BatchError("the batch holds a meta tensor, which has no data; pass tensors with data")
            return value.to(device) if move is None else move(value)
        if value is None or isinstance(value, str | int | float | list | tuple | nn.Module):
            return value
        return value.to(device) if callable(attribute(value, "to")) and holds_tensors(value) else value

    return map_leaves(leaf, microbatch)


def is_there(batch: object, device: torch.device) -> bool:
    """Return whether every leaf of a batch is a tensor on ``device``, a number, a string or `None`."""
    return all(
        leaf.device == device if isinstance(leaf, Tensor) else isinstance(leaf, int | float | str | None)
        for leaf in contents(batch)
    )


@functools.cache
def _copy_stream(device: torch.device) -> Any:
    """Return the stream for copies to ``device``."""
    # One stream for the whole process, because the caching allocator has a separate memory pool for each stream.
    return new_stream(device)


def _feed_ahead(microbatches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    stream, current = _copy_stream(device), current_stream(device)

    def copy_tensor(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        return pinned(tensor, device).to(device, non_blocking=True)

    def copy_microbatch(microbatch: Any) -> Any:
        # The copy may reuse memory that an earlier microbatch freed. It waits for the work queued so far, so that this
        # work has read that memory.
        stream.wait_stream(current)
        with on_stream(stream):
            return moved(microbatch, device, copy_tensor)

    source = iter(microbatches)
    queue = [copy_microbatch(microbatch) for microbatch in islice(source, 1)]
    while queue:
        current.wait_stream(stream)
        queue += [copy_microbatch(microbatch) for microbatch in islice(source, 1)]
        yield queue.pop(0)
