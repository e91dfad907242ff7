"""How fast ranks are joined: bytes a second, and what each collective takes whatever it carries."""

from __future__ import annotations

import re
from dataclasses import dataclass

from microbatch.errors import ConfigError
from microbatch.memory.budget import parse_bytes
from microbatch.planning.hardware import Device

LATENCY = 20e-6
_OF_A_MACHINE = 8  # devices that such a link joins
_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_NUMBER = r"\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What joins the ranks.

    Attributes:
        bandwidth: Bytes a second that leave a rank, one way, while all of them send.
        latency: Seconds that a collective takes beside its bytes.
        source: Where the numbers come from.
    """

    bandwidth: float
    latency: float = LATENCY
    source: str = "as given"

    @property
    def words(self) -> str:
        """The link in words."""
        return f"{self.bandwidth / 1e9:.3g} GB/s from each rank, {self.latency * 1e6:.3g} us a call ({self.source})"

    def seconds(self, sent: float, calls: float) -> float:
        """Say what communication takes.

        Args:
            sent: Bytes that leave a rank.
            calls: Collectives.

        Returns:
            ``bytes / bandwidth + calls * latency``.

        Example:
            >>> Link(bandwidth=125e6, latency=1e-3).seconds(500e6, 10)
            4.01
        """
        return sent / self.bandwidth + calls * self.latency


def find_link(device: Device, *, ranks: int, bandwidth: str | None = None, latency: str | None = None) -> Link | None:
    """Find what joins ranks, if nobody says.

    Args:
        device: Of every rank.
        ranks: How many.
        bandwidth: As for `parse_bandwidth`; `None` for the device's own link, up to 8 ranks.
        latency: As for `parse_duration`; `None` for 20 us.

    Returns:
        The link; `None` where nothing is known, or there is one rank.

    Raises:
        ConfigError: One of them cannot be read.
    """
    took = LATENCY if latency is None else parse_duration(latency)
    assumed = ", latency assumed" if latency is None else ""
    if ranks == 1:
        return None
    if bandwidth is not None:
        return Link(bandwidth=parse_bandwidth(bandwidth), latency=took, source=f"as given{assumed}")
    if device.link is None or ranks > _OF_A_MACHINE:
        return None
    name, speed = device.link
    return Link(bandwidth=speed, latency=took, source=f"{name}, data sheet{assumed}")


def parse_bandwidth(text: str) -> float:
    """Read how much leaves a rank in a second.

    Args:
        text: Such as ``"25 GB/s"``, ``"1 GiB/s"``, or ``"10 Gbit/s"``.

    Returns:
        Bytes a second.

    Raises:
        ConfigError: It cannot be read, or is none.

    Example:
        >>> parse_bandwidth("25 GB/s"), parse_bandwidth("1 Gbit/s")
        (25000000000.0, 125000000.0)
    """
    amount, slash, second = text.strip().rpartition("/")
    found = re.fullmatch(_NUMBER + r"([kmgt]bit)", amount, re.IGNORECASE)
    if slash and second.strip() == "s":
        if found is not None and float(found[1]) > 0:
            return float(found[1]) * _BITS[found[2].lower()] / 8
        if found is None:
            return float(parse_bytes(amount))
    raise ConfigError(f'{text!r} is not a bandwidth; write one such as "25 GB/s" or "10 Gbit/s"')


def parse_duration(text: str) -> float:
    """Read a short time.

    Args:
        text: Such as ``"0.5 ms"``, ``"20 us"`` or ``"0.25 s"``.

    Returns:
        Seconds.

    Raises:
        ConfigError: It cannot be read.

    Example:
        >>> parse_duration("0.5 ms"), parse_duration("2s")
        (0.0005, 2.0)
    """
    found = re.fullmatch(_NUMBER + "(s|ms|us)", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f'{text!r} is not a time; write one such as "0.5 ms" or "20 us"')
    return float(found[1]) * _SECONDS[found[2].lower()]
