"""One process of several: what the launcher says of it, and the group that they all join."""

from __future__ import annotations

import datetime as dt
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from microbatch.devices.backend import accelerator
from microbatch.errors import ConfigError
from microbatch.train.rendezvous import fresh

# Before there is a process group: torch binds the group of this moment as a default in this module, and every optimizer
# loads it. A group that is bound outlives `destroy_process_group`, and its threads may abort the process at its end.
import_module("torch.distributed.nn.functional")

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TELLING = _NEEDED[:3]
"""Nobody sets these for anything else; the address of a master stands in many a cluster's environment."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Hold what the launcher says of this process.

    Attributes:
        rank: Which rank it is, from 0.
        ranks: How many there are; at least 1.
        local: Which of the ranks of its machine it is: the number of its device.
        restarts: How often the launcher has started the ranks again.
        restartable: Whether it would, if one of them ended badly.
    """

    rank: int = 0
    ranks: int = 1
    local: int = 0
    restarts: int = 0
    restartable: bool = False

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one that people hear."""
        return self.rank == 0


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """Read what ``torchrun``, or whoever speaks as it does, has put into the environment.

    Args:
        environment: Variables by name.

    Returns:
        What it says; `None` for a process that nobody has launched beside others.

    Raises:
        ConfigError: Half of it is there, or a number is none.

    Example:
        >>> launch_of({"PATH": "/bin"}) is None
        True
        >>> said = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
        >>> launch_of(said).local
        1
    """
    if not any(name in environment for name in _TELLING):
        return None
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing:
        there = ", ".join(name for name in _NEEDED if name not in missing)
        raise ConfigError(
            f"the environment has {there}, and not {', '.join(missing)}: a rank needs all of these variables. Start "
            "the ranks with torchrun, which sets all of them, or unset those that another launch left behind"
        )
    rank, ranks, local = (_number(environment, name) for name in _TELLING)
    if not 0 <= rank < ranks:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE is {ranks}: ranks are numbered from 0")
    return Launch(
        rank=rank,
        ranks=ranks,
        local=local,
        restarts=_number(environment, "TORCHELASTIC_RESTART_COUNT"),
        restartable=_number(environment, "TORCHELASTIC_MAX_RESTARTS") > 0,
    )


@contextmanager
def joined(launch: Launch | None, *, patience: float) -> Generator[None]:
    """Join the group of all ranks while the block runs.

    What is on the CPU is reduced by gloo, what is on an accelerator by its own backend, such as NCCL: the gradients,
    wherever they are, and the few words of the training loop, which are not worth a kernel.

    Args:
        launch: What the launcher says; with `None`, or a single rank, there is nothing to join.
        patience: Seconds that a rank waits for the others in one collective.

    Yields:
        Nothing.

    Raises:
        RankError: A rank did not come to the start.
    """
    if launch is None or launch.ranks == 1:
        yield
        return
    timeout = dt.timedelta(seconds=patience)
    store, _, _ = next(rendezvous("env://", launch.rank, launch.ranks, timeout=timeout))
    dist.init_process_group(
        _backends(),
        store=fresh(store, rank=launch.rank, ranks=launch.ranks, patience=patience),
        rank=launch.rank,
        world_size=launch.ranks,
        timeout=timeout,
    )
    yield
    # Not after an error, which ends the process anyway: taking leave of ranks that are gone may take for ever.
    dist.destroy_process_group()


def own_device(name: str, launch: Launch | None) -> str:
    """Give every rank of a machine a device of its own.

    Args:
        name: What was asked for, the same on every rank.
        launch: What the launcher says of this one.

    Returns:
        The device's name.

    Raises:
        ConfigError: One device was asked for by its number, for several ranks; or one that ranks cannot be on.

    Example:
        >>> own_device("cuda", Launch(rank=5, ranks=8, local=1)), own_device("cpu", Launch(rank=5, ranks=8, local=1))
        ('cuda:1', 'cpu')
    """
    if launch is None or launch.ranks == 1:
        return name
    kind = name.partition(":")[0]
    if kind == "mps" or (":" in name and kind != "cpu"):
        raise ConfigError(
            f"--device {name} is one device, and there are {launch.ranks} ranks; with --device cuda each takes its own"
        )
    if name == "auto":
        kind = accelerator() or "cpu"
        kind = "cpu" if kind == "mps" else kind  # a machine has one
    return kind if kind == "cpu" else f"{kind}:{launch.local}"


def _backends() -> str:
    """Name the process group's backends: gloo for the CPU, and the accelerator's own if this PyTorch has it."""
    kind = accelerator()
    own = "" if kind is None else dist.Backend.default_device_backend_map.get(kind, "")
    return f"cpu:gloo,{kind}:{own}" if own not in {"", "gloo", "fake"} and dist.is_backend_available(own) else "gloo"


def _number(environment: Mapping[str, str], name: str) -> int:
    given = environment.get(name, "0")
    if not given.isdecimal():
        raise ConfigError(f"{name} is {given!r} in the environment, and has to be a whole number")
    return int(given)
