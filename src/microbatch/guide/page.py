"""The page as text: prose, numbers, pictures, code and form put together; readable without a line of JavaScript."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from microbatch.errors import ConfigError
from microbatch.guide.number_format import FORMATS
from microbatch.guide.paste_check import MOST_SOURCE
from microbatch.guide.paste_loops import LOOPS
from microbatch.guide.playground_settings import FIELDS, GROUPS, KNOBS, WIDE, read_settings
from microbatch.guide.presets import PRESETS, TOUR
from microbatch.guide.python_code import program

ROOM = Path(__file__).parent
STATIC = ROOM / "static"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
"""Scripts, styles and data from where the page is from; nothing inline, nothing sent elsewhere. Said in the page too,
for the copy that any server may host."""

STAGED = ("hero", "loop", "code")
"""The figures that are moments of the stage."""

HERO_CUT = 4
"""Microbatches of the step that the page shows before anyone touches it."""

LIVE, RECORDED = "live", "recorded"

TITLES = {"full_batch": "Whole batch", "by_hand": "By hand", "with_microbatch": "With microbatch"}
"""What the examples are called."""

# Whatever a template writes is escaped, unless it says `safe`; what it names must be there.
_TEMPLATES = Environment(
    loader=FileSystemLoader(ROOM), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.filters.update(FORMATS)
_TEMPLATES.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}


def page(measured: Mapping[str, Any], drawn: Mapping[str, Any], *, mode: str = LIVE) -> str:
    """Put the page together.

    Args:
        measured: What ``measured.json`` holds.
        drawn: The figures as they stand before anyone touches them, by name; what ``drawn.json`` holds.
        mode: `LIVE` where the playground trains, `RECORDED` for a copy that plays recorded runs.

    Returns:
        The document.

    Raises:
        ConfigError: The text asks for a number or a figure that is not there.
    """
    try:
        values = {**measured, "derived": derived(measured)}
        questions = json.loads(_TEMPLATES.get_template("quiz.json").render(values))
        return _TEMPLATES.get_template("page.html").render(
            **values,
            mode=mode,
            recorded=mode == RECORDED,
            policy=Markup(POLICY),  # noqa: S704 -- written here
            drawn=drawn,
            staged=STAGED,
            questions=questions,
            listings=listings(["full_batch", "by_hand", "with_microbatch"]),
            fields={field.name: field for field in FIELDS},
            knobs=KNOBS,
            groups=GROUPS,
            wide=WIDE,
            tour=TOUR,
            numbers={name: number for number, name in enumerate(PRESETS, start=1)},
            loops=LOOPS,
            most_source=MOST_SOURCE,
            program=program(read_settings({})),
            data=page_data(measured),
        )
    except (KeyError, UndefinedError) as error:
        raise ConfigError(f"the page asks for what its numbers and figures do not hold: {error}") from error


def live_page() -> str:
    """Put the page of the live view together.

    Returns:
        The document; what it shows comes from the server.
    """
    return _TEMPLATES.get_template("live.html").render()


def derived(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Compute what the text says of several measured numbers together.

    Args:
        measured: What ``measured.json`` holds.

    Returns:
        Ratios and sums.
    """
    alone, window = measured["memory"]["alone"], measured["memory"]["window"]
    reference = measured["reference"]
    whole, cut, row = alone[str(reference["batch"])], window[str(reference["microbatch"])], window["1"]
    norms, rates = measured["batch_norm"], measured["speed"]["per_second"]
    at = norms["sizes"].index(reference["microbatch"])
    hero_window = window[str(reference["batch"] // HERO_CUT)]
    return {
        "share": cut["total"] / whole["total"],
        "hero": {
            "cut": HERO_CUT,
            "share": hero_window["total"] / whole["total"],
            "apart": measured["shares"]["cuts"][str(HERO_CUT)]["apart"],
        },
        "total_ratio": whole["total"] / cut["total"],
        "activations_ratio": whole["activations"] / cut["activations"],
        "activations_first": row["activations"],
        "activations_whole": window[str(reference["batch"])]["activations"],
        "fixed": 2 * row["parameters"] + row["optimizer state"],
        "norm_size": norms["sizes"][at],
        "norm_batch": norms["sizes"][-1],
        "batch_norm": norms["errors"][at],
        "batch_norm_exact": measured["batch_norm_exact"]["errors"][at],
        "group_norm": measured["group_norm"]["errors"][at],
        "slowest": rates[0] / max(rates),
        "cut_total": cut["total"],
        "whole_total": whole["total"],
        "pairs": measured["pairs"]["errors"][at],
        "pairs_coupled": measured["pairs_coupled"]["errors"][at],
        "one": 1.0,
    }


@cache
def example(name: str) -> str:
    """Read an example.

    Args:
        name: Of its file, without the ending.

    Returns:
        Its source; ``#:`` after a line names the phases that it belongs to.

    Raises:
        ConfigError: There is no such file.
    """
    examples = {file.stem: file for file in (ROOM / "examples").glob("*.py")}
    if name not in examples:
        raise ConfigError(f"there is no example {name!r}; there are {', '.join(sorted(examples))}")
    return examples[name].read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of an example.

    Attributes:
        code: As it is written.
        phases: What happens in it, in words with spaces between them.
        added: Whether the first example does not have it.
    """

    code: str
    phases: str
    added: bool


def listings(names: Sequence[str]) -> dict[str, list[Line]]:
    """Read examples, every line with the phases that it belongs to.

    Args:
        names: Of the examples; the lines that the first one does not have are marked in the others.

    Returns:
        The lines that are shown, by title: neither imports nor the model, which all examples begin with.
    """
    first = {code for code, _ in _shown(names[0])}
    return {
        TITLES[name]: [Line(code, phases, bool(code) and code not in first) for code, phases in _shown(name)]
        for name in names
    }


def _shown(name: str) -> Iterator[tuple[str, str]]:
    """Yield the code and the phases of each line from the first phase on."""
    lines = example(name).rstrip("\n").split("\n")
    start = next(number for number, line in enumerate(lines) if "#: begin" in line)
    for number, line in enumerate(lines[start:], start):
        if line or lines[number - 1]:  # one blank line tells parts apart as well as two
            code, _, phases = line.partition("  #: ")
            yield code, phases


def page_data(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Gather what the page's own modules need to know.

    Args:
        measured: What ``measured.json`` holds.

    Returns:
        Plain values.
    """
    fields = {
        field.name: {
            "default": field.default,
            "choices": None if field.choices is None else list(field.choices),
            "low": field.low,
            "high": field.high,
            "whole": field.whole,
            "word": field.word,
            "label": field.label,
            "of": field.of,
        }
        for field in FIELDS
    }
    presets = {
        name: {"title": each.title, "text": each.text, "settings": dict(each.settings)}
        for name, each in PRESETS.items()
    }
    return {"measured": measured, "fields": fields, "presets": presets}


def load_measured() -> dict[str, Any]:
    """Read the numbers.

    Returns:
        What ``measured.json`` holds.
    """
    return json.loads((STATIC / "measured.json").read_text(encoding="utf-8"))


def load_drawn() -> dict[str, Any]:
    """Read the figures.

    Returns:
        What ``drawn.json`` holds.
    """
    return json.loads((ROOM / "drawn.json").read_text(encoding="utf-8"))
