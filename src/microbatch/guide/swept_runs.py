"""Choose the runs of a sweep that the live view shows together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from microbatch.errors import ConfigError

_ASKED, _RUNS, _METRICS = "sweep.json", "runs", "metrics.jsonl"
_NAME = re.compile(r"batch-(\d{1,18})-lr-(.+)-seed-0")


def runs_in(path: Path) -> Sequence[Path]:
    """List the runs of a folder.

    Args:
        path: A run directory, or the folder of a sweep.

    Returns:
        The directory itself. Of a sweep, the run of each batch size with the first seed. Of several learning rates, the
        one with the longest file, because beaten runs end early.

    Raises:
        ConfigError: No run of the sweep has begun.
    """
    if not (path / _ASKED).is_file():
        return [path]
    found: dict[int, tuple[int, Path]] = {}
    for run in sorted((path / _RUNS).glob("batch-*-seed-0")):
        named, metrics = _NAME.fullmatch(run.name), run / _METRICS
        if named is None or not metrics.is_file():
            continue
        size, length = int(named[1]), metrics.stat().st_size
        if size not in found or found[size][0] < length:
            found[size] = length, run
    if not found:
        raise ConfigError(f"{path} is the folder of a sweep, and none of its runs has begun; look again later")
    return [run for _, (_, run) in sorted(found.items())]
