"""Notice that a loss over pairs of samples was computed, so that a window can tell whether it saw the whole batch."""

from __future__ import annotations

from contextvars import ContextVar

_noticed: ContextVar[set[str] | None] = ContextVar("noticed", default=None)


def listen() -> set[str]:
    """Start to notice coupled losses in this context.

    Returns:
        The names of the losses that are called from now on.
    """
    found = set[str]()
    _noticed.set(found)
    return found


def stop() -> None:
    """Stop noticing."""
    _noticed.set(None)


def notice(name: str) -> None:
    """Record the call of a loss that couples samples.

    Args:
        name: Name of the loss, for messages.
    """
    found = _noticed.get()
    if found is not None:
        found.add(name)
