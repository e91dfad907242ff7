"""The data-parallel process group, and the collectives that a step runs over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from microbatch.errors import ConfigError
from microbatch.shards import is_shard


class RankGroup:
    """A process group, with the collectives that a step needs, and a count of their calls and bytes.

    Attributes:
        size: World size of the group; at least 2.
        index: This process's rank in the group, from 0.
        device: Device of the tensors that the group's backend communicates.
        calls: Collectives started so far.
        sent_bytes: Bytes that this rank has sent in them so far, computed for ring algorithms, as large collectives
            use.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        """Wrap a process group.

        Args:
            group: The process group, or `None` for the default one.
            device: The model's device.
        """
        self._group = group
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)
        self.device = device
        self.calls = 0
        self.sent_bytes = 0

    @classmethod
    def find(cls, device: torch.device, group: Any = None) -> RankGroup | None:
        """Wrap a process group if it has several ranks.

        Args:
            device: The model's device.
            group: The process group; `None` for the default one.

        Returns:
            The ranks, or `None` if `torch.distributed` is not initialised or the world size is 1.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return None
        return cls(group, device)

    def count(self, kind: str, tensor: Tensor, *, size: int | None = None) -> None:
        """Count a collective and its bytes.

        Args:
            kind: ``"sum"`` (all-reduce), ``"gather"`` (all-gather), ``"scatter"`` (reduce-scatter) or ``"copy"``
                (broadcast).
            tensor: The tensor of an all-reduce or broadcast, the output of an all-gather, or the input of a
                reduce-scatter.
            size: Number of ranks that take part; `None` for all ranks of the group.
        """
        self.calls += 1
        self.sent_bytes += ring_bytes(kind, tensor.numel() * tensor.element_size(), ranks=size or self.size)

    @property
    def group(self) -> Any:
        """The process group itself, for collectives without a method here; `None` for the default one."""
        return self._group

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks.

        Args:
            tensor: The same shape and dtype on every rank.

        Cost:
            One all-reduce.
        """
        self.count("sum", tensor)
        dist.all_reduce(tensor, group=self._group)

    def tell(self, what: Any) -> list[Any]:
        """All-gather a small Python object.

        Args:
            what: Any object that can be pickled.

        Returns:
            Each rank's object, in the order of the ranks.

        Cost:
            Two small all-gathers and one host synchronisation.
        """
        told: list[Any] = [None] * self.size
        self.calls += 1
        dist.all_gather_object(told, what, group=self._group)
        return told

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """All-gather a tensor.

        Args:
            tensor: The same shape and dtype on every rank.

        Returns:
            Each rank's tensor, in the order of the ranks.

        Cost:
            One all-gather.
        """
        found = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self.count("gather", found)
        dist.all_gather(list(found), tensor, group=self._group)
        return list(found)

    def broadcast_(self, model: nn.Module) -> None:
        """Broadcast the first rank's parameters and buffers, except those sharded over the ranks.

        Args:
            model: The same module on every rank.

        Cost:
            One broadcast a tensor.
        """
        self.copy_([each for each in (*model.parameters(), *model.buffers()) if not is_shard(each)], source=0)

    @torch.no_grad()
    def copy_(self, tensors: Sequence[Tensor], *, source: int) -> None:
        """Broadcast one rank's tensors.

        Args:
            tensors: The same shapes, dtypes and order on every rank; overwritten on all ranks but the source.
            source: Rank, in the group, of the source.

        Cost:
            One broadcast a tensor.
        """
        for tensor in tensors:
            self.count("copy", tensor)
            dist.broadcast(tensor.detach(), group=self._group, group_src=source)


def ring_bytes(kind: str, size: int, *, ranks: int) -> int:
    """Return how many bytes each rank sends in a collective with a ring algorithm.

    Args:
        kind: ``"sum"`` (all-reduce), ``"gather"`` (all-gather), ``"scatter"`` (reduce-scatter) or ``"copy"``
            (broadcast).
        size: Bytes of the tensor of an all-reduce or broadcast, the output of an all-gather, or the input of a
            reduce-scatter.
        ranks: Number of ranks that take part; at least 1.

    Returns:
        Bytes sent by one rank.

    Example:
        >>> ring_bytes("sum", 1000, ranks=4), ring_bytes("gather", 1000, ranks=4)
        (1500, 750)
    """
    return (2 if kind == "sum" else 1) * (ranks - 1) * size // ranks


def group_of(given: object) -> Any:
    """Return the process group for the option ``Ranks(group=)``.

    Args:
        given: A process group, a `DeviceMesh` of one dimension, or `None` for the default group.

    Returns:
        The process group; `None` for the default one.

    Raises:
        ConfigError: The argument is of another type, the mesh has several dimensions, or this process is not a rank of
            the group.
    """
    if given is None:
        return None
    mesh: Any = given
    if hasattr(given, "get_group") and hasattr(given, "mesh_dim_names"):
        if mesh.ndim != 1:
            raise ConfigError(
                f"Ranks: group takes one dimension of a DeviceMesh, not {mesh.ndim} ({mesh.mesh_dim_names}): pass "
                'mesh["name"], or flatten several dimensions into one: mesh["replicate", "shard"]._flatten("dp")'
            )
        given = mesh.get_group()
    if dist.is_available() and isinstance(given, int) and given == dist.GroupMember.NON_GROUP_MEMBER:
        raise ConfigError("Ranks: group: this process is not one of its ranks; pass the group that it belongs to")
    if not dist.is_available() or not isinstance(given, dist.ProcessGroup):
        raise ConfigError(f"Ranks: group must be a ProcessGroup, a DeviceMesh or None, not a {type(given).__name__}")
    return given
