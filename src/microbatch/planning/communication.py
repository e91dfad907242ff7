"""What the ranks of a cluster tell one another in a step, how long that takes, and from which depth on it is little."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from microbatch.errors import ConfigError
from microbatch.planning.block_profile import Model
from microbatch.planning.links import Link, find_link, parse_bandwidth, parse_duration
from microbatch.planning.sharding import Setup
from microbatch.ranks.agreement import message_bytes
from microbatch.ranks.process_group import ring_bytes
from microbatch.ranks.reduce import buckets_of

LITTLE = 0.05
UTILISATION = 0.4
ONCE, EVERY, LEAN, FAST = "once a step", "every microbatch", "lean", "fast"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What is taken to be true of hardware that is not there.

    Attributes:
        bandwidth: Of what leaves a rank, such as ``"25 GB/s"``; `None` for the device's own link, up to 8 ranks.
        latency: Of a collective, such as ``"20 us"``, which is what `None` is.
        microbatch_seconds: Of a microbatch, such as ``"0.25 s"``, where one was measured; `None` to go by the device's
            peak.
        utilisation: Of that peak, what is reached; above 0 and up to 1.
    """

    bandwidth: str | None = None
    latency: str | None = None
    microbatch_seconds: str | None = None
    utilisation: float = UTILISATION

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: A utilisation that is none, or a speed or a time that cannot be read.
        """
        if self.bandwidth is not None:
            parse_bandwidth(self.bandwidth)
        for time in (self.latency, self.microbatch_seconds):
            if time is not None:
                parse_duration(time)
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"utilisation must be above 0 and up to 1, such as 0.4, not {self.utilisation}")

    def microbatch(self, flops: float, setup: Setup) -> tuple[float | None, str]:
        """Say how long the arithmetic of a microbatch takes.

        Args:
            flops: Its floating-point operations.
            setup: On what.

        Returns:
            Seconds, `None` for a device of which no peak is known; and where they come from.

        Raises:
            ConfigError: The time that was given cannot be read.
        """
        if self.microbatch_seconds is not None:
            return parse_duration(self.microbatch_seconds), "as given"
        narrow = setup.precision.dtype != torch.float32
        peak = setup.device.half_flops if narrow else setup.device.single_flops
        if peak is None:
            return None, "no peak is known of this device"
        said = f"{flops / 1e12:.3g} TFLOP at {self.utilisation:.0%} of {peak / 1e12:g} TFLOP/s, data sheet"
        return flops / (self.utilisation * peak), said


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What leaves a rank in a step: some of it once, and some of it with every microbatch.

    Attributes:
        fixed_bytes: Once.
        fixed_calls: Likewise, collectives.
        each_bytes: With each microbatch.
        each_calls: Likewise.
    """

    fixed_bytes: int = 0
    fixed_calls: int = 0
    each_bytes: int = 0
    each_calls: int = 0

    def bytes(self, microbatches: int) -> int:
        """Bytes of a step of so many microbatches."""
        return self.fixed_bytes + microbatches * self.each_bytes

    def calls(self, microbatches: int) -> int:
        """Collectives of a step of so many microbatches."""
        return self.fixed_calls + microbatches * self.each_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to communicate, and what it takes.

    Attributes:
        name: When gradients meet: ``"once a step"`` and ``"every microbatch"``, as `DistributedDataParallel` does by
            default, for replicas; ``"lean"`` and ``"fast"`` for what is sharded, as `Ranks` has them for ``sync``.
        bytes: That leave a rank in a step.
        calls: Collectives.
        seconds: Of communication in a step; `None` where no link is known.
        least_seconds: Of a step in which as much of it as can be goes on during arithmetic; `None` likewise, or where
            nobody knows how long arithmetic takes.
        most_seconds: Of a step in which none of it does.
        depth: Microbatches from which on communication is less than 5 % of `most_seconds`; `None` for never, or where
            that is not known.
    """

    name: str
    bytes: int
    calls: int
    seconds: float | None = None
    least_seconds: float | None = None
    most_seconds: float | None = None
    depth: int | None = None

    @property
    def words(self) -> str:
        """Bytes, calls, and their time, if it is known."""
        said = f"{_decimal(self.bytes)} in {self.calls:,} calls"
        return said if self.seconds is None else f"{said}, {_time(self.seconds)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """What the ranks of a setup tell one another.

    Attributes:
        link: What joins them; `None` where nobody knows.
        microbatches: Of the step.
        microbatch_seconds: Of the arithmetic of one; `None` where nobody knows.
        source: Where that comes from.
        gradient_bytes: In which a gradient's numbers travel.
        ways: What can be chosen, that of the library's default first.
    """

    link: Link | None
    microbatches: int
    microbatch_seconds: float | None
    source: str
    gradient_bytes: int
    ways: tuple[Way, ...]

    def lines(self) -> list[str]:
        """Write it for people.

        Returns:
            A heading, a line for each way, and what is assumed.
        """
        heading = f"communication in a step of {self.microbatches} microbatches"
        lines = [heading if self.link is None else f"{heading}, {self.link.words}"]
        lines += [f"  {each.name:<16}  {self._way(each)}" for each in self.ways]
        return [*lines, *(f"  {each}" for each in self._assumed())]

    def as_dict(self) -> dict[str, Any]:
        """Give everything as JSON can hold it.

        Returns:
            One key a field.
        """
        return {**asdict(self), "ways": [asdict(each) for each in self.ways]}

    def _way(self, way: Way) -> str:
        if way.least_seconds is None or way.most_seconds is None:
            return way.words
        both = [_time(way.least_seconds), _time(way.most_seconds)]
        step = both[0] if both[0] == both[1] else " to ".join(both)
        enough = f"from {way.depth} microbatches on" if way.depth is not None else "never, it grows with them"
        return f"{way.words}; a step {step}; below 5 % of it {'at any depth' if way.depth == 1 else enough}"

    def _assumed(self) -> Iterator[str]:
        if self.link is None:
            yield 'time: pass the bandwidth between the ranks, --bandwidth "25 GB/s"'
        elif self.microbatch_seconds is None:
            yield 'time of a step: pass the time of a microbatch, --microbatch-seconds "0.25 s"'
        else:
            yield f"arithmetic: {_time(self.microbatch_seconds)} a microbatch ({self.source})"
        if any(each.name == ONCE for each in self.ways):
            yield "what meets once does so after the last backward, beside nothing; the rest may during backward"
        else:
            yield "the shorter time is with gathers and scatters beside arithmetic, the longer with nothing beside it"
        yield f"gradients travel in {self.gradient_bytes} bytes a number; counted as a ring, as step.comm_bytes is"


def communication(
    model: Model, setup: Setup, *, microbatches: int, flops: float, assumed: Assumed, full: float | None = None
) -> Communication | None:
    """Say what the ranks tell one another in a step, and how long that takes.

    Args:
        model: What is trained.
        setup: On what, and how.
        microbatches: Of a step, on the rank that has most; at least 1.
        flops: Floating-point operations of a microbatch.
        assumed: How fast everything is.
        full: Microbatches of a step in arithmetic: a last one of half the rows counts as 0.5; `None` for
            ``microbatches``.

    Returns:
        It; `None` for a single rank.

    Raises:
        ConfigError: A bandwidth, or a time, cannot be read.
    """
    if setup.ranks == 1:
        return None
    link = find_link(setup.device, ranks=setup.ranks, bandwidth=assumed.bandwidth, latency=assumed.latency)
    microbatch_seconds, source = assumed.microbatch(flops, setup)
    size = 4 if not setup.shares_gradients else setup.precision.gradients
    ways: list[Way] = []
    for name, traffic in _traffic(model, setup, gradient_bytes=size):
        sent, calls = traffic.bytes(microbatches), traffic.calls(microbatches)
        way = Way(name=name, bytes=sent, calls=calls, seconds=None if link is None else link.seconds(sent, calls))
        if link is not None and microbatch_seconds is not None:
            computed = microbatch_seconds * (microbatches if full is None else full)
            way = _timed(way, traffic, link=link, microbatches=microbatches, arithmetic=(microbatch_seconds, computed))
        ways.append(way)
    return Communication(
        link=link,
        microbatches=microbatches,
        microbatch_seconds=microbatch_seconds,
        source=source,
        gradient_bytes=size,
        ways=tuple(ways),
    )


def enough_microbatches(*, fixed: float, each: float, arithmetic: float, share: float = LITTLE) -> int | None:
    """Find the depth of accumulation from which on communication is little.

    Of ``a`` microbatches it is ``(fixed + a * each) / (fixed + a * (each + arithmetic))``, which falls with ``a`` to
    ``each / (each + arithmetic)``; it is below ``share`` for

        ``a > (1 - share) * fixed / (share * arithmetic - (1 - share) * each)``

    Args:
        fixed: Seconds of communication once a step.
        each: Seconds of it with each microbatch.
        arithmetic: Seconds of a microbatch's own.
        share: What is little, of the step; above 0 and below 1.

    Returns:
        Microbatches; `None` if no number of them is enough.

    Example:
        >>> enough_microbatches(fixed=1.9, each=0.0, arithmetic=1.0)  # 0.95 * 1.9 / 0.05 = 36.1
        37
        >>> enough_microbatches(fixed=0.0, each=0.1, arithmetic=1.0) is None  # 9 % of every step
        True
    """
    gained = share * arithmetic - (1 - share) * each
    return math.floor((1 - share) * fixed / gained) + 1 if gained > 0 else None


def _traffic(model: Model, setup: Setup, *, gradient_bytes: int) -> Iterator[tuple[str, Traffic]]:
    """Yield what can be chosen, the library's default first."""
    trained = [each.numel() for each in model.case.model.parameters() if each.requires_grad]
    number = len(list(model.case.model.parameters()))
    message = ring_bytes("sum", message_bytes(number, ranks=setup.ranks), ranks=setup.ranks)
    if not setup.shares_gradients:
        buckets = [gradient_bytes * size for size in _bucket_sizes(trained)]
        sums = [ring_bytes("sum", each, ranks=setup.ranks) for each in buckets]
        # What a sharded optimizer's ranks have stepped, each gives to all the others.
        given = (
            0
            if setup.strategy == "ddp"
            else ring_bytes("gather", sum(trained) * setup.precision.parameters, ranks=setup.ranks)
        )
        calls = 0 if setup.strategy == "ddp" else len(trained)
        yield ONCE, Traffic(fixed_bytes=sum(sums) + message + given, fixed_calls=len(sums) + 1 + calls)
        every = {"each_bytes": sum(sums), "each_calls": len(sums)}
        yield EVERY, Traffic(fixed_bytes=given, fixed_calls=calls, **every)
        return
    fully = setup.strategy == "fsdp"
    told = ring_bytes("sum", 2 * setup.ranks * 8, ranks=setup.ranks)
    weights, gradients, rest = setup.precision.parameters, gradient_bytes, sum(each.numel() for each in model.rest)
    rest_trained = sum(each.numel() for each in model.rest if each.requires_grad)
    units = [(unit.elements, sum(unit.sizes), 2 if fully else 1) for unit in model.units]
    units += [(rest, rest_trained, 1)] if rest else []
    gathers = [(ring_bytes("gather", weights * whole, ranks=setup.ranks), times) for whole, _, times in units]
    scatters = [ring_bytes("scatter", gradients * own, ranks=setup.ranks) for _, own, _ in units if own]
    yield (
        LEAN,
        Traffic(
            fixed_bytes=2 * message + told,
            fixed_calls=3,
            each_bytes=sum(size * times for size, times in gathers) + sum(scatters),
            each_calls=sum(times for _, times in gathers) + len(scatters),
        ),
    )
    # What is not let go of after forward is gathered once, and stays.
    again, kept = [each for each in gathers if each[1] == 2], [each for each in gathers if each[1] == 1]
    yield (
        FAST,
        Traffic(
            fixed_bytes=2 * message + told + sum(scatters) + sum(size for size, _ in kept),
            fixed_calls=3 + len(scatters) + len(kept),
            each_bytes=sum(2 * size for size, _ in again),
            each_calls=2 * len(again),
        ),
    )


def _bucket_sizes(trained: Sequence[int]) -> list[int]:
    """Say how many numbers each reduction has, of gradients in float32."""
    meta = [torch.empty(size, device="meta") for size in trained]
    return [sum(each.numel() for each in bucket) for bucket, _ in buckets_of(meta, [torch.float32] * len(meta))]


def _timed(way: Way, traffic: Traffic, *, link: Link, microbatches: int, arithmetic: tuple[float, float]) -> Way:
    """Add the times; ``arithmetic`` is that of a full microbatch, and of the whole step."""
    microbatch_seconds, computed = arithmetic
    fixed = link.seconds(traffic.fixed_bytes, traffic.fixed_calls)
    each = link.seconds(traffic.each_bytes, traffic.each_calls)
    spent = fixed + microbatches * each
    # One reduction after the last backward has nothing beside it.
    least = fixed + computed if way.name == ONCE else max(spent, computed)
    return Way(
        name=way.name,
        bytes=way.bytes,
        calls=way.calls,
        seconds=spent,
        least_seconds=least,
        most_seconds=spent + computed,
        depth=enough_microbatches(fixed=fixed, each=each, arithmetic=microbatch_seconds),
    )


def _decimal(size: float) -> str:
    """Write bytes as links count them."""
    for unit, unit_bytes in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= unit_bytes:
            return f"{size / unit_bytes:.3g} {unit}"
    return f"{size:.0f} B"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{1e3 * seconds:.3g} ms"
