"""What communication costs on a slow link: hosts in network namespaces, as `benchmarks.network` makes them.

::

    python -m benchmarks.links                                four minutes on two cores, as root
    python -m benchmarks.links --ranks 4 --megabits 1000 --repeats 3 --out /tmp/links

The ways take turns, a step each, and every rank is on a host of its own. *Communication* is the time of a step beyond
that of the same arithmetic in the same round without other ranks. Bytes are those that the interface has sent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.linked import ALONE, EVERY, KINDS, LOOP, NEVER, OURS, OVERLAPPED, Seat
from benchmarks.machine import hardware, in_words, versions
from benchmarks.network import INTERFACE, Network, NoNetworkError, enter_namespace
from benchmarks.report import write
from benchmarks.summary import order_of_round, summarize

OUT = Path(__file__).parent / "results" / "links"
SHAPE = {"vocabulary": 8192, "length": 32, "layers": 4, "heads": 8, "channels": 512}
KIND_OF = {way: kind for kind, ways in KINDS.items() for way in ways}
GOAL = 5.0
_PORT = 29500
NOTE = """\
*Communication* is what a step takes beyond the same arithmetic without other ranks, in the same round: what goes on
during backward is not in it, and what `fully_shard` does beside communicating is. Gloo scatters by an all-reduce, which
sends twice what a ring's scatter does, and what is counted. A `~` says that another job was running."""
_AGREES = 1e-4  # relative, of float32 sums in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one way took on one link.

    Attributes:
        megabits: Of the link, a second.
        way: Whose.
        seconds: Of each step, on the rank that took longest.
        communication: Of these, beyond the same arithmetic without other ranks; of each round.
        wire_bytes: Bytes that left a host in a step: the median of the rounds, of the host that sent most.
        counted_bytes: What the step's record says of it; 0 where there is none.
        calls: Likewise, collectives.
        peak_bytes: Most bytes of a rank's process in RAM, less those before the model was made.
    """

    megabits: float
    way: str
    seconds: list[float]
    communication: list[float]
    wire_bytes: int
    counted_bytes: int
    calls: int
    peak_bytes: int


class Ranks:
    """The processes of every kind on every host.

    Args:
        network: The hosts, one for each rank.
        seats: Of every process.
    """

    def __init__(self, network: Network, seats: Sequence[Seat]) -> None:
        self._network, self._seats = network, seats
        self._processes: dict[str, list[subprocess.Popen[str]]] = {kind: [] for kind in KINDS}

    def __enter__(self) -> Self:
        """Start them."""
        try:
            for seat in self._seats:
                environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": str(seat.threads)}
                environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # hosts without names are warned of otherwise
                command = [sys.executable, "-m", "benchmarks.linked", json.dumps(asdict(seat))]
                started = subprocess.Popen(  # noqa: S603 - this project's own command
                    self._network.command(seat.rank, *command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
                self._processes[seat.kind].append(started)
            for kind in self._processes:
                self._answers(kind)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End them."""
        for process in (each for processes in self._processes.values() for each in processes):
            process.kill()
            process.communicate()

    def ask(self, what: str, way: str) -> list[dict[str, Any]]:
        """Have every rank of a way do something at once, and return what each said."""
        kind = KIND_OF[way]
        for process in self._processes[kind]:
            assert process.stdin is not None  # noqa: S101 - a pipe
            process.stdin.write(f"{what} {way}\n")
            process.stdin.flush()
        return self._answers(kind)

    def _answers(self, kind: str) -> list[dict[str, Any]]:
        lines = [process.stdout.readline() for process in self._processes[kind] if process.stdout is not None]
        if not all(lines):
            raise RuntimeError(f"a rank of {kind!r} ended before it had answered; what it wrote is above")
        return [json.loads(line) for line in lines]


def measure(ranks: Ranks, megabits: float, *, repeats: int, looked: Mapping[str, Any]) -> list[Entry]:
    """Measure every way, in turns.

    Args:
        ranks: Ready, on links that are limited already.
        megabits: To how much.
        repeats: Rounds.
        looked: What was found untimed.
    """
    ways = list(KIND_OF)
    answers: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in ways}
    for index in range(repeats):
        for way in order_of_round(ways, index):
            answers[way].append(ranks.ask("step", way))
    seconds = {way: [max(each["seconds"] for each in step) for step in answers[way]] for way in ways}
    found: list[Entry] = []
    for way in ways:
        alone = seconds[NEVER if KIND_OF[way] == LOOP else ALONE]
        steps = answers[way]
        found.append(
            Entry(
                megabits=megabits,
                way=way,
                seconds=seconds[way],
                communication=[mine - none for mine, none in zip(seconds[way], alone, strict=True)],
                wire_bytes=int(statistics.median(max(each["wire"] for each in step) for step in steps)),
                counted_bytes=steps[-1][0]["counted"],
                calls=steps[-1][0]["calls"],
                peak_bytes=looked[way]["peak"],
            )
        )
    return found


def disagreement(gradients: Mapping[str, Sequence[float]]) -> float:
    """Return how far ways' gradients are from one another, relative.

    Args:
        gradients: Two numbers of each.

    Example:
        >>> disagreement({"one": [4.0, 1.0], "other": [4.0, 1.001]})
        0.00025
    """
    first = next(iter(gradients.values()))
    scale = max(map(abs, first))
    return round(max(abs(a - b) / scale for other in gradients.values() for a, b in zip(first, other, strict=True)), 12)


def gains(entries: Sequence[Entry], way: str = OURS) -> list[tuple[float, float, float]]:
    """Say for each link how much less a way communicates than DDP after every microbatch.

    Args:
        entries: Of all ways.
        way: Whose.

    Returns:
        Megabits a second, times fewer bytes, times less time.
    """
    found: list[tuple[float, float, float]] = []
    for every in (each for each in entries if each.way == EVERY):
        (mine,) = (each for each in entries if (each.way, each.megabits) == (way, every.megabits))
        waits = statistics.median(every.communication) / max(1e-9, statistics.median(mine.communication))
        found.append((every.megabits, every.wire_bytes / max(1, mine.wire_bytes), waits))
    return found


def table(entries: Sequence[Entry]) -> str:
    """Write the entries as Markdown."""
    lines = [
        "| link | way | step | communication | bytes sent | counted | calls | peak resident |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in entries:
        took, waits = summarize(each.seconds), statistics.median(each.communication)
        noisy = "~" if took.noisy else ""
        counted = f"{each.counted_bytes / 1e6:.1f} MB | {each.calls}" if each.calls else "– | –"
        lines.append(
            f"| {each.megabits:g} Mbit/s | {each.way} | {noisy}{took.median:.2f} s ± {100 * took.spread / 2:.0f} % "
            f"| {'–' if each.way in {NEVER, ALONE} else f'{waits:.2f} s'} | {each.wire_bytes / 1e6:.1f} MB | {counted} "
            f"| {each.peak_bytes / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def as_markdown(record: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    """Write everything for people."""
    machine = in_words(record["hardware"])
    links = [
        f"- {each['megabits']:g} Mbit/s: an all-reduce of 16 MiB reaches {each['rate'] * 8e-6:.0f}, one of 4 bytes "
        f"takes {1e3 * each['short']:.2f} ms; {_of_latency(each['latency'])}."
        for each in record["links"]
    ]
    said = (
        f"{record['ranks']} ranks, each on a simulated host, {record['threads']} threads each; a model of "
        f"{record['parameters']:,} float32 parameters ({record['parameters'] * 4e-6:.0f} MB of gradients); steps of "
        f"{record['microbatches']} microbatches. The ways' gradients differ by {record['disagreement']:.0e} at most."
    )
    gained = [
        f"- `{way}`, {megabits:g} Mbit/s: {fewer:.1f} times fewer bytes, {less:.1f} times less time."
        for way in (OURS, OVERLAPPED)
        for megabits, fewer, less in gains(entries, way)
    ]
    return "\n".join(
        [
            "# Communication on slow links",
            "",
            f"{record['date']}; {machine}.",
            "; ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
            "",
            said,
            "",
            *links,
            "",
            table(entries),
            "",
            NOTE,
            "",
            f"Communication against that of `{EVERY}` (goal, at the first link: {GOAL:g}):",
            "",
            *gained,
            "",
        ]
    )


def _of_latency(milliseconds: float) -> str:
    if milliseconds:
        return f"latency {milliseconds:g} ms each way"
    return "no latency added, for which this kernel lacks netem (or nobody asked)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0; 1 if gradients differ or the goal is missed at the first of the links; 2 if this machine makes no namespaces.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.links", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabits", type=float, nargs="+", default=[1000.0, 10000.0], help="of the links, a second")
    parser.add_argument("--milliseconds", type=float, default=0.5, help="latency from host to host")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2, help="of a microbatch")
    parser.add_argument("--channels", type=int, default=SHAPE["channels"], help="width of the model")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0, help="of a rank; the cores' share of each, if left out")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write, without suffix")
    flags = parser.parse_args(arguments)
    try:
        enter_namespace("benchmarks.links", sys.argv[1:] if arguments is None else arguments)
        record, entries = _run(flags)
    except NoNetworkError as error:
        print(f"hosts cannot be simulated here: {error}", file=sys.stderr)
        return 2
    markdown = as_markdown(record, entries)
    print(markdown)
    write(record, markdown, flags.out)
    return int(record["disagreement"] > _AGREES or min(gains(entries)[0][1:]) < GOAL)


def _run(flags: argparse.Namespace) -> tuple[dict[str, Any], list[Entry]]:
    cores = os.cpu_count() or 1
    threads = flags.threads or max(1, cores // flags.ranks)
    entries: list[Entry] = []
    links: list[dict[str, float]] = []
    with Network(flags.ranks) as network:
        seats = [
            Seat(
                kind=kind,
                rank=rank,
                ranks=flags.ranks,
                address=network.address(0),
                port=_PORT + index,
                threads=threads,
                microbatches=flags.microbatches,
                rows=flags.rows,
                shape={**SHAPE, "channels": flags.channels},
            )
            for index, kind in enumerate(KINDS)
            for rank in range(flags.ranks)
        ]
        with Ranks(network, seats) as ranks:
            looked: dict[str, Any] = {}
            for way in KIND_OF:
                ranks.ask("step", way)  # warms up
                looked[way] = max(ranks.ask("look", way), key=lambda each: each["peak"])
            gradients = {way: looked[way]["gradient"] for way in KIND_OF if way not in {NEVER, ALONE}}
            for megabits in flags.megabits:
                network.limit(megabits, flags.milliseconds)
                links.append({"megabits": megabits, "latency": network.latency, **ranks.ask("probe", EVERY)[0]})
                print(links[-1], flush=True)
                found = measure(ranks, megabits, repeats=flags.repeats, looked=looked)
                print(table(found), flush=True)
                entries += found
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "ranks": flags.ranks,
        "threads": threads,
        "microbatches": flags.microbatches,
        "rows": flags.rows,
        "parameters": looked[OURS]["parameters"],
        "disagreement": disagreement(gradients),
        "links": links,
        "entries": [asdict(each) for each in entries],
    }
    return record, entries


if __name__ == "__main__":
    sys.exit(main())
