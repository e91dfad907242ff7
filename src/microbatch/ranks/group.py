"""Who else holds a share of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """The data-parallel ranks, and the few collectives that a step needs of them.

    Attributes:
        size: Number of ranks; at least 2.
        index: This rank, from 0.
        device: Where tensors have to be for these ranks to communicate.
        calls: Collectives started so far.
        sent_bytes: Bytes handed to them so far, on this rank.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        """Wrap a process group.

        Args:
            group: The group, or `None` for the default one.
            device: Where the model is.
        """
        self._group = group
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)
        self.device = device
        self.calls = 0
        self.sent_bytes = 0

    @classmethod
    def find(cls, device: torch.device) -> Ranks | None:
        """Find the ranks of this process, if it is one of several.

        Args:
            device: Where the model is.

        Returns:
            The default process group's ranks, or `None` when there is only this process.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        return cls(None, device)

    @property
    def group(self) -> Any:
        """The process group, for collectives that are not here; `None` for the default one."""
        return self._group

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor with its sum over all ranks.

        Args:
            tensor: The same shape and dtype on every rank.

        Cost:
            One all-reduce.
        """
        self.calls += 1
        self.sent_bytes += tensor.numel() * tensor.element_size()
        dist.all_reduce(tensor, group=self._group)

    def tell(self, what: Any) -> list[Any]:
        """Tell every rank something small.

        Args:
            what: Anything that can be pickled.

        Returns:
            What each rank said, in their order.

        Cost:
            Two small all-gathers and a host synchronisation.
        """
        told: list[Any] = [None] * self.size
        self.calls += 1
        dist.all_gather_object(told, what, group=self._group)
        return told

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Give every rank every rank's tensor.

        Args:
            tensor: The same shape and dtype on every rank.

        Returns:
            Each rank's, in their order.

        Cost:
            One all-gather.
        """
        self.calls += 1
        self.sent_bytes += tensor.numel() * tensor.element_size()
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor, group=self._group)
        return found

    def broadcast_(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of the first.

        Args:
            model: The same module on every rank.

        Cost:
            One broadcast a tensor.
        """
        self.copy_([*model.parameters(), *model.buffers()], source=0)

    @torch.no_grad()
    def copy_(self, tensors: Sequence[Tensor], *, source: int) -> None:
        """Give every rank what one of them has.

        Args:
            tensors: The same shapes, dtypes and order on every rank.
            source: Index of the rank that is copied.

        Cost:
            One broadcast a tensor.
        """
        for tensor in tensors:
            dist.broadcast(tensor.detach(), group=self._group, group_src=source)
