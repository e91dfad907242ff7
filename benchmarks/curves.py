"""The curves of a job whose loss couples samples, exact and as accumulation usually makes it, side by side.

::

    python -m benchmarks.curves                       both jobs: half an hour on two cores
    python -m benchmarks.curves --job images-batchnorm

Each job is run twice by ``microbatch train``, with ``--accumulation exact`` and ``plain``: the same weights at the
start, the same batches in the same order.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.machine import hardware, versions

OUT = Path(__file__).parent / "results"
SHOWN = {"images-batchnorm": ("loss", "validation loss", "accuracy"), "pairs": ("loss", "validation loss", "recall@1")}
WAYS = {"exact": "#0b7285", "plain": "#c2410c"}
Curve: TypeAlias = list[tuple[int, float]]
_WIDTH, _HEIGHT, _GAP = 300, 200, 60


def run(job: str, way: str, *, folder: Path) -> dict[str, Curve]:
    """Train a job one way.

    Args:
        job: A key of `SHOWN`.
        way: A key of `WAYS`.
        folder: Where the run is kept.

    Returns:
        What is shown of it, each as steps and values.
    """
    at = folder / f"{job}-{way}"
    command = ["-m", "microbatch", "train", job, "--accumulation", way, "--run", str(at), "--no-compare"]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command
    curves: dict[str, Curve] = {name: [] for name in SHOWN[job]}
    for line in (at / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record: dict[str, Any] = json.loads(line)
        validation = {
            "validation loss" if name == "loss" else name: value for name, value in record.get("validation", {}).items()
        }
        for name, curve in curves.items():
            value = record["loss"] if name == "loss" else validation.get(name)
            if value is not None:
                curve.append((record["step"], value))
    return curves


def svg(job: str, curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """Draw the curves.

    Args:
        job: What was trained.
        curves: Of each way, what is shown.

    Returns:
        An SVG document: a panel for each thing that is shown, in each of them a line for each way.
    """
    names = SHOWN[job]
    width, height = len(names) * (_WIDTH + _GAP) + _GAP // 2, _HEIGHT + 2 * _GAP
    box = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" role="img"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {box}><title>{job}: exact, and plain</title>']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for index, name in enumerate(names):
        left = _GAP + index * (_WIDTH + _GAP)
        parts += _panel(name, {way: curves[way][name] for way in WAYS}, left=left)
    for index, (way, color) in enumerate(WAYS.items()):
        parts.append(f'<text x="{_GAP + 60 * index}" y="{height - 8}" fill="{color}">{way}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(name: str, curves: Mapping[str, Curve], *, left: int) -> Iterator[str]:
    # A loss falls by factors, and what one way gains on the other is one.
    of = math.log if name.endswith("loss") else float
    values = [value for curve in curves.values() for _, value in curve]
    last = max(step for curve in curves.values() for step, _ in curve)
    low, high = min(values), max(values)
    note = ", on a logarithmic scale" if of is math.log else ""
    yield f'<text x="{left}" y="30"><tspan font-weight="bold">{name}</tspan>{note}</text>'
    frame = f'x="{left}" y="{_GAP}" width="{_WIDTH}" height="{_HEIGHT}"'
    yield f'<rect {frame} fill="none" stroke="#cbd5e1"/>'
    yield f'<text x="{left - 4}" y="{_GAP + 4}" text-anchor="end">{high:.3g}</text>'
    yield f'<text x="{left - 4}" y="{_GAP + _HEIGHT}" text-anchor="end">{low:.3g}</text>'
    yield f'<text x="{left + _WIDTH}" y="{_GAP + _HEIGHT + 16}" text-anchor="end">step {last}</text>'
    for way, curve in curves.items():
        points = " ".join(
            f"{left + _WIDTH * step / last:.1f},{_GAP + _HEIGHT * (of(high) - of(value)) / (of(high) - of(low)):.1f}"
            for step, value in curve
        )
        yield f'<polyline points="{points}" fill="none" stroke="{WAYS[way]}" stroke-width="1.5"/>'


def table(job: str, curves: Mapping[str, Mapping[str, Curve]], *, rows: int = 8) -> str:
    """Write some of the points as Markdown.

    Args:
        job: What was trained.
        curves: Of each way, what is shown.
        rows: Of the table, at most.

    Returns:
        The table: at some of the steps after which the job was evaluated, what is shown of each way.
    """
    names = SHOWN[job]
    found = {(way, name): dict(curves[way][name]) for way in WAYS for name in names}
    steps = sorted(found["exact", names[1]])
    steps = sorted({steps[round(index * (len(steps) - 1) / (rows - 1))] for index in range(rows)})
    lines = ["| step | " + " | ".join(f"{name}, {way}" for name in names for way in WAYS) + " |"]
    lines.append("|---" * (1 + len(names) * len(WAYS)) + "|")
    for step in steps:
        cells = " | ".join(f"{found[way, name][step]:.3f}" for name in names for way in WAYS)
        lines.append(f"| {step} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, draw and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("--job", nargs="+", default=list(SHOWN), choices=list(SHOWN))
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    made = "; ".join(f"{name} {value}" for name, value in {**hardware("cpu"), **versions()}.items())
    with tempfile.TemporaryDirectory() as folder:
        for job in given.job:
            curves = {way: run(job, way, folder=Path(folder)) for way in WAYS}
            text = table(job, curves)
            print(text)
            stem = given.out / f"curves-{job}"
            stem.with_suffix(".svg").write_text(svg(job, curves), encoding="utf-8")
            stem.with_suffix(".json").write_text(json.dumps({"job": job, **versions(), "curves": curves}))
            head = f"# `{job}`, exact and plain\n\n`python -m benchmarks.curves --job {job}`; {made}.\n"
            figure = f"![training and validation, both ways]({stem.name}.svg)"
            stem.with_suffix(".md").write_text(f"{head}\n{figure}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
