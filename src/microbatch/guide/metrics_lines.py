"""What the live view reads of a line of metrics: by a table, because whoever wrote the file may be anyone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

NUMBERS = ("loss", "lr", "grad_norm", "per_second", "microbatch_size", "retries", "peak_bytes", "noise_scale")
PASSES = ("forward", "backward")
ENDS = ("wait", "finish", "optimizer")

MOST = 2**53
"""What no number of a line comes near: beyond it JavaScript no longer counts by ones."""


def read_object(text: bytes) -> dict[str, Any] | None:
    """Read an object of JSON.

    Args:
        text: Of a line, or of a file.

    Returns:
        The object; `None` for what is none, such as a line that was torn. Numbers that strict JSON cannot hold are
        `None` in it.

    Example:
        >>> read_object(b'{"loss": NaN}'), read_object(b'{"lo')
        ({'loss': None}, None)
    """
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_line(text: bytes) -> dict[str, Any] | None:
    """Read what is shown of one line of metrics.

    Args:
        text: The line.

    Returns:
        Its step and what of the rest is of the form that it has to be of; `None` for what is no line of metrics.

    Example:
        >>> read_line(b'{"step": 3, "loss": 0.5, "lr": "fast", "code": "x"}')
        {'step': 3, 'loss': 0.5}
    """
    values = read_object(text) or {}
    step = values.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 1 <= step < MOST:
        return None
    found = {
        **{name: _number(values.get(name)) for name in NUMBERS},
        "applied": False if values.get("applied") is False else None,
        "validation": _numbers(values.get("validation"), ("loss",)),
        "memory": _numbers(values.get("memory"), None),
        "timeline": _timeline(values.get("timeline")),
    }
    return {"step": step, **{name: value for name, value in found.items() if value is not None}}


def _timeline(value: object) -> dict[str, Any] | None:
    """Read the times of a step: of its ends, and of as many forwards as backwards."""
    ends = _numbers(value, ENDS)
    if ends is None or not isinstance(value, dict):
        return None
    forward, backward = ([_number(each) for each in _list(value.get(name))] for name in PASSES)
    if not forward or len(forward) != len(backward) or None in forward or None in backward:
        return None
    return {**ends, "forward": forward, "backward": backward}


def _numbers(value: object, names: Sequence[str] | None) -> dict[str, float] | None:
    """Read an object of sizes, times or losses; `None` unless every one that is asked for is a number."""
    if not isinstance(value, dict):
        return None
    found = {name: _number(value.get(name)) for name in (value if names is None else names)}
    numbers = {name: number for name, number in found.items() if number is not None}
    return numbers if numbers and len(numbers) == len(found) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -MOST < value < MOST else None  # which NaN is not either


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
