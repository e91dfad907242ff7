"""Load the settings of a run: a TOML file, flags over it, and what is wrong with them in words."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from microbatch.errors import ConfigError
from microbatch.train.run_settings import Settings, flag_name


def read_toml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Args:
        path: A TOML file whose keys are those of `Settings`, without sections.

    Returns:
        Its keys and values, not yet validated.

    Raises:
        ConfigError: It does not exist, cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        nearby = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"; did you mean {path.with_name(nearby[0])}?" if nearby else "; check the path given to --config"
        raise ConfigError(f"there is no configuration file {path}{hint}") from None
    except OSError as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is not valid TOML: its arrays are too deep in one another") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def load_settings(flags: Mapping[str, Any], *, file: Path | None = None, base: Settings | None = None) -> Settings:
    """Merge flags over a file over a base, and validate the result.

    Args:
        flags: Keys of `Settings`; `None` means that the flag was not given.
        file: A TOML file, or `None`.
        base: Settings under both, such as those of a run that is being resumed.

    Returns:
        The settings, every value of a kind and range that can work.

    Raises:
        ConfigError: A key is unknown, a value cannot work, or both ``steps`` and ``epochs`` were asked for.

    Example:
        >>> load_settings({"steps": 5, "seed": None}).steps
        5
    """
    given = {key: value for key, value in flags.items() if value is not None}
    from_file = read_toml(file) if file is not None else {}
    sources = {key: str(file) for key in from_file} | {key: flag_name(key) for key in given}
    _ask_for_units(from_file.get("memory"), where=f"memory in {file}")
    if isinstance(given.get("memory"), str):  # a number is another run's, in bytes
        _ask_for_units(given["memory"], where="--memory")
    layers = (base.model_dump(exclude_none=True) if base is not None else {}, from_file, given)
    merged: dict[str, Any] = {}
    for layer in layers:
        if "steps" in layer and "epochs" in layer:
            where = sources.get("steps", "the settings")
            raise ConfigError(
                f"{where}: both steps and epochs are set, and each sets the end of the run; keep one of them"
            )
        # A later layer that says when to stop replaces the earlier one's answer, whichever of the two it used.
        if "steps" in layer or "epochs" in layer:
            merged.pop("steps", None)
            merged.pop("epochs", None)
        merged |= layer
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources)) from None


_LEAST_WITHOUT_UNIT = 1 << 20
"""Nobody means fewer bytes than this with a number alone: it is a number of gigabytes whose unit was forgotten."""


def _ask_for_units(amount: object, *, where: str) -> None:
    """Refuse a small number without a unit."""
    text = str(amount).strip()
    if isinstance(amount, int | str) and re.fullmatch(r"\d+(\.\d+)?", text) and 0 < float(text) < _LEAST_WITHOUT_UNIT:
        raise ConfigError(
            f'{where} is {text}: {text} what? Write "{text} GiB" or "{text} MiB", or "{text} B" for bytes'
        )


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    """Turn a validation error into one line for each key at fault."""
    by_key: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(str(detail["loc"][0]), []).append(detail)
    lines: list[str] = []
    for key, details in by_key.items():
        source = sources.get(key, "settings")
        if details[0]["type"] == "extra_forbidden":
            lines.append(_unknown(key, source))
            continue
        reasons = " or ".join(dict.fromkeys(_reason(detail) for detail in details))
        # A union reports the value once for each of its members; the value itself is the same.
        value = details[0]["input"]
        shown = json.dumps(value) if isinstance(value, str | int | float | bool) else repr(value)
        named = source if source == flag_name(key) else f"{key} in {source}"
        lines.append(
            f"{named} is {shown}: it must be {reasons}"
            if details[0]["type"] != "value_error"
            else f"{named}: {reasons}"
        )
    return "\n".join(lines)


def _unknown(key: str, source: str) -> str:
    known = list(Settings.model_fields)
    aliases = {"lr": "learning_rate", "memory_budget": "memory", "budget": "memory", "precision": "autocast"}
    near = (
        [aliases[key]] if key in aliases else difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
    )
    hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
    return f"unknown key {key!r} in {source}; {hint}"


def _reason(detail: Mapping[str, Any]) -> str:
    context: Mapping[str, Any] = detail.get("ctx", {})
    match detail["type"]:
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "greater_than":
            return f"more than {context['gt']:g}"
        case "less_than":
            return f"less than {context['lt']}"
        case "int_type" | "int_from_float" | "int_parsing":
            return "a whole number"
        case "float_type" | "float_parsing" | "finite_number":
            return "a finite number"
        case "bool_type":
            return "true or false"
        case "string_type" | "string_too_short":
            return "a text"
        case "literal_error":
            return str(context["expected"])
        case "value_error":
            return str(context["error"])
        case _:
            return str(detail["msg"]).lower()
