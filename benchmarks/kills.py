"""What kills cost a run on several ranks: SIGKILL of a rank at random moments, in the midst of checkpoints among them.

A launch of ``torchrun --max-restarts`` loses a rank a few times and goes on with as many; then all of it is killed at
once, as when a machine is lost, and the next launch goes on with another number of ranks. At the end the weights are
held against those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.machine import hardware, in_words, versions
from benchmarks.report import write
from microbatch.ranks.lost_ranks import CHECKPOINTING, DONE, Beat
from microbatch.train.checkpoint import read_newest
from microbatch.train.heartbeat import read_beat

OUT = Path(__file__).parent / "results" / "kills"
# In a folder of its own, which is where Python then looks for modules first: some here are called as Python's are.
JOB = Path(__file__).resolve().parent / "jobs" / "perceptron.py"
PATIENCE = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One kill, and what it cost.

    Attributes:
        ranks: How many ranks there were.
        whole: Whether all of them were killed with their launcher, instead of one of them.
        stage: What the rank was doing, as its heartbeat said.
        step: Steps that had been taken.
        resumed: The step that the run went on from.
        seconds: From the kill to the next step that was taken.
    """

    ranks: int
    whole: bool
    stage: int
    step: int
    resumed: int
    seconds: float

    @property
    def lost(self) -> int:
        """Steps that had to be taken again."""
        return self.step - self.resumed


class Run:
    """A run in its directory, launched as often as it takes.

    Args:
        folder: The run directory.
        flags: Of ``microbatch train``.
    """

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        self.folder, self._flags = folder, flags
        self.ranks = 0
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self, ranks: int, *, restarts: int) -> None:
        """Start the ranks.

        Args:
            ranks: How many.
            restarts: How often the launcher starts them again by itself.
        """
        self.ranks = ranks
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [f"--max-restarts={restarts}", "--monitor-interval=0.05", "-m", "microbatch", "train"]
        command += [f"{JOB}:job", f"--run-dir={self.folder}", "--device=cpu", *self._flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.folder.parent / f"{self.folder.name}.out").open("ab") as out:
            self._process = subprocess.Popen(  # noqa: S603 - this project's own command
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self) -> int:
        """Wait for the launch to end, and return its exit code."""
        assert self._process is not None  # noqa: S101 - it has been launched
        return self._process.wait()

    def over(self) -> bool:
        """Whether the launch has ended."""
        return self._process is None or self._process.poll() is not None

    def beats(self) -> list[Beat]:
        """Return the heartbeats of the ranks that live."""
        found = (read_beat(self.folder / "logs", rank) for rank in range(self.ranks))
        return [beat for beat in found if beat is not None and not beat.gone]

    def waits(self, until: Callable[[], bool]) -> bool:
        """Wait for something to happen, unless the launch ends before, and tell whether it did."""
        deadline = time.monotonic() + PATIENCE
        while not (happened := until()) and not self.over() and time.monotonic() < deadline:
            time.sleep(0.002)
        return happened

    def metrics(self) -> list[bytes]:
        """Return the lines of the metrics."""
        file = self.folder / "metrics.jsonl"
        return file.read_bytes().splitlines(keepends=True) if file.exists() else []

    def lines(self) -> int:
        """Return the number of steps in the metrics."""
        return sum(line.endswith(b"\n") for line in self.metrics())

    def resumptions(self) -> list[int]:
        """Return the step that each start of the first rank went on from."""
        log = self.folder / "logs" / "rank-0.log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        lines = [line for line in text.splitlines() if line.startswith('{"event": "plan"')]
        return [json.loads(line)["step"] for line in lines]

    def kill_all(self) -> None:
        """Kill the launcher first, so that it starts nothing again, and then every rank."""
        assert self._process is not None  # noqa: S101 - it has been launched
        beats = self.beats()
        self._process.kill()
        for beat in beats:
            _kill(beat)
        self._process.wait()


def disturb(run: Run, *, kills: int, counts: Sequence[int], per_launch: int, seed: int) -> list[Kill]:
    """Kill ranks at random moments until there were enough kills, and let the run come to its end.

    Args:
        run: Not launched.
        kills: How many.
        counts: Numbers of ranks, which launches take in turn.
        per_launch: Kills of a launch, the last of which takes all of it.
        seed: Of the moments.

    Returns:
        The kills; fewer than asked for if the run was over before.
    """
    chance = random.Random(seed)  # noqa: S311 - moments, not secrets
    done: list[Kill] = []
    starts, number = 0, cycle(counts)
    run.launch(next(number), restarts=per_launch)
    while len(done) < kills and run.waits(lambda: len(run.resumptions()) > starts):  # noqa: B023 - called at once
        starts = len(run.resumptions())
        whole = len(done) % per_launch == per_launch - 1
        beat = _moment(run, chance, checkpoint=chance.random() < 0.4)
        if beat is None:
            break
        step, ranks, killed = run.lines(), run.ranks, time.monotonic()
        if whole:
            run.kill_all()
            run.launch(next(number), restarts=per_launch)
        else:
            _kill(beat)
        if not run.waits(lambda: len(run.resumptions()) > starts):  # noqa: B023 - called at once
            break
        resumed = run.resumptions()[-1]
        run.waits(lambda: run.lines() > resumed)  # noqa: B023 - called at once
        taken = time.monotonic() - killed
        kill = Kill(ranks=ranks, whole=whole, stage=beat.stage, step=step, resumed=resumed, seconds=taken)
        print(f"{len(done) + 1:3} {kill}", flush=True)
        done.append(kill)
    run.wait()
    return done


def _moment(run: Run, chance: random.Random, *, checkpoint: bool) -> Beat | None:
    """Wait for a moment to kill at, in the midst of a checkpoint or anywhere, and choose a rank."""
    until = time.monotonic() + chance.uniform(0.05, 0.8)
    while time.monotonic() < until and not run.over():
        time.sleep(0.01)
    if checkpoint and not run.waits(lambda: any(beat.stage == CHECKPOINTING for beat in run.beats())):
        return None
    time.sleep(chance.uniform(0, 0.006) if checkpoint else 0)
    beats = run.beats()
    return chance.choice(beats) if beats and not run.over() and all(beat.stage != DONE for beat in beats) else None


def _kill(beat: Beat) -> None:
    with suppress(ProcessLookupError):
        os.kill(beat.process, signal.SIGKILL)


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the newest checkpoint's weights.

    Args:
        folder: The run directory.
    """
    return read_newest(folder / "checkpoints", notice=print).weights


def as_markdown(record: dict[str, Any]) -> str:
    """Write the record for people.

    Args:
        record: What `main` wrote.

    Returns:
        Markdown.
    """
    machine = in_words(record["hardware"])
    kills = [Kill(**each) for each in record["kills"]]
    lost = [kill.lost for kill in kills]
    whole = sum(kill.whole for kill in kills)
    mid = sum(kill.stage == CHECKPOINTING for kill in kills)
    again = statistics.median(kill.seconds for kill in kills) if kills else 0.0
    return "\n".join(
        [
            "# A run that is killed, again and again",
            "",
            f"{record['date']}; {machine}.",
            "; ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
            "",
            f"`{record['command']}`",
            "",
            "| | |",
            "|---|---|",
            f"| kills (SIGKILL) | {len(kills)} of {record['asked']} |",
            f"| of one rank; of all with their launcher | {len(kills) - whole}; {whole} |",
            f"| in the midst of a checkpoint | {mid} |",
            f"| ranks, launch by launch | {', '.join(map(str, record['ranks']))} |",
            f"| steps of the run | {record['steps']} |",
            f"| a checkpoint every | {record['every']} steps |",
            f"| steps taken again after a kill | at most {max(lost, default=0)}, {sum(lost)} in all |",
            f"| from the kill to the next step | median {again:.1f} s |",
            f"| largest difference of a final weight from the undisturbed run's | {record['difference']:.3g} |",
            f"| steps whose loss is not the undisturbed run's, to the last bit | {record['losses_differ']} |",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, compare, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0; 1 if a weight differs by more than rounding, or more than one interval was lost.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="how many")
    parser.add_argument("--steps", type=int, default=0, help="steps of the run; as many as the kills take, if left out")
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4], help="numbers of ranks, launch by launch")
    parser.add_argument(
        "--per-launch", type=int, default=5, help="kills of a launch, the last of which takes all of it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write, without suffix")
    parser.add_argument("flags", nargs="*", help="more flags of microbatch train, behind --")
    flags = parser.parse_args(arguments)
    steps = flags.steps or 20 * flags.kills
    own = [f"--steps={steps}", f"--checkpoint-every={flags.every}", f"--validate-every={steps}", "--json", *flags.flags]
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Run(Path(folder) / "calm", own), Run(Path(folder) / "killed", own)
        calm.launch(flags.ranks[0], restarts=0)
        if calm.wait():
            print((Path(folder) / "calm.out").read_text())
            return 1
        kills = disturb(killed, kills=flags.kills, counts=flags.ranks, per_launch=flags.per_launch, seed=flags.seed)
        a, b = weights(calm.folder), weights(killed.folder)
        losses = [[json.loads(line)["loss"] for line in run.metrics()] for run in (calm, killed)]
    difference = max(float((a[name] - b[name]).abs().max()) for name in a)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "command": f"microbatch train {' '.join(own)}",
        "asked": flags.kills,
        "steps": steps,
        "every": flags.every,
        "ranks": flags.ranks,
        "kills": [asdict(kill) for kill in kills],
        "difference": difference,
        "losses_differ": sum(x != y for x, y in zip(*losses, strict=True)),
    }
    markdown = as_markdown(record)
    print(markdown)
    write(record, markdown, flags.out)
    return int(difference > 1e-4 or any(kill.lost > flags.every for kill in kills))


if __name__ == "__main__":
    sys.exit(main())
