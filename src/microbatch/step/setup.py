"""The objects that one window consists of, and the policy for running it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from microbatch.gradients.gradient_sum import GradientSum
from microbatch.gradients.parameters import Trainable
from microbatch.step.history import History
from microbatch.step.options import Options
from microbatch.step.part import OpenWindow, Part, Passes, Peers
from microbatch.step.size.sizing import Sizing
from microbatch.warned import WarnOnce


class Attempt:
    """The policy after a failure: whether the batch of a window runs again; by default, it never does.

    Attributes:
        started: Start of the first attempt, from `time.perf_counter`; `None` before it.
        retries: Number of attempts before this one.
        twice: Whether a coupled batch must be encoded twice, because its graphs took too much memory.
    """

    started: float | None = None
    retries: int = 0
    twice: bool = False

    def failed(self, window: OpenWindow, error: BaseException) -> bool:
        """Return whether the same batch runs again; the window has restored everything."""
        del window, error
        return False

    def give_up(self) -> None:
        """Do not run the batch again, because another rank has given up."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The objects and functions that one window consists of; `compose.py` creates them.

    Attributes:
        options: The options of the accumulator.
        history: Counts and settings from earlier windows.
        parts: Every part, the outermost first, including peers and passes.
        peers: The other ranks.
        passes: The order in which microbatches run.
        sizing: Returns the microbatch size for a batch with a number of rows.
        sums: Creates the gradient sums for a rank index.
        couple: Creates the encoder of a batch with a coupled loss.
        finish: Takes the step, or leaves the gradient; returns fields of the `Step` record.
        live_bytes: Returns the bytes in use now; `None` if they are not measured.
        warn: Issues each kind of warning once.
        trainable: Lists the parameters of a window.
        hooked: Cache of the parts that override a hook, by hook.
    """

    options: Options
    history: History
    parts: Sequence[Part]
    peers: Peers
    passes: Passes
    sizing: Callable[[int], Sizing]
    sums: Callable[[int], GradientSum]
    couple: Callable[..., Any]
    finish: Callable[[OpenWindow], dict[str, Any]]
    live_bytes: Callable[[], int | None]
    warn: WarnOnce = field(default_factory=WarnOnce)
    trainable: Trainable = field(default_factory=Trainable)
    hooked: dict[str, list[Part]] = field(default_factory=dict[str, list[Part]])

    def having(self, hook: str) -> list[Part]:
        """Return the parts that override a hook, the outermost first."""
        found = self.hooked.get(hook)
        if found is None:
            plain = [getattr(kind, hook) for kind in (Part, Passes, Peers)]
            found = self.hooked[hook] = [part for part in self.parts if getattr(type(part), hook) not in plain]
        return found
