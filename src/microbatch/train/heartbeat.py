"""Write each rank's current stage to a small file, so that an error of a collective can name the missing ranks."""

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
    """Hold the last heartbeat of one rank.

    Attributes:
        step: Number of the current optimizer step, from 1.
        stage: Stage of the step, such as `READING` or `COMPUTING`.
        detail: Further detail, such as the microbatch.
        seconds: Time of the heartbeat, in seconds since 1970.
        host: Name of the rank's machine.
        process: Process id of the rank.
    """

    step: int
    stage: int
    detail: str
    seconds: float
    host: str
    process: int

    @property
    def at_fault(self) -> bool:
        """Return whether the other ranks may be waiting for this one; not if it failed because of a missing rank."""
        return not (self.stage == FAILED and self.detail.startswith(RankError.__name__))

    @property
    def gone(self) -> bool:
        """Return whether the rank's process has ended; `False` also where this machine cannot see the process."""
        return self._state() in {"Z", "X", ""}

    @property
    def halted(self) -> bool:
        """Return whether the rank's process is stopped; `False` also where this machine cannot see the process."""
        return self._state() in {"T", "t"}

    def _state(self) -> str | None:
        """Read the process's state from Linux; empty if there is no such process, `None` where it cannot be seen."""
        if self.host != platform.node() or not Path("/proc").is_dir():
            return None
        try:
            # The state comes after the name, which is in brackets and may hold any character.
            return Path(f"/proc/{self.process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return ""


class Heartbeat:
    """Write the heartbeats of this rank.

    Args:
        folder: Folder that all ranks can read; created if missing.
        rank: This rank.

    Cost:
        One small write without a flush to the disk; about 10 microseconds.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = os.open(_path(folder, rank), os.O_WRONLY | os.O_CREAT, 0o644)
        self._host, self._process = platform.node(), os.getpid()
        self._step = 0
        self.at(0, BEGINNING)

    def at(self, step: int, stage: int, detail: str = "") -> None:
        """Record the current stage of this rank.

        Args:
            step: Number of the current optimizer step.
            stage: Stage of the step, such as `READING` or `COMPUTING`.
            detail: Further detail, such as the microbatch.
        """
        self._step = step
        beat = Beat(step, stage, detail[:200], time.time(), self._host, self._process)
        # A single write of fixed length: a concurrent reader sees either this heartbeat or the one before.
        os.pwrite(self._file, json.dumps(asdict(beat)).encode().ljust(_BYTES), 0)

    def failed(self, error: BaseException) -> None:
        """Record that this rank failed with an error.

        Args:
            error: The error.
        """
        self.at(self._step, FAILED, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Close the file, and keep it on the disk."""
        os.close(self._file)


def read_beat(folder: Path, rank: int) -> Beat | None:
    """Read the last heartbeat of a rank.

    Args:
        folder: Folder of the heartbeats.
        rank: The rank.

    Returns:
        Its last heartbeat; `None` if there is none.
    """
    try:
        return Beat(**json.loads(_path(folder, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_of_the_group(error: BaseException) -> bool:
    """Return whether an error comes from a collective, and not from the model.

    Args:
        error: Any error.

    Returns:
        Whether the error is of the kind that a lost or late rank causes.
    """
    # Errors of gloo are plain RuntimeErrors, so only the words of the message can be compared.
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def who_is_missing(folder: Path, *, ranks: int, rank: int) -> str:
    """Describe which ranks did not arrive at the collective in which this rank failed.

    Args:
        folder: Folder of the heartbeats.
        ranks: World size.
        rank: This rank.

    Returns:
        One sentence, without a full stop.
    """
    # A killed process closes its connections a moment before it ends. Until one of the ranks is certainly at fault,
    # the check is repeated for a second: a rank that has just died would else be described as late.
    for look in range(_LOOKS):
        step, found, certain = _look(folder, ranks=ranks, rank=rank)
        if certain or look == _LOOKS - 1:
            break
        time.sleep(_BETWEEN)
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


def _look(folder: Path, *, ranks: int, rank: int) -> tuple[int, list[str], bool]:
    """Return this rank's step, what is known of the ranks that are missing, and whether one has certainly failed."""
    beats = {each: read_beat(folder, each) for each in range(ranks)}
    own = beats[rank]
    furthest = max((_place(beat) for beat in beats.values() if beat is not None), default=(0, 0))
    found, certain = [], False
    for each, beat in beats.items():
        if each == rank or (beat is not None and not beat.at_fault):
            continue
        failed = beat is not None and (beat.stage == FAILED or beat.gone or beat.halted)
        if beat is None or failed or _place(beat) < furthest:
            found.append(f"rank {each} {_said(beat)}")
            certain = certain or failed
    return 0 if own is None else own.step, found, certain


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
