"""Find parameters without requires_grad that forward passes move, such as those of a momentum encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from microbatch.errors import WeightsMovedError
from microbatch.gradients.parameters import Frozen
from microbatch.shards import PLAIN
from microbatch.step.options import EACH, MEAN, ONCE
from microbatch.step.part import OpenWindow, Part
from microbatch.step.parts.watching import WINDOWS, buffers_advice, memory_of_some, moved_text, renorms
from microbatch.step.record import Step
from microbatch.step.saved_state import NO_MEMORY, Buffer

_KIND = "frozen weights"


class FrozenWeights(Part):
    """Treat parameters without ``requires_grad`` that passes move as buffers: copy, restore and move them like those.

    Which parameters move is not known at first. So the first windows copy all that could be a moving average of trained
    weights: those of their shapes. With ``buffers="once"`` or ``"mean"`` they copy all.

    Args:
        once: Whether ``buffers="once"`` could be given.
        lockstep: Whether all passes run in lockstep: none of them can start from the values before the window.

    Cost:
        Two reads of a version counter for each such parameter and window. In the first windows also the copies, which
        take no more memory than the trained weights, or memory of the host; after that copies of those that move.

    Source:
        Law S5.
    """

    def __init__(self, *, once: bool, lockstep: bool) -> None:
        self._once, self._lockstep = once, lockstep
        self._others: list[Frozen] = []
        self._versions: list[int] = []
        self._some = NO_MEMORY

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Copy the parameters that move or may move, and read the versions of the others."""
        frozen, moving = window.setup.trainable.frozen, window.setup.history.moving
        if not frozen:
            self._others, self._versions, self._some = [], [], NO_MEMORY
            return
        kept: list[Frozen] = []
        young = _is_young(window)
        if moving or young:
            plain = [each for each in frozen if type(each.parameter) in PLAIN and not _exempt(each.module)]
            kept = [each for each in plain if (each.module, each.name) in moving]
            window.undo.snapshot.keep(kept)
            if young:
                rest = [each for each in plain if (each.module, each.name) not in moving]
                governed = window.options.buffers in {ONCE, MEAN}
                rest = rest if governed else _of_trained_shapes(rest, window)
                window.undo.snapshot.keep(rest, on_host=governed)
                kept += rest
        ours = {id(each) for each in kept}
        self._others = [each for each in frozen if id(each) not in ours] if kept else frozen
        self._versions = [each.parameter._version for each in self._others]
        self._some = memory_of_some(window, self._others)

    def check(self, window: OpenWindow) -> None:
        """Warn about the parameters that the passes have moved, if there was more than one pass; refuse in lockstep."""
        kept = [each for each in window.undo.snapshot.buffers if each.memory is not None]
        if not kept and not self._others:
            return
        young, new = _is_young(window), self._new(window)
        moved = [each for each in kept if each.moved or (young and not each.same)]
        window.setup.history.moving.update((each.module, each.name) for each in (*new, *moved))
        once = window.options.buffers in {ONCE, MEAN}
        said: Sequence[Frozen | Buffer] = new if once else [*new, *moved]
        if said and len(window.done) > 1 and window.options.buffers != EACH:
            text = moved_text(window, said, "weights with requires_grad=False move")
            if self._lockstep:
                raise WeightsMovedError(f"{text}. {_LOCKSTEP}")
            late = (
                f". They began to move in this window, which has no copy of them: buffers={window.options.buffers!r} "
                "moves them once from the next window on"
            )
            advice = f"{buffers_advice(once=self._once)}. Or move these weights after {_AFTER}"
            window.setup.warn(_KIND, text + (late if once else f". {advice}"))

    def put_back(self, window: OpenWindow, error: BaseException) -> None:
        """Warn about parameters that a window has moved which failed, and which had no copy of them."""
        new = [] if window.undo.versions else self._new(window)
        self._some = NO_MEMORY
        if not new:
            return
        window.setup.history.moving.update((each.module, each.name) for each in new)
        text = moved_text(window, new, "weights with requires_grad=False moved")
        window.setup.warn(
            f"{_KIND} after an error",
            f"{text}. The window failed and had no copy of them, so they stay as they are; later windows put them back",
        )

    def done(self, window: OpenWindow, step: Step) -> None:
        """Drop the memory that was kept."""
        self._some = NO_MEMORY

    def _new(self, window: OpenWindow) -> list[Frozen]:
        """Return the parameters without a copy that have moved."""
        if not self._others:
            return []
        now, found = [each.parameter._version for each in self._others], list[Frozen]()
        if now != self._versions:
            trios = zip(self._others, now, self._versions, strict=True)
            found = [each for each, version, before in trios if version != before and not renorms(each.module)]
        replaced = self._some.replaced
        found += [each for each in self._others if id(each.parameter) in replaced and not _exempt(each.module)]
        old = window.setup.trainable.replaced(window.options.model).values() if _is_young(window) else ()
        if old and not window.options.is_sharded:
            gone = {id(each) for each in old if not each.is_meta}  # hooks that load weights for a call leave meta ones
            found += [each for each in self._others if id(each.parameter) in gone]
        return list({id(each): each for each in found}.values())


_AFTER = "accumulator.step(batch, loss_fn), outside of the model's forward"
_LOCKSTEP = (
    'batch_norm="exact" runs all microbatches in lockstep, and they share these weights. Move these weights after '
    f'{_AFTER}; buffers="each" keeps this behaviour without the error'
)


def _is_young(window: OpenWindow) -> bool:
    return window.setup.history.here < WINDOWS


def _of_trained_shapes(frozen: Sequence[Frozen], window: OpenWindow) -> list[Frozen]:
    """Return parameters of the shapes of trained weights, no more of a shape than there are weights."""
    left: Counter[Any] = Counter(each.parameter.shape for each in window.gradients.named)
    found: list[Frozen] = []
    for each in frozen:
        if left[each.parameter.shape] > 0:
            left[each.parameter.shape] -= 1
            found.append(each)
    return found


def _exempt(module: nn.Module) -> bool:
    """Return whether a layer moves the memory of its weights, or shortens their rows, and changes no result by it."""
    return isinstance(module, nn.RNNBase) or renorms(module)
