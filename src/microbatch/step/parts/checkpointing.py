"""Activation checkpointing for blocks of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from microbatch.memory.recompute import checkpointed
from microbatch.step.part import OpenWindow, Part


class Checkpointing(Part):
    """Run blocks under activation checkpointing.

    Attributes:
        blocks: Names of the blocks; `None` if they are not chosen yet.
    """

    def __init__(self, blocks: Sequence[str] | None) -> None:
        self.blocks = None if blocks is None else tuple(blocks)
        self._chosen = blocks is None

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Wrap the blocks."""
        stack.enter_context(checkpointed(window.model, self.blocks or ()))

    def state(self) -> dict[str, Any]:
        """Return the blocks that ``checkpoint="auto"`` has chosen."""
        return {"blocks": None if self.blocks is None or not self._chosen else list(self.blocks)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore chosen blocks; blocks that were given by name stay."""
        blocks: Sequence[str] | None = state.get("blocks")
        if self._chosen:
            self.blocks = None if blocks is None else tuple(blocks)
