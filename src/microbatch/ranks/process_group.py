"""Who else holds a share of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from microbatch.errors import ConfigError
from microbatch.shards import is_shard


class Ranks:
    """The data-parallel ranks, and the few collectives that a step needs of them.

    Attributes:
        size: Number of ranks; at least 2.
        index: This rank, from 0.
        device: Where tensors have to be for these ranks to communicate.
        calls: Collectives started so far.
        sent_bytes: Bytes that left this rank for them so far, if they went round in a ring, as large ones do.
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
    def find(cls, device: torch.device, group: Any = None) -> Ranks | None:
        """Find the ranks of this process, if it is one of several.

        Args:
            device: Where the model is.
            group: Their process group; `None` for the default one.

        Returns:
            The ranks, or `None` when there is only this process.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return None
        return cls(group, device)

    def count(self, kind: str, tensor: Tensor, *, size: int | None = None) -> None:
        """Count a collective.

        Args:
            kind: ``"sum"``, ``"gather"``, ``"scatter"`` or ``"copy"``.
            tensor: What is summed or copied, what every rank is to have of all, or has before the sum is scattered.
            size: Ranks that take part; `None` for all of these.
        """
        self.calls += 1
        self.sent_bytes += ring_bytes(kind, tensor.numel() * tensor.element_size(), ranks=size or self.size)

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
        self.count("sum", tensor)
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
        found = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self.count("gather", found)
        dist.all_gather(list(found), tensor, group=self._group)
        return list(found)

    def broadcast_(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of the first, but for those that are spread over the ranks.

        Args:
            model: The same module on every rank.

        Cost:
            One broadcast a tensor.
        """
        self.copy_([each for each in (*model.parameters(), *model.buffers()) if not is_shard(each)], source=0)

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
            self.count("copy", tensor)
            dist.broadcast(tensor.detach(), group=self._group, group_src=source)


def ring_bytes(kind: str, size: int, *, ranks: int) -> int:
    """Say how many bytes leave a rank for a collective that goes round in a ring.

    Args:
        kind: ``"sum"``, ``"gather"``, ``"scatter"`` or ``"copy"``.
        size: Bytes that are summed or copied, that every rank is to have, or has before the sum is scattered.
        ranks: How many take part; at least 1.

    Returns:
        Bytes.

    Example:
        >>> ring_bytes("sum", 1000, ranks=4), ring_bytes("gather", 1000, ranks=4)
        (1500, 750)
    """
    return (2 if kind == "sum" else 1) * (ranks - 1) * size // ranks


def group_of(given: object) -> Any:
    """Return the process group that ``process_group=`` names.

    Args:
        given: A process group, a `DeviceMesh` of one dimension, or `None` for the default group.

    Returns:
        The group; `None` for the default one.

    Raises:
        ConfigError: It is none of these, has several dimensions, or this process is not one of its ranks.
    """
    if given is None:
        return None
    mesh: Any = given
    if hasattr(given, "get_group") and hasattr(given, "mesh_dim_names"):
        if mesh.ndim != 1:
            raise ConfigError(
                f"process_group= takes one dimension of a DeviceMesh, not {mesh.ndim} ({mesh.mesh_dim_names}): pass "
                'mesh["name"], or several flattened into one, for example mesh["replicate", "shard"]._flatten("dp")'
            )
        given = mesh.get_group()
    if dist.is_available() and given == dist.GroupMember.NON_GROUP_MEMBER:
        raise ConfigError("process_group: this process is not one of its ranks; pass the group that it belongs to")
    if not dist.is_available() or not isinstance(given, dist.ProcessGroup):
        raise ConfigError(f"process_group must be a process group, a DeviceMesh or None, not a {type(given).__name__}")
    return given
