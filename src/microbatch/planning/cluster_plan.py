"""Plan training on hardware that need not be here: the peak memory, the largest microbatch, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from microbatch.errors import ConfigError
from microbatch.planning.arithmetic import Division, divide_batch
from microbatch.planning.block_profile import HELD, Model, Place, Profile
from microbatch.planning.cluster_report import Alternative, ClusterPlan
from microbatch.planning.communication import Assumed, communication
from microbatch.planning.model_shapes import Case
from microbatch.planning.setup_alternatives import changes_between, cheapest, cost_of_changes, setups_with_less_memory
from microbatch.planning.sharding import Setup, State

_MOST = 1 << 20  # rows
_FEW = 8  # microbatches whose bfloat16 gradients add up well enough


def cluster_plan(
    case: Case,
    setup: Setup,
    *,
    batch_size: int,
    microbatch_size: int | None = None,
    assumed: Assumed | None = None,
) -> ClusterPlan:
    """Plan the memory and the communication of training on hardware that need not be here.

    The state is computed from the parameters: ``share of elements * bytes``. The memory of a microbatch is measured
    with the meter on fake tensors: a few blocks run, and the result is multiplied. At every moment the plan adds the
    state, the layers that are gathered then, and the gradients that are not sharded yet. The largest sum is the peak.
    The plan leaves out the optimizer step's own temporaries (``fused=True`` has none), fragments that the allocator
    cannot use, and workspaces inside operators.

    Args:
        case: The model, on any device, an example batch and the loss; see `case_from_config`.
        setup: Devices, ranks, and how the state is sharded.
        batch_size: Effective batch in rows, over all ranks.
        microbatch_size: Rows that go through the model at once; `None` for the largest that fits.
        assumed: Speeds of links and devices; `None` for those of the data sheets.

    Returns:
        The plan.

    Raises:
        ConfigError: A number is impossible, or the model has no repeated blocks to checkpoint.

    Cost:
        A few seconds, and the memory of a few thousand Python objects for each block.
    """
    return Simulation(case).plan(setup, batch_size=batch_size, microbatch_size=microbatch_size, assumed=assumed)


class Simulation:
    """Plan one model on several setups, and measure each of its profiles only once.

    Args:
        case: The model, an example batch and the loss.
    """

    def __init__(self, case: Case) -> None:
        self.model = Model(case)
        self._profiles: dict[tuple[str, torch.dtype], Profile] = {}
        self._tops: dict[tuple[str, torch.dtype, int], dict[Place, tuple[int, ...]]] = {}

    def plan(
        self, setup: Setup, *, batch_size: int, microbatch_size: int | None = None, assumed: Assumed | None = None
    ) -> ClusterPlan:
        """Plan one setup; see `cluster_plan`.

        Args:
            setup: Devices, ranks, and how the state is sharded.
            batch_size: Effective batch in rows, over all ranks.
            microbatch_size: Rows that go through the model at once; `None` for the largest that fits.
            assumed: Speeds of links and devices; `None` for those of the data sheets.

        Returns:
            The plan.

        Raises:
            ConfigError: A number is impossible, or the model has no repeated blocks to checkpoint.
        """
        if setup.checkpointing == "blocks" and self.model.path is None:
            raise ConfigError('checkpointing="blocks" needs a list of blocks that are alike; this model has none')
        largest = self.largest(setup, batch_size=batch_size)
        division = divide_batch(batch_size, microbatch_size=microbatch_size or largest or 1, ranks=setup.ranks)
        place, parts = self.peak(setup, division)
        state, assumed = State(self.model, setup), assumed or Assumed()
        flops = self._profile(setup).row_flops
        full = division.share / division.microbatch_size
        seconds, source = assumed.microbatch(flops * division.microbatch_size, setup)
        plan = ClusterPlan(
            name=self.model.case.name,
            parameters=state.elements,
            setup=setup,
            division=division,
            parts={name: size for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size},
            where=f"{place.phase} of {self.model.units[place.unit].name}",
            resident_bytes=state.resident_bytes(),
            host_bytes=state.host_bytes(),
            largest=largest,
            alternatives=(),
            warnings=tuple(_warnings(setup, division)),
            communication=communication(
                self.model,
                setup,
                microbatches=division.microbatches,
                flops=flops * division.microbatch_size,
                assumed=assumed,
                full=full,
            ),
            arithmetic_seconds=None if seconds is None else seconds * full,
            arithmetic_source=source,
        )
        return plan if plan.fits else replace(plan, alternatives=self._alternatives(setup, division))

    def peak(self, setup: Setup, division: Division) -> tuple[Place, dict[str, int]]:
        """Find the moment of the peak memory of a rank.

        Args:
            setup: Devices, ranks, and how the state is sharded.
            division: How the batch is cut.

        Returns:
            The stretch of the microbatch that the peak is in, and the bytes by category.
        """
        state = State(self.model, setup)

        def at(item: tuple[Place, tuple[int, ...]]) -> dict[str, int]:
            held = state.held(item[0], microbatches=division.microbatches)
            return held | dict(zip(HELD, item[1], strict=True))

        tops = self._held(setup, division.microbatch_size)
        most = max(tops.items(), key=lambda item: sum(at(item).values()))
        return most[0], at(most)

    def largest(self, setup: Setup, *, batch_size: int) -> int:
        """Find the largest microbatch that fits.

        Args:
            setup: Devices, ranks, and how the state is sharded.
            batch_size: Effective batch in rows, over all ranks.

        Returns:
            Rows; 0 if none fits.
        """
        share = min(_MOST, divide_batch(batch_size, microbatches=1, ranks=setup.ranks).share)
        if State(self.model, setup).resident_bytes() > setup.device.usable_bytes and share > 1:
            return 0
        if not self._fits(setup, batch_size, 1):
            return 0
        if self._fits(setup, batch_size, share):
            return share
        fits, fails = 0, 1
        while fails < share and self._fits(setup, batch_size, fails):
            fits, fails = fails, min(share, 2 * fails)
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self._fits(setup, batch_size, middle) else (fits, middle)
        return fits

    def _fits(self, setup: Setup, batch_size: int, size: int) -> bool:
        division = divide_batch(batch_size, microbatch_size=size, ranks=setup.ranks)
        return sum(self.peak(setup, division)[1].values()) <= setup.device.usable_bytes

    def _held(self, setup: Setup, size: int) -> dict[Place, tuple[int, ...]]:
        """Return the bytes at the fullest moment of every stretch; within a stretch the state does not change."""
        key = setup.checkpointing, setup.precision.dtype
        if (*key, size) not in self._tops:
            stretches = self._profile(setup).at(size)
            fullest = {place: held[held.sum(1).argmax()] for place, held in stretches.items() if len(held)}
            self._tops[*key, size] = {place: tuple(map(int, held)) for place, held in fullest.items()}
        return self._tops[*key, size]

    def _profile(self, setup: Setup) -> Profile:
        key = setup.checkpointing, setup.precision.dtype
        if key not in self._profiles:
            self._profiles[key] = Profile(self.model, checkpointing=key[0] == "blocks", dtype=key[1])
        return self._profiles[key]

    # -- setups that would fit -----------------------------------------------------------------------------------------

    def _alternatives(self, setup: Setup, division: Division) -> tuple[Alternative, ...]:
        """List the cheapest setups that fit, without those that another one beats in every way."""
        found: list[tuple[tuple[int, ...], Setup]] = []
        batch_size = division.batch_size
        for other in setups_with_less_memory(setup, blocks=self.model.path is not None):
            if other.ranks > batch_size or State(self.model, other).resident_bytes() > other.device.usable_bytes:
                continue
            cost = cost_of_changes(setup, other)
            # Largest first: both sizes have already been measured for the setup itself.
            for fewer, size in enumerate(sorted({division.microbatch_size, 1}, reverse=True)):
                if self._fits(other, batch_size, size):
                    found.append(((*cost, fewer), other))
                    break
        return tuple(self._alternative(setup, division, other=other, fewer=cost[-1]) for cost, other in cheapest(found))

    def _alternative(self, setup: Setup, division: Division, *, other: Setup, fewer: int) -> Alternative:
        batch_size = division.batch_size
        size = self.largest(other, batch_size=batch_size) if fewer else division.microbatch_size
        cut = divide_batch(batch_size, microbatch_size=size, ranks=other.ranks)
        changes = [*changes_between(setup, other), *([f"a microbatch of {size}"] if fewer else [])]
        return Alternative(
            changes=tuple(changes),
            setup=other,
            microbatch_size=cut.microbatch_size,
            peak_bytes=sum(self.peak(other, cut)[1].values()),
            host_bytes=State(self.model, other).host_bytes(),
        )


def _warnings(setup: Setup, division: Division) -> Iterator[str]:
    """List the risks of a setup."""
    if setup.precision.gradients < 4 and division.microbatches > _FEW:
        yield (
            f"{division.microbatches} microbatches added up in {setup.precision.gradients} bytes lose small gradients; "
            "adding up in float32 takes 2 bytes more of each parameter that a rank holds gradients of"
        )
    if not division.even:
        yield division.describe().splitlines()[-1]
