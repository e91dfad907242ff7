"""Create parts, passes and peers from the options: the only module that knows every feature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from microbatch.errors import ConfigError
from microbatch.loss.one_row_norm import normalizes_rows
from microbatch.memory.recompute import named_blocks
from microbatch.memory.saved_values import Aside
from microbatch.memory.spill import Spill
from microbatch.step.attempts import Policies
from microbatch.step.combinations import BUFFERS, COUNTS, ENCODE, check_together, goes_with, refuse
from microbatch.step.finish import take_step
from microbatch.step.history import History
from microbatch.step.options import EACH, EXACT, FROZEN, MEAN, MICROBATCH, ONCE, POOLED, Options
from microbatch.step.part import Function, OpenWindow, Part, Passes, Peers
from microbatch.step.parts.autocast import Autocast
from microbatch.step.parts.batch_norm import FrozenNorms, NormWarning, OneRowNorms, PooledNorms
from microbatch.step.parts.batch_warnings import BatchWarnings
from microbatch.step.parts.captured_gradients import CapturedGradients
from microbatch.step.parts.carried_tensors import CarriedTensors
from microbatch.step.parts.checkpointing import Checkpointing
from microbatch.step.parts.compilation import Compilation
from microbatch.step.parts.coverage import Coverage
from microbatch.step.parts.frozen_weights import FrozenWeights
from microbatch.step.parts.fused import Fused
from microbatch.step.parts.loss_warnings import CountWarning, CouplingWarning
from microbatch.step.parts.memory_budget import MemoryBudget
from microbatch.step.parts.noise_scale import NoiseMeter
from microbatch.step.parts.offloading import Offloading
from microbatch.step.parts.row_dropout import RowDropout
from microbatch.step.parts.scaled_loss import ScaledLoss
from microbatch.step.parts.watching import BuffersOnce, WatchedBuffers, WatchedWeights
from microbatch.step.parts.weight_hooks import PostHooks, WeightHooks
from microbatch.step.passes.coupled import Coupled
from microbatch.step.passes.lockstep import InLockstep
from microbatch.step.passes.pipelined import Pipelined
from microbatch.step.peers.alone import Alone
from microbatch.step.peers.data_parallel import DataParallel
from microbatch.step.peers.deterministic import Deterministic
from microbatch.step.peers.overlapped import Overlapped
from microbatch.step.peers.sharded import ShardedPeers
from microbatch.step.peers.stages import StagePeers
from microbatch.step.setup import Setup
from microbatch.step.size.coupled_way import CoupledWay
from microbatch.step.size.microbatch_size import MicrobatchSize
from microbatch.step.size.stopwatch import Stopwatch
from microbatch.step.sums import sums_for
from microbatch.warned import WarnOnce


class Composition:
    """Create everything that an accumulator's windows consist of, and keep it between windows.

    Args:
        options: The options of the accumulator.

    Attributes:
        options: The options, with a `Spill` as ``offload`` where activations are offloaded.
        history: Counts and settings from earlier windows.
        parts: Every part, the outermost first, without peers and passes.
        warn: Issues each kind of warning once.
        policies: The choices that change between windows.

    Raises:
        ConfigError: Two options exclude each other.
    """

    def __init__(self, options: Options) -> None:
        check_together(options)
        if isinstance(options.offload, str) or (options.offload is None and options.batch_norm == EXACT):
            options = replace(options, offload=Spill(options.bare_model))
        self.options, self.history = options, History()
        self._aside, self.warn = Aside(), WarnOnce()
        self.budget, self.stopwatch = MemoryBudget(), Stopwatch()
        self.size = MicrobatchSize(options, self.budget, self.stopwatch)
        twice = options.is_sharded or options.buffers in {ONCE, MEAN}
        self.way = CoupledWay("twice" if options.coupled == "auto" and twice else options.coupled)
        auto = options.checkpoint == "auto"
        self.checkpointing = Checkpointing(None if auto else named_blocks(options.bare_model, options.checkpoint or ()))
        self.fused = Fused(
            # deterministic= removes each microbatch's gradient, so there is no sum to add to; a pipeline's schedule
            # runs backward itself.
            weights=options.sums.fuse and not options.ranks.deterministic and options.pipeline is None,
            always=options.dropout is not None,
        )
        self.compilation = Compilation(options.compile if isinstance(options.compile, str) else None)
        self.passes = self._passes()
        self._alone, self._together = self._peers()
        self._noise: dict[str, Part] = {"noise": NoiseMeter(options)} if options.noise_scale else {}
        self.parts = self._parts()
        self._most_first = max(part.first_windows or 0 for part in self.parts)
        self.policies = Policies(self.size, self.way)
        self._setups: dict[Any, Setup] = {}

    def setup(self, finish: Callable[[OpenWindow], dict[str, Any]] = take_step) -> Setup:
        """Return the setup of the next window: after the first ones, the same for all windows over the same ranks."""
        options = self.options
        alone = not options.ranks.deterministic and options.pipeline is None and options.find_ranks() is None
        here = min(self.history.here, self._most_first)
        if (alone, finish, here) not in self._setups:
            peers = self._alone if alone else self._together
            parts = [each for each in self.parts if each.first_windows is None or here < each.first_windows]
            self._setups[alone, finish, here] = self._setup(peers, parts, finish)
        return self._setups[alone, finish, here]

    def _setup(self, peers: Peers, parts: list[Part], finish: Callable[[OpenWindow], dict[str, Any]]) -> Setup:
        options = self.options
        return Setup(
            options=options,
            history=self.history,
            parts=[peers, self.passes, *parts],
            peers=peers,
            passes=self.passes,
            sizing=self.size.for_rows,
            sums=partial(sums_for, options, aside=self._aside.put),
            couple=_couple,
            finish=finish,
            live_bytes=self.budget.live_bytes,
            warn=self.warn,
        )

    def to_locate(self) -> Composition:
        """Return a copy that runs the current window again at the same size, without listeners and warnings."""
        norm = self.options.batch_norm or MICROBATCH
        again = Composition(replace(self.options, listeners=(), noise_scale=None, batch_norm=norm))
        again.warn, again.history, again.size.sizing = self.warn, replace(self.history), replace(self.size.sizing)
        again.checkpointing.blocks = self.checkpointing.blocks
        return again

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: the history, and the state of each part, by name."""
        history = self.history
        return {
            "windows": history.windows,
            "skipped": history.skipped,
            "count": history.count,
            "seed": torch.initial_seed() if history.seed is None else history.seed,
            **{name: part.state() for name, part in self._stateful().items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a result of `state`."""
        try:
            state = {"noise": {"windows": []}, **state}  # a state from before noise_scale= was given
            windows, skipped, count = int(state["windows"]), int(state["skipped"]), float(state["count"])
            for name, part in self._stateful().items():
                part.load(state[name])
            seed = state.get("seed")
        except KeyError as error:
            raise ConfigError(f"the accumulator's state has no {error}; it was not made by state_dict()") from None
        except Exception as error:
            raise ConfigError(f"the accumulator's state was not made by state_dict(): {error}") from error
        self.history = History(windows, skipped, count, seed, resumed=windows)
        self._setups.clear()  # they have the history

    def _stateful(self) -> dict[str, Part]:
        found = {"size": self.size, "way": self.way, "checkpoint": self.checkpointing, "ranks": self._together}
        return found | self._noise

    # -- options to parts ----------------------------------------------------------------------------------------------

    def _parts(self) -> list[Part]:
        """List the parts, the outermost first; `Fused`, which runs backward itself, is the last."""
        options = self.options
        found: list[Part] = [self.budget, self.size, BatchWarnings()]
        if options.microbatch_size == "auto":
            found.append(self.stopwatch)
        if options.coupled == "auto":
            found.append(self.way)
        if options.checkpoint:
            found.append(self.checkpointing)
        if options.batch_norm in _NORMS:
            found.append(_NORMS[options.batch_norm]())
        found.append(FrozenWeights(once=goes_with(BUFFERS, options), lockstep=options.batch_norm == EXACT))
        if options.batch_norm != EXACT:  # lockstep moves buffers once
            found += _BUFFERS[options.buffers](goes_with(BUFFERS, options))
        if normalizes_rows(options.bare_model):
            found.append(OneRowNorms())
        if options.dropout:
            found.append(RowDropout())
        if options.spill is not None and options.batch_norm != EXACT:
            found.append(Offloading(options.spill))
        elif options.coupled == "spill":
            found.append(Offloading(Spill(options.bare_model), encoders_alone=True))
        if options.compile:
            found.append(self.compilation)
        if options.autocast is not None and options.pipeline is None:  # a pipeline enters autocast in each forward
            found.append(Autocast(options.autocast))
        if options.pipeline is None:  # a stage alone does not know what the loss depends on
            found.append(Coverage())
        found += self._noise.values()  # it reads the gradients that hooks on weights change
        found += [PostHooks(), WeightHooks(), CountWarning(), CouplingWarning(), ScaledLoss(), CarriedTensors()]
        found += [WatchedWeights(), CapturedGradients()]
        return [*found, self.fused]

    def _passes(self) -> Passes:
        spill = self.options.spill
        if self.options.pipeline is not None:
            return Pipelined()
        return InLockstep(spill) if spill is not None and self.options.batch_norm == EXACT else Passes()

    def _peers(self) -> tuple[Peers, Peers]:
        """Return the peers for a single process, and the peers for several ranks."""
        options = self.options
        kind = DataParallel
        if options.ranks.deterministic:
            kind = Deterministic
        elif options.pipeline is not None:
            kind = StagePeers
        elif options.is_sharded:
            kind = ShardedPeers
        elif options.ranks.overlap:
            kind = Overlapped
        return Alone(), kind()

    # -- policies ------------------------------------------------------------------------------------------------------

    def prepare(self, batch: object, loss_fn: Function) -> None:
        """Choose the blocks under checkpointing and the microbatch size, where they are not settled."""
        part = self.checkpointing
        if part.blocks is None:
            # Imported here, because fake tensors take half a second to import.
            from microbatch.step.size.auto_checkpoint import choose_blocks

            part.blocks = choose_blocks(self.options, self.size.sizing, batch=batch, loss_fn=loss_fn)
        if self.size.unsure:
            self.size.before(batch, loss_fn, settled=replace(self.options, checkpoint=part.blocks))


def _couple(window: OpenWindow, encode: Function, *, keep: bool) -> Coupled:
    refuse(window.options, use=[ENCODE, COUNTS] if window.denominator.declares else [ENCODE])
    return Coupled(window, encode, keep=keep)


_BUFFERS: Mapping[str | None, Callable[[bool], list[Part]]] = {
    None: lambda once: [WatchedBuffers(once=once)],
    EACH: lambda _: [],
    ONCE: lambda _: [BuffersOnce(pooled=False)],
    MEAN: lambda _: [BuffersOnce(pooled=True)],
}
_NORMS: Mapping[str | None, Callable[[], Part]] = {FROZEN: FrozenNorms, POOLED: PooledNorms, None: NormWarning}
