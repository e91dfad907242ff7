"""Prove and measure the library on a GPU, in at most eight minutes; or try all of this on a CPU.

::

    python -m benchmarks.gpu                   on a machine with CUDA: PyTorch, numpy and pytest are enough
    python -m benchmarks.gpu --device cpu      the dry run: the same code, tiny sizes; it proves nothing about a GPU
    python -m benchmarks.gpu --only proofs --out /tmp/gpu

Items run in order of worth, in a process of their own from one failure to the next. Each is stopped after a time of its
own. Results are written as they come, to ``gpu.jsonl``, and as a page, ``gpu.md``; an interrupted run has both.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.gpu.outcome import FAILED, NOT_REACHED, Log, Outcome, outcomes
from benchmarks.gpu.page import as_markdown, summary_lines
from benchmarks.gpu.schedule import ITEMS, PROOFS, SPEED, TESTS, Item

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TOTAL = 465  # seconds, so that the page is written within eight minutes
START_UP = 60  # seconds that a process may take until its first item begins: imports, and CUDA's own start
PARTS = {"proofs": PROOFS, "tests": TESTS, "speed": SPEED}


class StoppedError(Exception):
    """A signal asks this run to end."""


@dataclass
class Run:
    """The run of some items.

    Attributes:
        items: What runs, in order.
        device: ``"cuda"`` or ``"cpu"``.
        tiny: Whether sizes are tiny.
        log: What results are written to.
        until: When everything ends, on the monotonic clock.
        output: What the processes print goes here.
        schedule: Module that has the items.
    """

    items: Sequence[Item]
    device: str
    tiny: bool
    log: Log
    until: float
    output: IO[bytes]
    schedule: str = "benchmarks.gpu.schedule"
    _process: subprocess.Popen[bytes] | None = field(default=None)

    def go(self) -> None:
        """Run all items, as far as time allows."""
        while (left := self._left()) and time.monotonic() < self.until:
            self._start(left)
            self._watch(left)

    def stop(self) -> None:
        """End the process that runs items, and all that it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def found(self) -> dict[str, Outcome]:
        """Return what became of each item so far."""
        return outcomes(self.log.read(), [each.name for each in self.items])

    def _left(self) -> list[Item]:
        ended = {line["item"] for line in self.log.read() if line["event"] == "end"}
        return [each for each in self.items if each.name not in ended]

    def _start(self, left: Sequence[Item]) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.child", "--device", self.device, "--log", str(self.log.path)]
        command += ["--schedule", self.schedule]
        paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        # A group of its own, which ends as one: an item may start processes, too.
        self._process = subprocess.Popen(  # noqa: S603 - this project's own code
            [*command, *(["--tiny"] if self.tiny else []), *(each.name for each in left)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _watch(self, left: Sequence[Item]) -> None:
        """Wait until the process ends, or an item has taken too long."""
        assert self._process is not None  # noqa: S101 - `_start` comes before
        bounds = {each.name: each.seconds for each in left}
        now, since, bound, told = left[0].name, time.monotonic(), float(START_UP), len(self.log.read())
        running = False
        while self._process.poll() is None:
            time.sleep(0.1)
            lines = self.log.read()
            for line in lines[told:]:
                if line["event"] == "begin":
                    now, since, bound, running = line["item"], time.monotonic(), bounds[line["item"]], True
                elif line["event"] == "end":
                    running = False
                    _show(self.found()[line["item"]])
            told = len(lines)
            took = time.monotonic() - since
            if time.monotonic() > self.until or (took > bound and running) or took > bound + START_UP:
                self.stop()
        self._explain(now, time.monotonic() - since)

    def _explain(self, now: str, took: float) -> None:
        """Write down why the process ended, where it could not do so itself."""
        assert self._process is not None  # noqa: S101 - likewise
        if any(line["event"] == "end" and line["item"] == now for line in self.log.read()):
            return
        self.output.flush()
        status = FAILED
        if time.monotonic() > self.until:
            status, note = NOT_REACHED, "cut short: the time for everything was over"
        elif self._process.returncode == -signal.SIGKILL:
            note = f"stopped after {took:.0f} s"
        else:
            last = Path(self.output.name).read_bytes()[-1500:].decode(errors="replace").strip()
            note = f"the process ended with status {self._process.returncode}: {last}"
        self.log.write(event="end", item=now, status=status, seconds=round(took, 2), note=note)
        _show(self.found()[now])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write and print.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0 if everything passed or is not here, 1 if something failed, 2 if something was not reached or cannot run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is the dry run")
    add("--tiny", action="store_true", help="tiny sizes also with CUDA: does everything run?")
    add("--seconds", type=float, default=TOTAL, help="when to end, whatever is left")
    add("--only", nargs="+", choices=list(PARTS), help="parts, instead of all")
    add("--items", nargs="+", choices=[each.name for each in ITEMS], metavar="NAME", help="single items, by name")
    add(
        "--out",
        type=Path,
        help="folder of gpu.jsonl and gpu.md; default: benchmarks/results, a new one for the dry run",
    )
    flags = parser.parse_args(arguments)
    until = time.monotonic() + flags.seconds
    if flags.device == "cuda" and not _has_cuda():
        print("PyTorch finds no CUDA device here. `python -m benchmarks.gpu --device cpu` is the dry run.")
        return 2
    out: Path = flags.out or (RESULTS if flags.device == "cuda" else Path(tempfile.mkdtemp(prefix="gpu-dry-run-")))
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "gpu.jsonl")
    log.path.unlink(missing_ok=True)
    parts = {PARTS[each] for each in flags.only or PARTS}
    names = flags.items or [each.name for each in ITEMS if each.part in parts]
    items = [each for each in ITEMS if each.name in names or each.name == "machine"]
    before = signal.signal(signal.SIGTERM, _stopped)
    with tempfile.NamedTemporaryFile(prefix="gpu-output-") as output:
        run = Run(items, flags.device, flags.tiny or flags.device == "cpu", log, until, output)
        try:
            run.go()
        except (StoppedError, KeyboardInterrupt):
            print("Stopped by a signal; what was found so far is written.")
        finally:
            run.stop()
            signal.signal(signal.SIGTERM, before)
            found = run.found()
            page = as_markdown(items, found, device=flags.device)
            (out / "gpu.md").write_text(page, encoding="utf-8")
    print("\n".join(["", *summary_lines(found), f"Written: {out / 'gpu.md'} and {log.path}"]))
    statuses = {each.status for each in found.values()}
    return 1 if FAILED in statuses else 2 if NOT_REACHED in statuses else 0


def _show(one: Outcome) -> None:
    print(f"{one.status:>11}  {one.item}, {one.seconds:.1f} s  {one.note[:200]}", flush=True)


def _stopped(*_: object) -> None:
    raise StoppedError


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
