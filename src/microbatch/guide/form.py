"""The playground's form, written from the table of its settings."""

from __future__ import annotations

from html import escape
from pathlib import Path

from microbatch.guide.playground_settings import FIELDS, Field
from microbatch.guide.presets import PRESETS, TOUR

KNOBS = ("batch", "microbatch", "lr")
"""What the playground asks first."""

GROUPS = {
    "What": ("model", "norm", "coupling", "precision", "divide"),
    "The memory": ("tank", "recover"),
    "The step": ("optimizer", "rule"),
    "The run": ("steps", "seed", "compare", "pace"),
}

WIDE = ("model", "norm", "coupling", "precision", "divide", "optimizer", "rule")
"""Whose choices take more words than half a column holds."""


def form_html(*, recorded: bool) -> str:
    """Write the playground.

    Args:
        recorded: Whether it plays recorded runs instead of training.

    Returns:
        Presets, form, and the places where a run is shown.
    """
    known = {field.name: field for field in FIELDS}
    groups = "".join(
        f'<fieldset><legend>{title}</legend><div class="fields">'
        f"{''.join(_field(known[name]) for name in names)}</div></fieldset>"
        for title, names in GROUPS.items()
    )
    knobs = "".join(_field(known[name]) for name in KNOBS)
    text = (Path(__file__).parent / "playground.html").read_text(encoding="utf-8")
    places = {
        "presets": tour_html(),
        "knobs": "" if recorded else knobs,
        "groups": "" if recorded else groups,
        "recorded": "" if recorded else " hidden",
        "live": " hidden" if recorded else "",
    }
    for name, piece in places.items():
        text = text.replace("[[" + name + "]]", piece)
    return text


def tour_html() -> str:
    """Write the tour: its stops, numbered, by group.

    Returns:
        A list for each group.
    """
    numbers = {name: number for number, name in enumerate(PRESETS, start=1)}
    return "".join(
        f'<li><p class="group" id="tour-{index}">{escape(group)}</p><ol aria-labelledby="tour-{index}">'
        + "".join(
            f'<li><button type="button" data-preset="{name}"><span class="stop">{numbers[name]}</span> '
            f"{escape(preset.title)}</button></li>"
            for name, preset in stops.items()
        )
        + "</ol></li>"
        for index, (group, stops) in enumerate(TOUR.items())
    )


def _field(field: Field) -> str:
    name, label = field.name, escape(field.label)
    described = f'aria-describedby="help-{name}"'
    if field.choices is not None:
        options = "".join(
            f'<option value="{value}"{" selected" if value == field.default else ""}>{escape(words)}</option>'
            for value, words in field.choices.items()
        )
        control = f'<select id="f-{name}" name="{name}" {described}>{options}</select>'
    else:
        kind = "numeric" if field.whole and field.word is None else "decimal"
        mode = "text" if field.word is not None else kind
        control = (
            f'<input id="f-{name}" name="{name}" value="{field.default}" inputmode="{mode}" autocomplete="off" '
            f"{described}>"
        )
    bounds = (
        ""
        if field.choices is not None
        else f" {_written(field.low)} to {_written(field.high)}"
        + (f", or {field.word}." if field.word is not None else ".")
    )
    of = f' data-of="{field.of}"' if field.of is not None else ""
    return (
        f'<div class="field{" wide" if name in WIDE else ""}"{of}><label for="f-{name}">{label}</label>{control}'
        f'<p class="help" id="help-{name}">{escape(field.help)}{bounds}</p></div>'
    )


def _written(number: float) -> str:
    return f"{number:,.6f}".rstrip("0").rstrip(".")
