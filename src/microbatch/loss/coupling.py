"""Notice that a loss over pairs of samples was computed, so that a window can tell whether it saw the whole batch."""

from __future__ import annotations

from contextvars import ContextVar

_noticed: ContextVar[set[str] | None] = ContextVar("noticed", default=None)


def listen() -> set[str]:
    """Return a set that will hold the names of the coupled losses called in this context from now on."""
    found = set[str]()
    _noticed.set(found)
    return found


def stop() -> None:
    """Stop noticing."""
    _noticed.set(None)


def notice(name: str) -> None:
    """Record the call of a loss that couples samples."""
    found = _noticed.get()
    if found is not None:
        found.add(name)
