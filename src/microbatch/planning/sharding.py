"""How a model's state is shared between ranks, and what of it stays on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from microbatch.errors import ConfigError
from microbatch.memory.ledger import GRADIENTS, OPTIMIZER_STATE, PARAMETERS
from microbatch.planning.block_profile import BACKWARD, FORWARD, Model, Place
from microbatch.planning.hardware import Device

GATHERED, UNSHARDED = "gathered layers", "unsharded gradients"
STATE = (PARAMETERS, GRADIENTS, OPTIMIZER_STATE, GATHERED, UNSHARDED)

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp")
CHECKPOINTING = ("none", "blocks")
OFFLOADS = (None, "optimizer", "optimizer+gradients", "all")
REDUCES = ("microbatch", "window")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bytes that training takes for each parameter.

    Attributes:
        name: What it is called.
        parameters: Bytes of the weight that the forward uses.
        gradients: Bytes of the gradient that a window adds up in.
        optimizer: Bytes of the optimizer's state of a trained parameter: Adam's two averages, and a float32 weight
            where ``parameters`` is less.
        dtype: Of the forward.
        words: What that is.
    """

    name: str
    parameters: int
    gradients: int
    optimizer: int
    dtype: torch.dtype
    words: str

    @property
    def bytes(self) -> int:
        """All together."""
        return self.parameters + self.gradients + self.optimizer


def _precision(name: str, words: str, *, sizes: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> Precision:
    parameters, gradients, optimizer = sizes
    return Precision(
        name=name, parameters=parameters, gradients=gradients, optimizer=optimizer, dtype=dtype, words=words
    )


PRECISIONS = {
    each.name: each
    for each in (
        _precision("fp32", "all of it in float32", sizes=(4, 4, 8), dtype=torch.float32),
        _precision("mixed", "bfloat16 weights and gradients beside float32 weights and averages", sizes=(2, 2, 12)),
        _precision("mixed-fp32-gradients", "the same with gradients added up in float32", sizes=(2, 4, 12)),
        _precision("bf16", "all of it in bfloat16, in which small updates are lost", sizes=(2, 2, 4)),
        _precision("bf16-8bit", "the same with Adam's averages in 8 bits", sizes=(2, 2, 2)),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """On what, and how, a model is to be trained.

    Attributes:
        device: Of every rank.
        ranks: How many.
        strategy: What each rank holds a share of: ``"ddp"`` of nothing, ``"zero1"`` of the optimizer's state,
            ``"zero2"`` of the gradients too, ``"fsdp"`` of the weights too, each layer of which is gathered while it
            runs, and the next while it does.
        checkpointing: ``"blocks"`` keeps what goes into a block and computes the rest again; ``"none"`` keeps all.
        offload: What is on the host: nothing, ``"optimizer"`` (state and step), ``"optimizer+gradients"``, or
            ``"all"``.
        precision: Of weights, gradients and the optimizer's state.
        reduce: Whether shared gradients are reduced after each ``"microbatch"``, or once a ``"window"``, which holds
            all of them unsharded until then.
    """

    device: Device
    ranks: int = 1
    strategy: str = "ddp"
    checkpointing: str = "none"
    offload: str | None = None
    precision: Precision = PRECISIONS["mixed"]
    reduce: str = "microbatch"

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: A word that is not known, fewer ranks than one, or an offload that the strategy cannot do.
        """
        for name, allowed in (
            ("strategy", STRATEGIES),
            ("checkpointing", CHECKPOINTING),
            ("offload", OFFLOADS),
            ("reduce", REDUCES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        if self.ranks < 1:
            raise ConfigError(f"ranks must be at least 1, not {self.ranks}")
        if self.offload == "all" and self.strategy != "fsdp":
            raise ConfigError('offload="all" gathers a layer at a time; it needs strategy="fsdp"')
        if self.offloads_gradients and not self.shares_gradients:
            raise ConfigError(f'offload={self.offload!r} needs strategy="zero2" or "fsdp"')
        if self.offloads_gradients and self.reduce == "window":
            raise ConfigError('gradients cannot be on the host while a window holds them; use reduce="microbatch"')

    @property
    def shares_parameters(self) -> bool:
        """Whether a layer is gathered before it runs."""
        return self.strategy == "fsdp" and (self.ranks > 1 or self.offload == "all")

    @property
    def shares_gradients(self) -> bool:
        """Whether a rank keeps a share of the gradients only."""
        return self.strategy in {"zero2", "fsdp"}

    @property
    def offloads_gradients(self) -> bool:
        """Whether gradients are on the host."""
        return self.offload in {"optimizer+gradients", "all"}

    @property
    def words(self) -> str:
        """The setup in words."""
        parts = [
            f"{self.ranks} x {self.device.words}",
            self.strategy if self.ranks > 1 else "",
            f"{self.precision.name} precision ({self.precision.bytes} bytes a parameter)",
            "blocks checkpointed" if self.checkpointing == "blocks" else "no checkpointing",
            f"{self.offload} on the host" if self.offload else "",
            "gradients reduced once a window" if self.reduce == "window" else "",
        ]
        return ", ".join(part for part in parts if part)


def share_of(elements: int, *, rank: int, ranks: int) -> int:
    """Say how many elements a rank holds; they differ by one at most.

    Args:
        elements: All of them.
        rank: From 0; the first hold the most.
        ranks: How many.

    Returns:
        Elements.

    Example:
        >>> [share_of(10, rank=rank, ranks=4) for rank in range(4)]
        [3, 3, 2, 2]
    """
    return (elements + ranks - 1 - rank) // ranks


class State:
    """The bytes of a model's state, on a rank and on the host.

    Args:
        model: What is trained.
        setup: How.
        rank: Which; the first holds the most.
    """

    def __init__(self, model: Model, setup: Setup, *, rank: int = 0) -> None:
        self.model, self.setup, self._rank = model, setup, rank
        parameters = list(model.case.model.parameters())
        self.elements = sum(each.numel() for each in parameters)
        self.trained = sum(each.numel() for each in parameters if each.requires_grad)
        self._buffers = sum(each.numel() * each.element_size() for each in model.case.model.buffers())
        self._rest = sum(each.numel() for each in model.rest)
        self._rest_trained = [each.numel() for each in model.rest if each.requires_grad]

    def held(self, place: Place, *, microbatches: int) -> dict[str, int]:
        """Say what the device holds of it during a stretch of a microbatch.

        Args:
            place: The stretch.
            microbatches: Of the window: from the second on, all gradients are there.

        Returns:
            Bytes by category.
        """
        setup, precision = self.setup, self.setup.precision
        return {
            PARAMETERS: 0 if setup.offload == "all" else self._share("fsdp", self.elements) * precision.parameters,
            "buffers": self._buffers,
            GRADIENTS: self._gradients(place, microbatches=microbatches),
            OPTIMIZER_STATE: 0 if setup.offload else self._share("optimizer", self.trained) * precision.optimizer,
            GATHERED: self._gathered(place),
            UNSHARDED: self._unsharded(place, microbatches=microbatches),
        }

    def resident_bytes(self) -> int:
        """Say what a rank's device holds all the time, from the second microbatch on.

        Returns:
            Bytes of parameters, gradients and the optimizer's state.
        """
        held = self.held(Place(FORWARD, 0, 0), microbatches=2)
        whole = self.trained * self.setup.precision.gradients if self._whole_window else 0
        return held[PARAMETERS] + held[GRADIENTS] + held[OPTIMIZER_STATE] + whole

    def host_bytes(self) -> int:
        """Say what the ranks have on the host, all together.

        Returns:
            Bytes.
        """
        setup, precision = self.setup, self.setup.precision
        found = self.trained * precision.optimizer if setup.offload else 0
        found += self.trained * precision.gradients if setup.offloads_gradients else 0
        return found + (self.elements * precision.parameters if setup.offload == "all" else 0)

    @property
    def _whole_window(self) -> bool:
        return self.setup.reduce == "window" and self.setup.shares_gradients and self.setup.ranks > 1

    def _share(self, kind: str, elements: int) -> int:
        setup = self.setup
        shared = {
            "fsdp": setup.strategy == "fsdp",
            "gradients": setup.shares_gradients,
            "optimizer": setup.strategy != "ddp",
        }
        return share_of(elements, rank=self._rank, ranks=setup.ranks) if shared[kind] else elements

    def _gradients(self, place: Place, *, microbatches: int) -> int:
        if self.setup.offloads_gradients or self._whole_window:
            return 0
        elements = self.trained if microbatches > 1 else self._reached(place)
        return self._share("gradients", elements) * self.setup.precision.gradients

    def _reached(self, place: Place) -> int:
        """Count the gradients that one backward has made by the end of a stretch."""
        if place.phase == FORWARD:
            return 0
        units = self.model.units[place.unit :]
        return min(self.trained, sum(sum(unit.sizes) for unit in units) + sum(self._rest_trained))

    def _gathered(self, place: Place) -> int:
        if not self.setup.shares_parameters:
            return 0
        ahead = place.unit + (1 if place.phase == FORWARD else -1)
        units = self._units([place.unit, ahead])
        return (sum(self.model.units[i].elements for i in units) + self._rest) * self.setup.precision.parameters

    def _unsharded(self, place: Place, *, microbatches: int) -> int:
        """Count gradients that no share of is kept yet: of the unit that runs, and of the one that is being reduced."""
        setup, whole = self.setup, 0
        if self._whole_window:
            elements = self.trained if microbatches > 1 else self._reached(place)
            whole = elements * setup.precision.gradients
        if place.phase != BACKWARD:
            return whole
        size = setup.precision.dtype.itemsize
        units = self.model.units
        if setup.shares_gradients and setup.reduce == "microbatch" and (setup.ranks > 1 or setup.offloads_gradients):
            own = self._units([place.unit, place.unit + 1])
            return size * (sum(sum(units[i].sizes) for i in own) + sum(self._rest_trained))
        # Autograd makes a weight's gradient, then adds it to the sum.
        largest = max([*units[place.unit].sizes[:1], *self._rest_trained], default=0)
        return whole + (size * largest if microbatches > 1 else 0)

    def _units(self, wanted: Sequence[int]) -> list[int]:
        return [index for index in wanted if 0 <= index < len(self.model.units)]
