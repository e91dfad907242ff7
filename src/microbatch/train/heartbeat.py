"""Where every rank is, in a small file each: so that a collective that gets stuck can say who is missing."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from microbatch.errors import MicrobatchError, RankError

_STAGES = (
    "beginning",
    "reading the batch",
    "computing",
    "waiting for the others",
    "validating",
    "checkpointing",
    "done",
)
BEGINNING, READING, COMPUTING, WAITING, VALIDATING, CHECKPOINTING, DONE = range(len(_STAGES))
FAILED = -1
_WORDS = ("timed out", "timeout", "connection closed", "connection reset", "gloo", "nccl", "broken pipe")
_BYTES = 512
_LOOKS, _BETWEEN = 20, 0.05


@dataclass(frozen=True, slots=True)
class Beat:
    """Say where one rank was when it last said so.

    Attributes:
        step: The optimizer step that it was taking, from 1.
        stage: What of it.
        detail: More, such as the microbatch.
        seconds: When, since 1970.
        host: On which machine.
        process: As which process of it.
    """

    step: int
    stage: int
    detail: str
    seconds: float
    host: str
    process: int

    @property
    def at_fault(self) -> bool:
        """Whether it may be the one that others wait for: not where it ended because it has waited in vain itself."""
        return not (self.stage == FAILED and self.detail.startswith(RankError.__name__))

    @property
    def gone(self) -> bool:
        """Whether its process has ended, as far as can be told from this machine."""
        return self._state() in {"Z", "X", ""}

    @property
    def halted(self) -> bool:
        """Whether its process is there and has been stopped, as far as can be told from this machine."""
        return self._state() in {"T", "t"}

    def _state(self) -> str | None:
        """Return the process's state as Linux has it; empty if there is none, `None` where it cannot be seen."""
        if self.host != platform.node() or not Path("/proc").is_dir():
            return None
        try:
            # The state comes behind the name, which is in brackets and may hold anything.
            return Path(f"/proc/{self.process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return ""


class Heartbeat:
    """Write where this rank is.

    Args:
        folder: Which all ranks can read.
        rank: This one's number.

    Cost:
        One small write without a wait for the disk; some 10 microseconds.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = os.open(_path(folder, rank), os.O_WRONLY | os.O_CREAT, 0o644)
        self._host, self._process = platform.node(), os.getpid()
        self._step = 0
        self.at(0, BEGINNING)

    def at(self, step: int, stage: int, detail: str = "") -> None:
        """Say where it is now.

        Args:
            step: The optimizer step that it is taking.
            stage: What of it.
            detail: More, such as the microbatch.
        """
        self._step = step
        beat = Beat(step, stage, detail[:200], time.time(), self._host, self._process)
        # One write of one length: whoever reads meanwhile finds this one or the one before.
        os.pwrite(self._file, json.dumps(asdict(beat)).encode().ljust(_BYTES), 0)

    def failed(self, error: BaseException) -> None:
        """Say that this rank has an error of its own.

        Args:
            error: The error.
        """
        self.at(self._step, FAILED, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Let go of the file, which stays."""
        os.close(self._file)


def read_beat(folder: Path, rank: int) -> Beat | None:
    """Read where a rank is.

    Args:
        folder: Where the heartbeats are.
        rank: Which one.

    Returns:
        What it said last; `None` if it has never said anything.
    """
    try:
        return Beat(**json.loads(_path(folder, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_of_the_group(error: BaseException) -> bool:
    """Tell whether an error came out of a collective, rather than out of the model.

    Args:
        error: Any.

    Returns:
        Whether it is one of those by which a lost or late rank is noticed.
    """
    # Gloo's are RuntimeErrors as all others: only their words tell.
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def who_is_missing(folder: Path, *, ranks: int, rank: int) -> str:
    """Say which ranks did not come to where this one waited in vain.

    Args:
        folder: Where the heartbeats are.
        ranks: How many there are.
        rank: This one.

    Returns:
        One sentence, without a full stop.
    """
    # A process that is being killed closes its connections a moment before it is gone.
    step, found = _look(folder, ranks=ranks, rank=rank)
    for _ in range(_LOOKS):
        if found:
            break
        time.sleep(_BETWEEN)
        step, found = _look(folder, ranks=ranks, rank=rank)
    if not found:
        others = ", ".join(f"rank {each}" for each in range(ranks) if each != rank)
        return f"step {step} came to a halt, and {others} had come as far as this one: the network may have failed"
    return f"step {step} came to a halt, because {' and '.join(found)}"


@contextmanager
def missing_ranks_named(heartbeat: Heartbeat, *, ranks: int, rank: int) -> Generator[None]:
    """Replace an error of a collective by an error that names the missing ranks, and record every error.

    Args:
        heartbeat: This rank's heartbeat.
        ranks: World size.
        rank: This rank.

    Yields:
        Nothing.

    Raises:
        RankError: A collective failed because of another rank.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MicrobatchError) or not is_of_the_group(error):
            heartbeat.failed(error)
            raise
        found = who_is_missing(heartbeat.folder, ranks=ranks, rank=rank)
        told = RankError(f"{found}; its own log is in {heartbeat.folder}")
        heartbeat.failed(told)
        raise told from error


def _look(folder: Path, *, ranks: int, rank: int) -> tuple[int, list[str]]:
    beats = {each: read_beat(folder, each) for each in range(ranks)}
    own = beats[rank]
    furthest = max((_place(beat) for beat in beats.values() if beat is not None), default=(0, 0))
    found = [
        f"rank {each} {_said(beat)}"
        for each, beat in beats.items()
        if each != rank and (beat is None or (beat.at_fault and (beat.gone or beat.halted or _place(beat) < furthest)))
    ]
    return 0 if own is None else own.step, found


def _said(beat: Beat | None) -> str:
    if beat is None:
        return "has never said a word"
    ago = f"{max(0.0, time.time() - beat.seconds):.0f} s ago"
    if beat.stage == FAILED:
        return f"failed in step {beat.step} ({beat.detail})"
    where = f"{_STAGES[beat.stage]}{f', {beat.detail}' if beat.detail else ''}"
    if beat.gone:
        return f"has died (process {beat.process} on {beat.host}; last seen in step {beat.step}, {where})"
    if beat.halted:
        where += ", and its process has been stopped"
    return f"did not arrive: in step {beat.step} it was {where}, {ago} (process {beat.process} on {beat.host})"


def _place(beat: Beat) -> tuple[int, int]:
    return beat.step, beat.stage


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.heartbeat"
