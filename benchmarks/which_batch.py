"""Which batch size, and which learning rate with it: the study of `docs/which-batch.md`.

::

    python -m benchmarks.which_batch                        all sweeps: some twenty minutes on two cores
    python -m benchmarks.which_batch --only images --out /tmp/study
    python -m benchmarks.which_batch --quick                does everything run?
    python -m benchmarks.which_batch --page                 write the page's numbers again from the results

Each sweep is a process of its own with one thread, and as many run at once as there are cores, at most two. A study
that was stopped goes on where it stood with the same ``--folder``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import microbatch as mb
from benchmarks.machine import hardware, versions
from benchmarks.swept import STUDIES, Study
from microbatch.tuning.sweep_summary import summarise

OUT = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "which-batch.md"
POINTS = 12
PAIRED = (
    ("language", "language-finder"),
    ("images", "images-finder"),
    ("batchnorm-exact", "batchnorm-microbatch"),
    ("pairs-coupled", "pairs-microbatch"),
)
"""Sweeps that are compared at one target, the worst best loss of both."""


def run(name: str, study: Study, *, folder: Path, quick: bool) -> dict[str, Any]:
    """Run one sweep.

    Args:
        name: Its name.
        study: What is run.
        folder: Where its runs are kept.
        quick: Whether to run only a few steps.

    Returns:
        The result, and the seconds that it took.
    """
    started = time.perf_counter()
    points = 2 if quick else POINTS
    result = mb.sweep(
        study.job,
        batch_sizes=study.sizes,
        samples=2 * study.sizes[-1] if quick else study.samples,
        seeds=1 if quick else study.seeds,
        points=points,
        lr=study.lr,
        folder=folder / name,
        **study.options,
    )
    print(f"{name}: {study.question}\n{result}\n", flush=True)
    return {**result.as_dict(), "wall_seconds": time.perf_counter() - started}


def run_all(names: Sequence[str], *, folder: Path, quick: bool) -> dict[str, Any]:
    """Run several sweeps, each in a process of its own.

    Args:
        names: Keys of `STUDIES`.
        folder: Where the runs are kept.
        quick: Whether to run only a few steps.

    Returns:
        The results by name.
    """

    def one(name: str) -> dict[str, Any]:
        file = folder / f"{name}.json"
        command = [sys.executable, "-m", "benchmarks.which_batch", "--one", name, "--folder", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command += ["--quick"] if quick else []
        subprocess.run(command, check=True, env=environment)  # noqa: S603 - our own command
        return json.loads(file.read_text(encoding="utf-8"))

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


# -- the page ----------------------------------------------------------------------------------------------------------


def at_target(told: Mapping[str, Any], target: float | None) -> mb.Sweep:
    """Read a sweep again with another target.

    Args:
        told: The result as it was stored.
        target: The loss to reach.

    Returns:
        The sweep; steps and samples are those to the target.
    """
    found = mb.Sweep.from_dict(
        {key: value for key, value in told.items() if key not in {"wall_seconds", "noise_scale"}}
    )
    return summarise(found.runs, target=target, measure=found.measure, unit=found.unit, notes=found.notes)


def main_table(results: Mapping[str, Any]) -> str:
    """Write the critical batch size of every sweep beside the noise scale.

    Args:
        results: The results by name.

    Returns:
        A table in Markdown.
    """
    lines = ["| sweep | target | critical batch (95 %) | noise scale | misfit |", "|---|---|---|---|---|"]
    for name, told in results.items():
        fit, noise, target = told["critical"], told["noise_scale"], told["target"]
        cells = [name, "-" if target is None else f"{told['measure']} {target:.3g}", _fit(fit), _short(noise)]
        lines.append("| " + " | ".join([*cells, "-" if fit is None else f"{fit['misfit']:.1%}"]) + " |")
    return "\n".join(lines)


def later_targets(results: Mapping[str, Any]) -> str:
    """Write the critical batch size at an early, a middle and the last target of each sweep by the rule.

    Args:
        results: The results by name.

    Returns:
        A table in Markdown.
    """
    lines = ["| sweep | target | critical batch (95 %) | noise scale up to it |", "|---|---|---|---|"]
    for name, told in results.items():
        last = told["target"]
        firsts = [run["curve"][0]["loss"] for run in told["runs"] if run["curve"]]
        if last is None or not firsts:
            continue
        for share in (0.5, 0.75, 1.0):
            # On a logarithmic scale, from the mean of the first points down to the target.
            target = math.exp((1 - share) * math.log(sum(firsts) / len(firsts)) + share * math.log(last))
            found = at_target(told, target if share < 1 else None)
            fit = None if found.critical is None else found.as_dict()["critical"]
            lines.append(f"| {name} | {target:.3g} | {_fit(fit)} | {_short(found.noise_scale)} |")
    return "\n".join(lines)


def batch_table(results: Mapping[str, Any], name: str) -> str:
    """Write what each batch size of a sweep took.

    Args:
        results: The results by name.
        name: The sweep.

    Returns:
        A table in Markdown, and the sentences that follow from it.
    """
    found = at_target(results[name], None)
    lines = ["| batch | microbatch | learning rate | best loss | steps | samples | spread | time | noise scale |"]
    lines.append("|" + "---:|" * 9)
    lines += ["| " + " | ".join(re.split(r"\s{2,}", line.strip())) + " |" for line in found.table().splitlines()[1:]]
    return "\n".join([*lines, "", *(f"> {sentence}" for sentence in found.sentences)])


def paired_table(results: Mapping[str, Any], first: str, second: str) -> str:
    """Write two sweeps side by side, at one target that the runs of both reached.

    Args:
        results: The results by name.
        first: A sweep.
        second: Another one, over the same batch sizes.

    Returns:
        A table in Markdown.
    """
    bests = [told["target"] for name in (first, second) if (told := results[name])["target"] is not None]
    target = max(bests) if len(bests) == 2 else None
    if target is None:
        return "No target that both reached."
    one, two = (at_target(results[name], target) for name in (first, second))
    names = ("rate", "best", "steps")
    heads = ["batch", *(f"{what}, {which}" for what in names for which in (first, second))]
    lines = [f"Steps to a {one.measure} of {target:.3g}, the worst best loss of both.\n"]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    others = {each.batch_size: each for each in two.batches}
    for a in one.batches:
        b = others.get(a.batch_size)
        if b is None:
            continue
        values = (a.learning_rate, b.learning_rate, a.best_loss, b.best_loss, a.steps, b.steps)
        lines.append("| " + " | ".join([f"{a.batch_size:,}", *map(_short, values)]) + " |")
    return "\n".join(lines)


def _fit(fit: Mapping[str, Any] | None) -> str:
    if fit is None:
        return "-"
    low, high = fit["low"], fit["high"]
    if low is None and high is None:
        return f"about {fit['batch_size']:,.3g}, uncertain"
    if high is None:
        return f"above {low:,.3g}"
    if low is None:
        return f"below {high:,.3g}"
    return f"{fit['batch_size']:,.3g} ({low:,.3g} to {high:,.3g})"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}"


def parts(results: Mapping[str, Any]) -> dict[str, str]:
    """Write every part of the page that holds numbers.

    Args:
        results: The results by name.

    Returns:
        Markdown by the name of its place in the page.
    """
    found: dict[str, Callable[[], str]] = {
        "critical": lambda: main_table(results),
        "targets": lambda: later_targets(results),
    }
    found |= {f"sweep {name}": (lambda name=name: batch_table(results, name)) for name in results}
    found |= {
        f"pair {first} {second}": (lambda pair=(first, second): paired_table(results, *pair))
        for first, second in PAIRED
        if first in results and second in results
    }
    return {name: write() for name, write in found.items()}


def filled(page: str, written: Mapping[str, str]) -> str:
    """Replace what stands between the marks of a page.

    Args:
        page: Markdown with places ``<!-- numbers: NAME -->`` and ``<!-- end -->``.
        written: Markdown by the name of its place.

    Returns:
        The page; a place whose numbers are not there stays as it is.
    """

    def put(found: re.Match[str]) -> str:
        text = written.get(found[1])
        return found[0] if text is None else f"<!-- numbers: {found[1]} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- numbers: (.+?) -->\n.*?<!-- end -->", put, page, flags=re.DOTALL)


def write_results(results: Mapping[str, Any], out: Path) -> None:
    """Write the JSON, the tables and the figures.

    Args:
        results: The results by name.
        out: The folder.
    """
    from microbatch.tuning.sweep_figure import draw

    out.mkdir(parents=True, exist_ok=True)
    made = {**hardware("cpu"), **versions()}
    minutes = sum(told["wall_seconds"] for told in results.values()) / 60
    told = {"command": "python -m benchmarks.which_batch", "made": made, "sweeps": results}
    (out / "which-batch.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    lines = ["# Which batch", "", f"`python -m benchmarks.which_batch`; {minutes:.0f} minutes of one core or two; "]
    lines[-1] += "; ".join(f"{name} {value}" for name, value in made.items()) + "."
    for name, text in parts(results).items():
        lines += ["", f"## {name}", "", text]
        if name.startswith("sweep "):
            lines += ["", f"![{name}](which-batch-{name[6:]}.svg)"]
    (out / "which-batch.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in results:
        draw(at_target(results[name], None), out / f"which-batch-{name}.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.which_batch", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), help="some of the sweeps")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--folder", type=Path, help="folder of the runs, to go on with a stopped study")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; writes into --out only")
    parser.add_argument("--page", action="store_true", help="only write the page's numbers again")
    parser.add_argument("--one", choices=list(STUDIES), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.page:
        results = json.loads((OUT / "which-batch.json").read_text(encoding="utf-8"))["sweeps"]
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), parts(results)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if given.one:
            found = run(given.one, STUDIES[given.one], folder=folder, quick=given.quick)
            (folder / f"{given.one}.json").write_text(json.dumps(found), encoding="utf-8")
            return
        results = run_all(given.only or list(STUDIES), folder=folder, quick=given.quick)
    whole = given.out is None and given.only is None and not given.quick
    out = given.out or (OUT if whole else Path(tempfile.mkdtemp(prefix="which-batch-")))
    write_results(results, out)
    if whole:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), parts(results)), encoding="utf-8")
    print(f"{out}: which-batch.json, which-batch.md and figures")


if __name__ == "__main__":
    main()
