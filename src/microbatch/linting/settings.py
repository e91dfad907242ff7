"""The doctor's settings: the table `[tool.microbatch.doctor]` of the nearest pyproject.toml, and flags over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microbatch.errors import ConfigError
from microbatch.linting.rules.table import BY_NAME, chosen

__all__ = ["DoctorSettings", "read_settings"]

_TABLE = "[tool.microbatch.doctor]"
_LISTS = ("select", "ignore", "exclude")


@dataclass(frozen=True)
class DoctorSettings:
    """What is reported, of which files.

    Attributes:
        select: Beginnings of the codes that are reported; none for all.
        ignore: Likewise of those that are not; of two beginnings the longer one wins.
        exclude: Patterns of files and folders that are left out.
        strict: Whether a fault that depends on something counts as much as a certain one.
        base: The folder that the patterns are relative to; `None` for the current one.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = False
    base: Path | None = None

    def keeps(self, code: str) -> bool:
        """Return whether findings of a rule are reported; what could not be read, MB000, always is."""
        if code == "MB000":
            return True
        # The longer beginning wins: `select = ["MB105"]` with `ignore = ["MB1"]` keeps MB105.
        ignored = max((len(each) for each in self.ignore if code.startswith(each)), default=-1)
        return any(len(each) > ignored for each in self.select or ("",) if code.startswith(each))


def read_settings(
    start: Path,
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strict: bool = False,
) -> DoctorSettings:
    """Read the nearest pyproject.toml that has a table of ours, and put what the command line says over it.

    Args:
        start: The folder, or the file, from which the nearest one is looked for, upwards.
        select: Codes, their beginnings, names of rules, or ALL, several in one text where commas divide them; empty:
            the file's.
        ignore: Likewise.
        exclude: Patterns; empty: the file's, which are relative to its folder.
        strict: True goes over the file.

    Returns:
        The settings.

    Raises:
        ConfigError: The file is not TOML, or has a key or a value that cannot work.
        LintError: A code names no rule.
    """
    file, table = _nearest(start)
    values = {name: _texts(file, name, table[name]) for name in _LISTS if name in table}
    for name in table:
        if name not in {*_LISTS, "strict"}:
            raise ConfigError(f"{file}: {_TABLE} has no key {name!r}; its keys are {', '.join(_LISTS)} and strict")
    if not isinstance(table.get("strict", False), bool):
        raise ConfigError(f"{file}: {_TABLE} strict must be true or false, not {table['strict']!r}")
    codes = {
        "select": _codes(select) or _codes(values.get("select", ())),
        "ignore": _codes(ignore) or _codes(values.get("ignore", ())),
    }
    given = tuple(part for each in exclude for part in each.split(",") if part)
    return DoctorSettings(
        **codes,
        exclude=given or tuple(values.get("exclude", ())),
        strict=strict or table.get("strict", False),
        base=None if given or file is None else file.parent,
    )


def _nearest(start: Path) -> tuple[Path | None, Mapping[str, Any]]:
    for file in _candidates(start):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if "microbatch" not in text:  # most files, for which a parser need not be imported
            continue
        import tomllib  # noqa: PLC0415

        try:
            table: Any = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{file} is not TOML: {error}") from None
        for name in ("tool", "microbatch", "doctor"):
            table = table.get(name) if isinstance(table, dict) else None
        if isinstance(table, dict):
            return file, table
        if table is not None:
            raise ConfigError(f"{file}: {_TABLE} must be a table, not {table!r}")
    return None, {}


def _candidates(start: Path) -> Iterator[Path]:
    try:
        start = start.absolute()
        folders = [*([start] if start.is_dir() else []), *start.parents]
        yield from (file for folder in folders if (file := folder / "pyproject.toml").is_file())
    except (OSError, ValueError):  # no name of a folder: said where it is read
        return


def _texts(file: Path | None, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{file}: {_TABLE} {name} must be a list of texts, not {value!r}")
    return tuple(value)


def _codes(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the codes, or their beginnings, that texts name; the beginning of all is empty."""
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    for name in names:
        chosen(name)  # or it raises
    codes = (BY_NAME[name.lower()].code if name.lower() in BY_NAME else name.upper() for name in names)
    return tuple("" if code == "ALL" else code for code in codes)
