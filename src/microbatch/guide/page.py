"""The page as text: prose, numbers, pictures, code and form put together; readable without a line of JavaScript."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from microbatch.errors import ConfigError
from microbatch.guide.form import form_html
from microbatch.guide.number_format import FORMATS
from microbatch.guide.paste_form import paste_html
from microbatch.guide.playground_settings import FIELDS, read_settings
from microbatch.guide.presets import PRESETS
from microbatch.guide.python_code import program

ROOM = Path(__file__).parent
STATIC = ROOM / "static"
PLACE = re.compile(r"\{\{(?P<path>[\w.]+)(?:\|(?P<format>\w+))?\}\}")
ASKED = re.compile(r"\{\{asks:(?P<section>\w+)\}\}")
PAIR = re.compile(r"\{\{pair:(?P<one>[\w.]+),(?P<other>[\w.]+)\}\}")
FIGURE = re.compile(r"\{\{figure:(?P<name>\w+)\}\}")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
"""Scripts, styles and data from where the page is from; nothing inline, nothing sent elsewhere. Said in the page too,
for the copy that any server may host."""

STAGED = ("hero", "loop", "code")
"""The figures that are moments of the stage."""

PLAYER = '<div class="player" data-player hidden></div>'

LIVE, RECORDED = "live", "recorded"


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
    values = {**measured, "same": 1.0, "derived": derived(measured), "program": program(read_settings({}))}
    pieces = {
        "patterns": _read("patterns.svg"),
        "code": code_html(["full_batch", "by_hand", "with_microbatch"]),
        "cards": _read("cards.html"),
        "paste": paste_html(recorded=mode == RECORDED),
        "playground": form_html(recorded=mode == RECORDED),
        "use": _read("use.html"),
        "data": data_html(measured),
        "mode": mode,
        "policy": POLICY,
    }
    text = _read("page.html")
    for name, piece in pieces.items():
        text = text.replace("{{" + name + "}}", piece)
    questions = json.loads(_read("quiz.json"))
    text = ASKED.sub(lambda match: questions_html(questions, match["section"]), text)
    text = PAIR.sub(lambda match: pair_html(find(match["one"], values), find(match["other"], values)), text)
    text = FIGURE.sub(lambda match: figure_html(match["name"], drawn), text)
    return PLACE.sub(lambda match: fill(match, values), text)


def live_page() -> str:
    """Put the page of the live view together.

    Returns:
        The document; what it shows comes from the server.
    """
    return _read("live.html").replace("{{patterns}}", _read("patterns.svg"))


def fill(match: re.Match[str], values: Mapping[str, Any]) -> str:
    """Write one number.

    Args:
        match: Of `PLACE`: where the number is found, and how it is written.
        values: Nested by name.

    Returns:
        The number, as people write it.

    Raises:
        ConfigError: There is no such number, or no such way to write it.
    """
    value = find(match["path"], values)
    way = match["format"]
    if way is not None and way not in FORMATS:
        raise ConfigError(f"there is no way to write a number called {way!r}; there are {', '.join(FORMATS)}")
    return escape(str(value) if way is None else FORMATS[way](value))


def find(path: str, values: Mapping[str, Any]) -> Any:
    """Find one number.

    Args:
        path: Names with points between them.
        values: Nested by name.

    Returns:
        The number.

    Raises:
        ConfigError: There is no such number.
    """
    value: Any = values
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise ConfigError(f"the text asks for {path!r}, which measured.json does not hold")
        value = value[name]
    return value


def pair_html(one: float, other: float) -> str:
    """Draw two numbers as bars, for a card that says them in words.

    Args:
        one: Not negative.
        other: Above zero.

    Returns:
        A small picture.
    """
    most = max(one, other)
    return (
        '<svg class="bars" viewBox="0 0 100 18" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
        f'<rect width="{100 * one / most:.1f}" height="7"/>'
        f'<rect y="10" width="{100 * other / most:.1f}" height="7"/></svg>'
    )


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
    return {
        "share": cut["total"] / whole["total"],
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


def figure_html(name: str, drawn: Mapping[str, Any]) -> str:
    """Write a figure: its picture, what it says, and its table.

    Args:
        name: Of the figure.
        drawn: All of them.

    Returns:
        The element, which JavaScript makes interactive where there is any.

    Raises:
        ConfigError: There is no such figure.
    """
    if name not in drawn:
        raise ConfigError(f"there is no figure {name!r}; there are {', '.join(drawn)}")
    each = drawn[name]
    return (
        f'<figure class="figure{" staged" if name in STAGED else ""}" data-figure="{name}">'
        f'<div class="controls" data-controls hidden></div><div class="drawing" data-drawing>{each["svg"]}</div>'
        f"{PLAYER if name in STAGED else ''}<figcaption><p data-say>{escape(each['say'])}</p>"
        f'<details class="twin"><summary>The same as a table</summary><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Table: {name}" data-table>{each["table"]}</div></details></figcaption></figure>'
    )


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


TITLES = {"full_batch": "The whole batch", "by_hand": "Accumulated by hand", "with_microbatch": "With microbatch"}


def code_html(names: Sequence[str]) -> str:
    """Write examples, every line with the phases that it belongs to.

    Args:
        names: Of the examples; the lines that the first one does not have are marked in the others.

    Returns:
        A listing each.
    """
    first = {_code(line) for line in _shown(example(names[0]))}
    listings = "".join(
        f'<div><h3>{TITLES[name]}</h3><pre class="listing" tabindex="0" aria-label="{TITLES[name]}"><code>'
        f"{''.join(_line(line, added=_code(line) not in first) for line in _shown(example(name)))}</code></pre></div>"
        for name in names
    )
    return f'<div class="listings">{listings}</div>'


def _shown(source: str) -> list[str]:
    """Leave out what all examples begin with: imports and the model."""
    lines = source.rstrip("\n").split("\n")
    start = next(number for number, line in enumerate(lines) if "#: begin" in line)
    # One blank line tells parts apart as well as two.
    return [line for number, line in enumerate(lines) if number >= start and (line or lines[number - 1])]


def _code(line: str) -> str:
    return line.partition("  #: ")[0].strip()


def _line(line: str, *, added: bool) -> str:
    code, _, phases = line.partition("  #: ")
    mark = " added" if added and code else ""
    return f'<span class="line{mark}" data-phase="{phases}">{escape(code) or " "}\n</span>'


def questions_html(questions: Sequence[Mapping[str, Any]], section: str) -> str:
    """Write the questions of a section, which are asked before its figure answers them.

    Args:
        questions: All of them, with answers, the right one's number, why, and the section that answers.
        section: Its anchor.

    Returns:
        The questions; without JavaScript the explanations can be opened.
    """
    items: list[str] = []
    for number, question in enumerate(questions, start=1):
        if question["see"] != section:
            continue
        right = question["answers"][question["right"]]
        choices = "".join(
            f'<label><input type="radio" name="q{number}" value="{index}"'
            f"{' data-right' if index == question['right'] else ''}> <span>{answer}</span></label>"
            for index, answer in enumerate(question["answers"])
        )
        items.append(
            f'<div class="question"><fieldset><legend>{question["ask"]}</legend>{choices}</fieldset>'
            f'<p class="verdict" role="status" data-verdict></p>'
            f"<details><summary>Explanation</summary><p><strong>{_begun(right)}.</strong> "
            f"{question['why']}</p></details></div>"
        )
    return "".join(items)


def _begun(words: str) -> str:
    return words[:1].upper() + words[1:]


def data_html(measured: Mapping[str, Any]) -> str:
    """Write what the page's own modules need to know.

    Args:
        measured: What ``measured.json`` holds.

    Returns:
        A block of JSON, which no browser runs.
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
    text = json.dumps(
        {"measured": measured, "fields": fields, "presets": presets}, ensure_ascii=False, separators=(",", ":")
    )
    return f'<script type="application/json" id="data">{text.replace("<", chr(92) + "u003c")}</script>'


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
    return json.loads(_read("drawn.json"))


def _read(name: str) -> str:
    return (ROOM / name).read_text(encoding="utf-8")
