"""The data-parallel process group, and the collectives that a step runs over it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from microbatch.arguments import attribute
from microbatch.devices.backend import wide_dtype
from microbatch.errors import ConfigError, RankError
from microbatch.kind_words import kind_of
from microbatch.ranks.store_beats import StoreBeats
from microbatch.shards import is_shard

_FLAGS = 32
RUN_AGAIN = "so every rank has to run the batch again. Gradients, random state and buffers are as before the window"


class RankGroup:
    """A process group, with the collectives that a step needs, and a count of their calls and bytes.

    Attributes:
        group: The process group itself, for collectives without a method here; `None` for the default one.
        size: World size of the group; at least 2.
        index: This process's rank in the group, from 0.
        device: Device of the numbers that the group communicates: the model's, or the CPU if that has no float64.
        calls: Collectives started so far.
        sent_bytes: Bytes that this rank has sent in them so far, computed for ring algorithms, as large collectives
            use.
        beats: Describes ranks that have reported a failure; `None` before the first window.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        """Wrap a process group."""
        self.group = group
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)
        self.device = device if wide_dtype(device) is torch.float64 else torch.device("cpu")
        self.calls = 0
        self.sent_bytes = 0
        self.beats: StoreBeats | None = None

    @property
    def members(self) -> list[int]:
        """The ranks of the group, by their numbers in the default process group."""
        return dist.get_process_group_ranks(self.group)

    def failure_flags(self, *, failed: bool) -> list[float]:
        """Return a number for every 32 ranks, whose sums in float64 tell exactly which ranks have failed."""
        flags = [0.0] * failure_words(self.size)
        flags[self.index // _FLAGS] = float(failed) * 2.0 ** (self.index % _FLAGS)
        return flags

    def failed(self, flags: Sequence[float]) -> list[int]:
        """Return the indices of the ranks that have failed, from the sums of their flags."""
        return [index for index in range(self.size) if int(flags[index // _FLAGS]) >> index % _FLAGS & 1]

    def failures(self, indices: Sequence[int]) -> str:
        """Describe ranks that have reported a failure: their numbers, and the step and the error if known."""
        failed = [self.members[index] for index in indices]
        return " and ".join(f"rank {each}" for each in failed) if self.beats is None else self.beats.failures(failed)

    def failed_error(self, indices: Sequence[int]) -> RankError:
        """Return this rank's error for others that have failed in the window, by their indices in the group."""
        return RankError(
            f"{len(indices)} of {self.size} ranks failed inside this window, so this rank drops its gradients too: "
            f"{self.failures(indices)}; read the failing rank's own error"
        )

    @classmethod
    def find(cls, device: torch.device, group: Any = None) -> RankGroup | None:
        """Wrap a process group if it has several ranks; `None` for a single process."""
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

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks, in one all-reduce."""
        self.count("sum", tensor)
        dist.all_reduce(tensor, group=self.group)

    def share(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every rank, in the order of the ranks, in one all-reduce of 8 bytes a number."""
        table = torch.zeros(self.size, len(numbers), dtype=torch.float64)
        table[self.index] = torch.tensor(numbers, dtype=torch.float64)
        on_device = table.to(self.device)
        self.sum_(on_device)
        return on_device.tolist()

    def tell(self, what: Any) -> list[Any]:
        """All-gather a small Python object, with a host synchronisation; return each rank's, in their order."""
        # `dist.all_gather_object` takes the current CUDA device, which may be another rank's.
        device = torch.device("cpu") if "cpu:" in str(dist.get_backend_config(self.group)) else self.device
        own = torch.frombuffer(bytearray(pickle.dumps(what)), dtype=torch.uint8).to(device)
        self.calls += 1
        sizes = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)], device=device), group=self.group)
        lengths = [int(size) for size in sizes]
        told = [torch.empty(max(lengths), dtype=torch.uint8, device=device) for _ in lengths]
        dist.all_gather(told, pad(own, (0, max(lengths) - len(own))), group=self.group)
        return [pickle.loads(bytes(each[:n].tolist())) for each, n in zip(told, lengths, strict=True)]  # noqa: S301

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """All-gather a tensor of one shape and dtype; return each rank's, in the order of the ranks."""
        found = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self.count("gather", found)
        dist.all_gather(list(found), tensor, group=self.group)
        return list(found)

    def broadcast_(self, model: nn.Module) -> None:
        """Broadcast the first rank's parameters and buffers, except those sharded over the ranks."""
        self.copy_([each for each in (*model.parameters(), *model.buffers()) if not is_shard(each)], source=0)

    @torch.no_grad()
    def copy_(self, tensors: Sequence[Tensor], *, source: int) -> None:
        """Broadcast the tensors of rank ``source`` of the group, each in a collective of its own."""
        for tensor in tensors:
            self.count("copy", tensor)
            dist.broadcast(tensor.detach(), group=self.group, group_src=source)


def failure_words(ranks: int) -> int:
    """Return how many numbers `RankGroup.failure_flags` has for a world size."""
    return -(-ranks // _FLAGS)


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
    if callable(attribute(given, "get_group")) and attribute(given, "mesh_dim_names", given) is not given:
        if mesh.ndim != 1:
            raise ConfigError(
                f"Ranks: group takes one dimension of a DeviceMesh, not {mesh.ndim} ({mesh.mesh_dim_names}): pass "
                'mesh["name"], or flatten several dimensions into one: mesh["replicate", "shard"]._flatten("dp")'
            )
        given = mesh.get_group()
    if dist.is_available() and isinstance(given, int) and given == dist.GroupMember.NON_GROUP_MEMBER:
        raise ConfigError("Ranks: group: this process is not one of its ranks; pass the group that it belongs to")
    if not dist.is_available() or not isinstance(given, dist.ProcessGroup):
        raise ConfigError(f"Ranks: group must be a ProcessGroup, a DeviceMesh or None, not {kind_of(given)}")
    return given
