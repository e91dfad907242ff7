"""What the live view reads of a line of metrics: by a table, because the file may hold anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

CURVES = ("loss", "lr", "grad_norm", "per_second", "noise_scale")
"""Numbers that are drawn over the steps; any finite double."""

COUNTS = ("microbatch_size", "retries", "peak_bytes")
"""Whole numbers from zero on."""

ENDS = ("wait", "finish", "optimizer")

MOST = 2**53
"""Upper bound of whole numbers: beyond it JavaScript no longer counts by ones."""

LARGEST = 1e300
"""Upper bound of other numbers: differences and sums of two of them are still finite."""

MOST_NAMES = 16
"""Names in the memory of one step; the library writes five."""

LONGEST_TEXT = 200

TOGETHER = 64
"""Lines that are parsed at once: during a longer call of the parser, every other thread would wait."""


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
        value = _parse(text.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_lines(lines: Sequence[bytes]) -> list[dict[str, Any] | None]:
    """Read what is shown of lines of metrics.

    Args:
        lines: Whole lines, without their ends.

    Returns:
        One entry for each line, as `read_line` returns it.

    Cost:
        About 10 microseconds a line. `TOGETHER` lines are parsed as one array; where one of them is no JSON, each
        by itself.
    """
    groups = (lines[begin : begin + TOGETHER] for begin in range(0, len(lines), TOGETHER))
    return [each for group in groups for each in _read_group(group)]


def _read_group(lines: Sequence[bytes]) -> list[dict[str, Any] | None]:
    try:
        found: list[Any] = _parse(f"[{b','.join(lines).decode()}]")
    except (ValueError, RecursionError):
        found = []
    if len(found) != len(lines):
        return [read_line(line) for line in lines]
    return [read_values(each) if isinstance(each, dict) else None for each in found]


def read_line(text: bytes) -> dict[str, Any] | None:
    """Read what is shown of one line of metrics.

    Args:
        text: The line.

    Returns:
        Its step and every value that has the right form; `None` for what is no line of metrics. A loss that is not
        finite is `None`. ``"odd"`` counts the numbers that have a wrong type.

    Example:
        >>> read_line(b'{"step": 3, "loss": NaN, "lr": "fast", "code": "x"}')
        {'step': 3, 'loss': None, 'odd': 1}
    """
    values = read_object(text)
    return None if values is None else read_values(values)


def read_values(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what is shown of one parsed line of metrics.

    Args:
        values: The line's object.

    Returns:
        As `read_line`.
    """
    step = values.get("step")
    if type(step) is not int or not 1 <= step < MOST:
        return None
    line: dict[str, Any] = {"step": step}
    odd = _take_numbers(values, line)
    if "loss" in values and "loss" not in line:
        line["loss"] = None
    if isinstance(values.get("unit"), str):
        line["unit"] = printable(values["unit"])
    if values.get("applied") is False:
        line["applied"] = False
    for name, read in _PARTS.items():
        value = values.get(name)
        if value is not None:
            part = read(value)
            if part is not None:
                line[name] = part
            else:
                odd += 1
    if odd:
        line["odd"] = odd
    return line


def _take_numbers(values: Mapping[str, Any], line: dict[str, Any]) -> int:
    """Put a line's numbers where they belong; return how many have a wrong type."""
    odd = 0
    for name in CURVES:
        value = values.get(name)
        if value is not None:
            number = _number(value)
            if number is not None:
                line[name] = number
            elif type(value) is not float:
                odd += 1
    for name in COUNTS:
        value = values.get(name)
        if type(value) is int and 0 <= value < MOST:
            line[name] = value
        elif value is not None:
            odd += 1
    return odd


def read_summary(text: bytes) -> dict[str, Any] | None:
    """Read what is shown of a run's summary.

    Args:
        text: Of ``summary.json``.

    Returns:
        Its step, whether the run has finished, and what stopped it; `None` for what is no summary.

    Example:
        >>> read_summary(b'{"step": 3, "finished": false, "stopped_by": "SIGINT", "loss": 1e999}')
        {'step': 3, 'finished': False, 'stopped_by': 'SIGINT'}
    """
    values = read_object(text) or {}
    step = values.get("step")
    if type(step) is not int or not 0 <= step < MOST:
        return None
    stopped_by = values.get("stopped_by")
    return {
        "step": step,
        "finished": values.get("finished") is True,
        "stopped_by": printable(stopped_by) if isinstance(stopped_by, str) else None,
    }


def read_setting(value: object) -> str | float | bool | None:
    """Read a setting of a run that is worth showing.

    Args:
        value: As TOML holds it.

    Returns:
        The text, number or truth value; `None` for everything else, and for numbers that JSON cannot hold.
    """
    if isinstance(value, bool):
        return value
    return printable(value) if isinstance(value, str) else _number(value)


def printable(text: str) -> str:
    r"""Make a text of unknown origin safe to send and to show.

    Args:
        text: A name or a setting; bytes of a file's name that are no text are lone surrogates in it.

    Returns:
        The text, at most `LONGEST_TEXT` characters of it; signs that cannot be shown are written as Python escapes.

    Example:
        >>> print(printable("run\udcff\n"))
        run\udcff\n
    """
    if len(text) <= LONGEST_TEXT and text.isprintable():
        return text
    short = text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in short)


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=lambda _: None)


def _timeline(value: object) -> dict[str, Any] | None:
    """Read the times of a step: of its ends, and of as many forwards as backwards."""
    if not isinstance(value, dict):
        return None
    forward, backward = value.get("forward"), value.get("backward")
    if not isinstance(forward, list) or not isinstance(backward, list) or not 0 < len(forward) == len(backward):
        return None
    ends = [value.get(name) for name in ENDS]
    if not all(map(_is_size, chain(ends, forward, backward))):
        return None
    return {**dict(zip(ENDS, ends, strict=True)), "forward": forward, "backward": backward}


def _validation(value: object) -> dict[str, float] | None:
    loss = _number(value.get("loss")) if isinstance(value, dict) else None
    return None if loss is None else {"loss": loss}


def _sizes(value: object) -> dict[str, float] | None:
    """Read an object of sizes or times; `None` unless every one of them is a number from zero on."""
    if not isinstance(value, dict) or not 0 < len(value) <= MOST_NAMES:
        return None
    return {printable(name): size for name, size in value.items()} if all(map(_is_size, value.values())) else None


_PARTS = {"validation": _validation, "memory": _sizes, "timeline": _timeline}


def _is_size(value: object) -> bool:
    return (type(value) is float or type(value) is int) and 0 <= value < MOST  # which NaN is not either


def _number(value: object) -> float | None:
    if type(value) is float:
        return value if -LARGEST < value < LARGEST else None  # which NaN is not either
    return value if type(value) is int and -MOST < value < MOST else None
