"""Name the ranks that are missing after a collective has failed, from what each rank last recorded about itself."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from microbatch.errors import MicrobatchError, RankError

STAGES = (
    "beginning",
    "reading the batch",
    "computing",
    "waiting for the others",
    "validating",
    "checkpointing",
    "done",
)
BEGINNING, READING, COMPUTING, WAITING, VALIDATING, CHECKPOINTING, DONE = range(len(STAGES))
FAILED, ENDED, UNKNOWN = -1, -2, -3
_WORDS = ("timed out", "timeout", "connection closed", "connection reset", "gloo", "nccl", "broken pipe")
_PATIENCE = 1.0  # seconds until a rank that is not certainly lost counts as late


@dataclass(frozen=True, slots=True)
class Beat:
    """Hold the last heartbeat of one rank.

    Attributes:
        step: Number of the current optimizer step.
        stage: Stage of the step, such as `READING` or `COMPUTING`.
        detail: Further detail, such as the microbatch.
        seconds: Time of the heartbeat, in seconds since 1970.
        host: Name of the rank's machine.
        process: Process id of the rank.
        space: Where the process id is valid: processes of one machine can be in different containers.
        failures: Number of times that the rank has failed so far.
    """

    step: int
    stage: int
    detail: str
    seconds: float
    host: str
    process: int
    space: str = ""
    failures: int = 0

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

    @property
    def certain(self) -> bool:
        """Return whether the rank certainly takes part in no more collectives."""
        return self.stage in {FAILED, ENDED} or self.gone or self.halted

    def _state(self) -> str | None:
        """Read the process's state from Linux; empty if there is no such process, `None` where it cannot be seen."""
        elsewhere = self.host != platform.node() or self.space not in {"", process_space()}
        if elsewhere or not self.process or not Path("/proc").is_dir():
            return None
        try:
            # The state comes after the name, which is in brackets and may hold any character.
            return Path(f"/proc/{self.process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return ""


def process_space() -> str:
    """Return a name of the namespace of this process's id; empty where there is none."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - not a path: "pid:[4026531836]"
    except OSError:
        return ""


def is_of_the_group(error: BaseException | None) -> bool:
    """Return whether an error comes from a collective, and not from the model."""
    if isinstance(error, MicrobatchError) or not isinstance(error, RuntimeError):
        return False
    # Errors of gloo are plain RuntimeErrors, so only the words of the message can be compared.
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _WORDS)


def is_of_a_lost_rank(error: BaseException) -> bool:
    """Return whether a collective failed because of another rank; or whether a `RankError` reports this."""
    return is_of_the_group(error.__cause__ if isinstance(error, RankError) else error)


@contextmanager
def missing_ranks_named(name: Callable[[Exception], None]) -> Generator[None]:
    """Replace an error of a collective by an error that names the missing ranks, which a function raises."""
    try:
        yield
    except Exception as error:
        name(error)
        raise


def describe_missing(read: Callable[[], Mapping[int, Beat | None]], *, rank: int) -> str:
    """Describe in a sentence which ranks did not arrive at the collective in which this rank failed."""
    # A killed process closes its connections a moment before it ends. Until one of the ranks is certainly at fault,
    # the check is repeated for a second: a rank that has just died would else be described as late.
    beats, until = read(), time.monotonic() + _PATIENCE
    step, found, certain = _look(beats, rank=rank)
    while not certain and time.monotonic() < until:
        time.sleep(pause(len(beats)))
        beats = read()
        step, found, certain = _look(beats, rank=rank)
    if not found:
        stopped = {each: beat for each, beat in beats.items() if each != rank and beat and beat.stage == FAILED}
        found = [f"rank {each} stopped ({beat.detail})" for each, beat in stopped.items()]
    if not found:
        others = ", ".join(f"rank {each}" for each in beats if each != rank)
        return f"step {step} came to a halt, and {others} had come as far as this one: the network may have failed"
    return f"step {step} came to a halt, because {' and '.join(found)}"


def pause(ranks: int) -> float:
    """Return the seconds between two looks at the heartbeats of all ranks, which all ranks may take at once."""
    return max(0.05, ranks / 1000)


def _look(beats: Mapping[int, Beat | None], *, rank: int) -> tuple[int, list[str], bool]:
    """Return this rank's step, what is known of the ranks that are missing, and whether one has certainly failed."""
    own = beats[rank]
    step = 0 if own is None else own.step
    furthest = max((_place(beat) for beat in beats.values() if beat is not None), default=(0, 0))
    others = {each: beat for each, beat in beats.items() if each != rank and (beat is None or beat.at_fault)}
    certain = {each: beat for each, beat in others.items() if beat is not None and beat.certain}
    # If some ranks certainly take no part, the others wait for them too.
    behind = {each: beat for each, beat in others.items() if beat is None or _place(beat) < furthest}
    found = [f"rank {each} {_described(beat, step)}" for each, beat in (certain or behind).items()]
    return step, found, bool(certain)


def _described(beat: Beat | None, step: int) -> str:
    if beat is None:
        return "has not been heard of"
    where = f"process {beat.process} on {beat.host}"
    if beat.stage == FAILED:
        return f"failed in step {beat.step} ({beat.detail})"
    if beat.stage == ENDED:
        return (
            f"has ended, last heard of in step {beat.step} ({where}): its loop may have fewer batches than the others'"
        )
    if beat.stage == UNKNOWN:
        lost = "has ended or died" if beat.gone else "was stopped" if beat.halted else "did not arrive"
        return f"{lost}; it took part in step {beat.step} ({where})"
    ago = f"{max(0.0, time.time() - beat.seconds):.0f} s ago"
    stage = f"{STAGES[beat.stage]}{f', {beat.detail}' if beat.detail else ''}"
    if beat.gone:
        return f"has died ({where}; last seen in step {beat.step}, {stage})"
    stopped = ", and its process has been stopped" if beat.halted else ""
    if beat.stage == WAITING and beat.step < step:
        return f"did not arrive: it was last heard of in step {beat.step}{stopped}, {ago} ({where})"
    return f"did not arrive: in step {beat.step} it was {stage}{stopped}, {ago} ({where})"


def _place(beat: Beat) -> tuple[int, int]:
    return beat.step, beat.stage
