"""Compare this checkout with another one, bit by bit: a tool for refactorings, not a test of the suite.

Usage, from the root of the repository::

    git worktree add ../before HEAD~1
    python tests/same_bits.py ../before            # every combination
    python tests/same_bits.py ../before coupled    # only those whose name contains "coupled"
    python tests/same_bits.py ../before --list     # print the names, run nothing

Every combination of options, losses and faults in ``same_bits_cases.py`` runs with the ``src`` of both checkouts on the
same machine, some in one process, the others on two ranks (gloo). These must be the same: the gradients that the
optimizer is given, the record of each step, weights, buffers, optimizer state, random states, and the type of an error
where one is expected. No reference value is stored, because other machines may give other bits.

The exit code is 1 if a combination differs, or ends with an error that it does not expect.
"""

import argparse
import importlib
import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 600
"""Seconds after which the processes of one checkout are ended."""

# Options that have another name, or another value, in newer checkouts: the old name, the new one, and the new value.
# The combinations use the old names. An entry is used where `Accumulator` has no option of the old name.
RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "accumulate_dtype": ("sums", lambda value: {"dtype": value}),
    "accumulate": ("sums", lambda value: {"how": value}),
    "gradient_buffer": ("sums", lambda value: {"buffer": value}),
    "fuse": ("sums", lambda value: {"fuse": value}),
    "process_group": ("ranks", lambda value: {"group": value}),
    "sync": ("ranks", lambda value: {"sync": value}),
    "reduce_dtype": ("ranks", lambda value: {"reduce_dtype": value}),
    "overlap": ("ranks", lambda value: {"overlap": value}),
    "deterministic": ("ranks", lambda value: {"deterministic": value}),
}
# Options that are records: the dicts above become one.
RECORDS = {"sums": "Sums", "ranks": "Ranks"}
# Where accumulators have held the clock by which they choose a microbatch size.
CLOCKS = ("_memory.clock", "_it.stopwatch.clock")
# Below how many elements weights are not fused, and up to how many bytes gradients of two ranks meet in one bucket:
# both are made small, so that a tiny model shows what happens in a large one.
SMALL = (
    ("microbatch.gradients.fused_matmul", "SMALLEST", 1),
    ("microbatch.gradients.fuse", "SMALLEST", 1),
    ("microbatch.ranks.reduce", "BUCKET_BYTES", 300),
)

Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare this checkout with another one, bit by bit.")
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("select", nargs="?", default="", help="run only combinations whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the names of the combinations and run nothing")
    asked = parser.parse_args()
    if not (asked.other / "src" / "microbatch").is_dir():
        parser.error(f"{asked.other} has no src/microbatch")
    here, other = Checkout(ROOT), Checkout(asked.other.resolve())
    if asked.list:
        return here.list_names(asked.select)
    started, told = time.monotonic(), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):  # two processes at a time: one of each checkout at once, or two of one after the other
            runs = [
                (each.run, ranks, asked.select, Path(folder, f"{ranks}-{i}")) for i, each in enumerate((here, other))
            ]
            with ThreadPoolExecutor(3 - ranks) as pool:
                mine, theirs = [each.result() for each in [pool.submit(*run) for run in runs]]
            told += [compare(name, mine[name], theirs[name]) for name in mine]
    counted = {word: sum(each.startswith(word) for each in told) for word in ("DIFFERS", "ERROR", "SKIPPED")}
    seconds = round(time.monotonic() - started)
    print(
        f"{len(told)} combinations, {counted['DIFFERS']} differ; {counted['ERROR']} end with an unexpected error on "
        f"both sides; {counted['SKIPPED']} are skipped; {seconds} s"
    )
    return int(counted["DIFFERS"] + counted["ERROR"] > 0 or not told)


# -- what differs between checkouts ------------------------------------------------------------------------------------


def options_for(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options by the names that a class has for them; `RENAMED` translates what it does not have.

    Where several old options have become one, their new values are merged by ``|``, as dicts are.
    """
    known, found = inspect.signature(cls.__init__).parameters, dict[str, Any]()
    for name, value in options.items():
        if name in known or name not in RENAMED:
            found[name] = value
            continue
        new, translate = RENAMED[name]
        found[new] = found[new] | translate(value) if new in found else translate(value)
    for name, kind in RECORDS.items():
        if isinstance(found.get(name), dict):
            found[name] = getattr(importlib.import_module("microbatch"), kind)(**found[name])
    return found


def set_clock(accumulator: Any, clock: Callable[[], float]) -> bool:
    """Make an accumulator read a fake clock, and return whether the attribute for the clock was found."""
    for place in CLOCKS:
        *path, name = place.split(".")
        owner = accumulator
        for each in path:
            owner = getattr(owner, each, None)
        if hasattr(owner, name):
            setattr(owner, name, clock)
            return True
    return False


def make_limits_small() -> list[str]:
    """Fuse small weights and fill small buckets; return the limits that were found."""
    found: list[str] = []
    for module, name, value in SMALL:
        try:
            owner = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        if hasattr(owner, name):
            setattr(owner, name, value)
            found.append(name)
    return found


# -- running ----------------------------------------------------------------------------------------------------------


class Checkout:
    """A checkout whose package runs this checkout's combinations."""

    def __init__(self, root: Path) -> None:
        self.source = root / "src"

    def start(self, *arguments: object, output: Path) -> subprocess.Popen[bytes]:
        """Start a process that imports the package from here, and the combinations from this file's checkout."""
        command = [sys.executable, "-m", "tests.same_bits_cases", str(self.source), *map(str, arguments)]
        variables = os.environ | {"PYTHONPATH": str(self.source), "OMP_NUM_THREADS": "1"}
        with output.open("wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=ROOT)

    def run(self, ranks: int, select: str, folder: Path) -> dict[str, dict[int, Result]]:
        """Run all combinations in one process for each rank, and return the results by name and by rank.

        Where a process dies, which a message of the wrong size does to gloo, others go on after that combination.
        """
        folder.mkdir()
        deadline, number, names = time.monotonic() + LONGEST, 0, [""]

        def files(number: int) -> list[Path]:
            return [folder / f"{number}-{rank}.pt" for rank in range(ranks)]

        while number < len(names) and time.monotonic() < deadline:
            outputs = [folder / f"output-{number}-{rank}.txt" for rank in range(ranks)]
            started = [
                self.start(folder, rank, ranks, select, number, output=output) for rank, output in enumerate(outputs)
            ]
            wait_for(started, deadline)
            if not (folder / "names").exists():
                raise RuntimeError(f"{self.source}: no process could begin:\n{outputs[0].read_text()}")
            names = (folder / "names").read_text().splitlines()
            while number < len(names) and all(file.exists() for file in files(number)):
                number += 1
            for file, output in zip(files(number), outputs, strict=True) if number < len(names) else ():
                if not file.exists():
                    words = output.read_text(errors="replace").strip()[-400:]
                    torch.save({"crashed": f"the process ended, and wrote: {words}"}, file)
            number += 1
        late: Result = {"crashed": f"not run within {LONGEST} s"}
        return {
            name: {
                rank: torch.load(file, weights_only=True) if file.exists() else late
                for rank, file in enumerate(files(number))
            }
            for number, name in enumerate(names)
        }

    def list_names(self, select: str) -> int:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "names")
            code = self.start("--list", select, output=output).wait()
            print(output.read_text(), end="")
        return code


def wait_for(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    """Wait until all processes have ended, and end them all if one fails or the time is over."""
    while time.monotonic() < deadline:
        codes = [each.poll() for each in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.1)
    for each in processes:
        if each.poll() is None:
            each.kill()
        each.wait()


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(name: str, here: dict[int, Result], other: dict[int, Result]) -> str:
    """Print one line for a combination, and return what it says."""
    both = [*here.values(), *other.values()]
    skipped = [each["cannot run"] for each in both if "cannot run" in each]
    crashed = [each["crashed"] for each in both if "crashed" in each]
    places = list(differences(here, other))
    if skipped:
        verdict = f"SKIPPED: {skipped[0]}"
    elif places:
        verdict = f"DIFFERS in {len(places)} places: {', '.join(places[:4])}"
    elif crashed:
        verdict = "ERROR on both sides, not expected"
    else:
        errors = sorted({each for result in both for each in errors_in(result)})
        verdict = "same bits" + (f", and the same errors: {', '.join(errors)}" if errors else "")
    print(f"{name:54s} {verdict}", flush=True)
    for side, results in (("here", here), ("other", other)):
        for rank, result in results.items():
            if "crashed" in result:
                print(
                    f"    {side}, rank {rank}: {result['crashed'].strip()}", *result.get("where", []), sep="\n        "
                )
    return verdict


def differences(one: Any, other: Any, place: str = "rank") -> Iterator[str]:
    """Yield the places at which two nested results are not the same to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            yield f"{place} (dtype or shape)"
        elif not torch.equal(bits(one), bits(other)):
            yield place
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if key == "where":
                continue
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{place}.{key}")
            else:
                yield f"{place}.{key} (only {'here' if key in one else 'there'})"
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{place} ({len(one)} and {len(other)})"
        for index, pair in enumerate(zip(one, other, strict=False)):
            yield from differences(*pair, f"{place}[{index}]")
    elif type(one) is not type(other) or (one != other and not (one != one and other != other)):  # noqa: PLR0124 - NaN
        yield f"{place} ({str(one)[:40]} and {str(other)[:40]})"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, so that NaN equals NaN and 0.0 does not equal -0.0."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def errors_in(result: Any) -> Iterator[str]:
    """Yield the names of the errors that a result records."""
    if isinstance(result, dict):
        if isinstance(result.get("error"), str):
            yield result["error"]
        result = list(result.values())
    if isinstance(result, list | tuple):
        for each in result:
            yield from errors_in(each)


if __name__ == "__main__":
    sys.exit(main())
