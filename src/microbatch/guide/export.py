"""A copy of the guide for hosting: the same page, with runs that were recorded in place of the playground's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from microbatch.errors import ConfigError
from microbatch.guide.page import RECORDED, STATIC, load_drawn, load_measured, page
from microbatch.guide.playground_settings import Settings, read_settings
from microbatch.guide.presets import PRESETS
from microbatch.guide.python_code import program
from microbatch.guide.single_file import single_file
from microbatch.guide.training import Training
from microbatch.train.rundir import jsonable

SINGLE = "guide.html"
"""The file that is the whole guide, for a double click."""

MOST_STEPS = 16
"""Steps of a recorded run: it is there to be looked at, not to learn much."""


def export(folder: Path, *, tell: Callable[[str], object] = lambda _: None) -> None:
    """Write the copy.

    Args:
        folder: New or empty.
        tell: Called with a sentence about each run.

    Raises:
        ConfigError: The folder holds something already, or cannot be written.

    Cost:
        Trains every preset for some steps: about half a minute.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; name a new folder with --export")
    try:
        (folder / "recorded").mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}") from error
    shutil.copytree(STATIC, folder / "static")
    text = page(load_measured(), load_drawn(), mode=RECORDED)
    (folder / "index.html").write_text(text, encoding="utf-8")
    recorded: dict[str, Any] = {}
    for name, preset in PRESETS.items():
        tell(f"recording “{preset.title}”")
        settings = read_settings(
            {**preset.settings, "steps": min(MOST_STEPS, preset.settings.get("steps", MOST_STEPS))}
        )
        recorded[name] = jsonable(record(settings))
        run = json.dumps(recorded[name], ensure_ascii=False)
        (folder / "recorded" / f"{name}.json").write_text(run, encoding="utf-8")
    (folder / SINGLE).write_text(single_file(text, STATIC, recorded), encoding="utf-8")


def record(settings: Settings) -> dict[str, Any]:
    """Train a run, and keep everything that it tells.

    Args:
        settings: Of the run.

    Returns:
        Its settings, its program, and its events, numbered as the server numbers them.
    """
    events: list[dict[str, Any]] = []

    def keep(kind: str, values: Mapping[str, Any]) -> None:
        events.append({"id": len(events) + 1, "kind": kind, **values})

    Training(settings, keep).run()
    return {"settings": settings.as_dict(), "program": program(settings), "events": events}
