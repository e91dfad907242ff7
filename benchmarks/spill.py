"""What spilled activations cost and save, beside checkpointing: one microbatch, forward and backward."""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from benchmarks.cases import loss_sum
from benchmarks.contenders import make_subject
from benchmarks.machine import hardware, in_words, versions
from benchmarks.memory import Peak, warm_up_profiler
from benchmarks.report import write
from benchmarks.summary import order_of_round, summarize, summarize_ratio
from microbatch.memory.tensor_store import Store

OUT = Path(__file__).parent / "results" / "spill"
WAYS = ("plain", "spill", "checkpoint", "checkpoint and spill")
ROWS = {"gpt": 8, "vit": 16, "residual": 32}
SIZES = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 24)


class Checkpointed(nn.Module):
    """A block that keeps its input alone, and runs again in backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, stream: Tensor) -> Tensor:
        """Return what the block returns."""
        out = checkpoint(self.block, stream, use_reentrant=False)
        assert isinstance(out, Tensor)  # noqa: S101 - it is typed as anything
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One way's numbers on one case.

    Attributes:
        case: A key of `CASES`.
        rows: Rows of the microbatch.
        way: One of `WAYS`.
        seconds: Each pass's time on the wall's clock, forward and backward.
        against_plain: Median, over the rounds, of the ratio to the plain pass.
        waiting_bytes: Bytes on the device between forward and backward, above the weights and the batch.
        peak_bytes: Most bytes at once, the weights and the batch included.
        spilled_bytes: Bytes moved away in a pass.
        file_bytes: Bytes of the file after all passes.
        same_bits: Whether every gradient is the plain pass's, to the last bit.
    """

    case: str
    rows: int
    way: str
    seconds: list[float]
    against_plain: float
    waiting_bytes: int
    peak_bytes: int
    spilled_bytes: int
    file_bytes: int
    same_bits: bool


class Desk:
    """One model, and one way to run a microbatch of it.

    Args:
        case: A key of `CASES`.
        way: One of `WAYS`.
        rows: Rows of the microbatch.
        smallest: Bytes of the smallest storage that is moved.
    """

    def __init__(self, case: str, way: str, rows: int, *, smallest: int = 1 << 16) -> None:
        self._subject = make_subject(case, rows, device="cpu")
        self._model, self._piece = self._subject.model, self._subject.pieces()[0]
        self._spill = mb.Spill(self._model, self._piece, smallest=smallest) if "spill" in way else None
        if "checkpoint" in way:
            blocks = self._model.get_submodule("blocks")
            for name, block in list(blocks.named_children()):
                setattr(blocks, name, Checkpointed(block))

    def seconds(self) -> float:
        """Time one pass."""
        gc.collect()
        started = time.perf_counter()
        self._run()
        taken = time.perf_counter() - started
        self._model.zero_grad()
        return taken

    def digest(self) -> str:
        """Run one pass, and return a digest of every bit of the gradients that it leaves."""
        self._run()
        found = hashlib.sha256()
        for each in self._model.parameters():
            if each.grad is not None:
                found.update(each.grad.numpy().tobytes())
        self._model.zero_grad()
        return found.hexdigest()

    def memory(self) -> dict[str, Any]:
        """Measure what is there at once, untimed."""
        meter = mb.MemoryMeter()
        meter.track(self._model, self._piece)
        before, spilled = meter.live_bytes, self._spilled()
        with meter, self._around():
            loss = loss_sum(self._model, self._piece)
        waiting, spilled = meter.live_bytes - before, self._spilled() - spilled
        loss.backward()
        self._model.zero_grad()
        del loss
        warm_up_profiler()
        peak = Peak(self._subject)
        with peak:
            self._run()
        return {
            "waiting_bytes": waiting,
            "peak_bytes": peak.bytes,
            "spilled_bytes": spilled,
            "file_bytes": self._spill.store.file_bytes if self._spill else 0,
        }

    def _around(self) -> AbstractContextManager[object]:
        return self._spill or nullcontext()

    def _run(self) -> None:
        with self._around():
            loss = loss_sum(self._model, self._piece)
        loss.backward()

    def _spilled(self) -> int:
        return self._spill.bytes_spilled if self._spill else 0


class Clerk:
    """The handle of a desk in a process of its own, because what one leaves of the heap would be another's to find.

    Args:
        case: A key of `CASES`.
        way: One of `WAYS`.
        rows: Rows of the microbatch.
        threads: Threads of torch's operators.
    """

    def __init__(self, case: str, way: str, *, rows: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, case, way, rows, threads), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str) -> Any:
        """Let the desk do something, and return what it found."""
        self._connection.send(what)
        return self._connection.recv()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, case: str, way: str, rows: int, threads: int) -> None:  # noqa: PLR0917 - by position
    torch.set_num_threads(threads)
    desk = Desk(case, way, rows)
    actions: dict[str, Callable[[], Any]] = {
        "seconds": desk.seconds,
        "memory": desk.memory,
        "digest": desk.digest,
    }
    while True:
        try:
            connection.send(actions[connection.recv()]())
        except EOFError:
            return


def measure(case: str, *, rows: int, repeats: int, threads: int) -> list[Entry]:
    """Measure every way on one case, in turn, round after round.

    Args:
        case: A key of `CASES`.
        rows: Rows of the microbatch.
        repeats: Rounds; at least 1.
        threads: Threads of torch's operators.

    Returns:
        One entry for each of `WAYS`.
    """
    clerks = {way: Clerk(case, way, rows=rows, threads=threads) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    try:
        digests = {way: clerks[way].ask("digest") for way in WAYS}
        for index in range(repeats):
            for way in order_of_round(list(WAYS), index):
                seconds[way].append(clerks[way].ask("seconds"))
        memory = {way: clerks[way].ask("memory") for way in WAYS}
    finally:
        for clerk in clerks.values():
            clerk.close()
    return [
        Entry(
            case=case,
            rows=rows,
            way=way,
            seconds=seconds[way],
            against_plain=summarize_ratio(seconds[way], seconds["plain"]).median,
            same_bits=digests[way] == digests["plain"],
            **memory[way],
        )
        for way in WAYS
    ]


def by_size(repeats: int, *, total: int = 1 << 25) -> list[dict[str, float]]:
    """Time putting away, and getting back, one tensor at a time.

    Args:
        repeats: Rounds; at least 1.
        total: Bytes of a round, about.

    Returns:
        For each of `SIZES`, the microseconds of each, medians over the rounds.
    """
    found: list[dict[str, float]] = []
    store = Store()
    for size in SIZES:
        number = max(4, min(256, total // size))
        away: list[float] = []
        back: list[float] = []
        for _ in range(repeats + 1):
            tensors = [torch.ones(size // 4) for _ in range(number)]
            started = time.perf_counter()
            handles = [store.put(each) for each in tensors]
            away.append((time.perf_counter() - started) / number * 1e6)
            tensors.clear()
            started = time.perf_counter()
            while handles:
                handles.pop().get()
            back.append((time.perf_counter() - started) / number * 1e6)
        # The first round makes the file.
        found.append({"bytes": size, "put_us": summarize(away[1:]).median, "get_us": summarize(back[1:]).median})
    return found


def as_markdown(record: dict[str, Any]) -> str:
    """Return the tables.

    Args:
        record: What is written as JSON.

    Returns:
        Markdown.
    """
    machine = in_words(record["hardware"])
    lines = [
        "# Spilled activations, measured",
        "",
        f"{record['date']}; {machine}; {record['threads']} threads.",
        "; ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
        "",
        "One microbatch, forward and backward; every block is one checkpoint. *Waiting* is what is on the device",
        "between the two, above the weights and the batch; *peak* is the most that torch held at once, with them.",
        "",
        "| case | rows | way | time | against plain | waiting | peak | moved | gradient |",
        "|" + "---|" * 9,
    ]
    for each in record["entries"]:
        time_of = summarize(each["seconds"])
        lines.append(
            f"| {each['case']} | {each['rows']} | {each['way']} | {1000 * time_of.median:.0f} ms ± "
            f"{time_of.spread / 2:.1%} | {each['against_plain']:.3f} | {_mebibytes(each['waiting_bytes'])} | "
            f"{_mebibytes(each['peak_bytes'])} | {_mebibytes(each['spilled_bytes'])} | "
            f"{'same bits' if each['same_bits'] else 'differs'} |"
        )
    lines += ["", "One tensor at a time, in the system's cache:", "", "| bytes | put, us | get, us |", "|---|---|---|"]
    lines += [f"| {each['bytes']:,} | {each['put_us']:.0f} | {each['get_us']:.0f} |" for each in record["by_size"]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0; 1 if a gradient differs.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spill", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch's operators")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write, without suffix")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(flags.threads)
    entries = [
        entry
        for case, rows in ROWS.items()
        for entry in measure(case, rows=rows, repeats=flags.repeats, threads=flags.threads)
    ]
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "threads": flags.threads,
        "entries": [asdict(each) for each in entries],
        "by_size": by_size(flags.repeats),
    }
    markdown = as_markdown(record)
    print(markdown)
    write(record, markdown, flags.out)
    return int(not all(each.same_bits for each in entries))


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
