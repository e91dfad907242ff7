"""Prices, amounts of money and deadlines as text: parsing, multiplying and formatting, without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Self

from microbatch.errors import ConfigError

_PRICE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(?:\s*([A-Za-z]{1,12}))?\s*/\s*h")
_FORM = 'write a number with a point, a currency if you like, and /h, such as "2.50/h" or "2.50 EUR/h"'
_DEADLINE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h|d)")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
_EXACT, _SHOWN = Context(prec=28), Context(prec=3)


@dataclass(frozen=True, slots=True)
class Money:
    """Hold an amount of money.

    Attributes:
        amount: The amount, finite and at least 0, exact to 28 digits.
        currency: The word that the price was given with; empty if there was none.
    """

    amount: Decimal
    currency: str = ""

    def __str__(self) -> str:
        """Write the amount with 3 significant digits, and its currency.

        Returns:
            Text without an exponent.

        Example:
            >>> str(Money(Decimal("0.00123456"), "EUR")), str(Money(Decimal(1234)))
            ('0.00123 EUR', '1,230')
        """
        amount = _SHOWN.plus(self.amount)
        step = Decimal((0, (1,), amount.adjusted() - 2))
        digits = f"{amount.quantize(step, context=_EXACT):,f}" if amount else "0"
        return f"{digits} {self.currency}".rstrip()


@dataclass(frozen=True, slots=True)
class Price:
    """Hold what one device costs per hour.

    Attributes:
        amount: Money per device and hour; at least 0.
        currency: Its word, such as ``"EUR"``; empty if none was given. Nothing is converted.
    """

    amount: Decimal
    currency: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a price.

        Args:
            text: A number with a decimal point, optionally a currency of up to 12 letters, and ``/h``. Signs such as
                ``$`` are refused: in double quotes, a shell replaces ``$2`` by nothing.

        Returns:
            The price per device and hour.

        Raises:
            ConfigError: The text has another form.

        Example:
            >>> Price.parse("2.50 EUR/h")
            Price(amount=Decimal('2.50'), currency='EUR')
        """
        found = _PRICE.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            raise ConfigError(f"{text!r} is not a price; {_FORM}")
        return cls(Decimal(found[1]), found[2] or "")

    def cost(self, seconds: float, devices: int = 1) -> Money:
        """Compute what some time on some devices costs: ``amount * devices * seconds / 3600``.

        Args:
            seconds: Wall-clock seconds; finite and at least 0.
            devices: Devices that are paid for all that time; at least 1.

        Returns:
            The cost in the price's currency.

        Raises:
            ConfigError: ``seconds`` is negative or not finite, or ``devices`` is below 1.

        Example:
            >>> str(Price.parse("2.50 EUR/h").cost(90 * 60, devices=4))
            '15.0 EUR'
        """
        if not math.isfinite(seconds) or seconds < 0:
            raise ConfigError(f"a cost needs a finite time of at least 0 seconds, not {seconds!r}")
        if devices < 1:
            raise ConfigError(f"a cost needs at least 1 device, not {devices!r}")
        device_seconds = _EXACT.multiply(Decimal(str(seconds)), Decimal(devices))
        return Money(_EXACT.divide(_EXACT.multiply(self.amount, device_seconds), Decimal(3600)), self.currency)

    def __str__(self) -> str:
        """Write the price as `parse` reads it."""
        return f"{self.amount:f} {self.currency}".rstrip() + "/h"


def parse_prices(text: str) -> Price | Mapping[str, Price]:
    """Parse one price for every device, or a price for each of several.

    Args:
        text: ``"2.50 EUR/h"``, or ``"a100-40gb=1.20/h,h100=2.50/h"``: names, each with its price, between commas.

    Returns:
        The price, or the prices by name as written.

    Raises:
        ConfigError: A price or the list has another form, a name stands twice, or the currencies differ.

    Example:
        >>> {name: str(price) for name, price in parse_prices("l4=0.80/h, h100=2.50/h").items()}
        {'l4': '0.80/h', 'h100': '2.50/h'}
    """
    if "=" not in text:
        return Price.parse(text)
    found: dict[str, Price] = {}
    for entry in text.split(","):
        name, equals, price = (part.strip() for part in entry.partition("="))
        if not (name and equals):
            raise ConfigError(f'{entry.strip()!r} names no device; write "a100-40gb=1.20/h,h100=2.50/h"')
        if name in found:
            raise ConfigError(f"{name!r} has two prices in {text!r}; keep one")
        found[name] = Price.parse(price)
    currencies = list(dict.fromkeys(price.currency for price in found.values()))
    if len(currencies) > 1:
        words = " and ".join(each or "none" for each in currencies)
        raise ConfigError(f"the prices in {text!r} have different currencies ({words}); write all in one")
    return found


def parse_deadline(text: str) -> float:
    """Parse the time within which a run has to end.

    Args:
        text: A number and its unit: ``"45 s"``, ``"90 min"``, ``"6 h"`` or ``"2 d"``.

    Returns:
        Seconds; above 0.

    Raises:
        ConfigError: The text has another form, or the time is 0.

    Example:
        >>> parse_deadline("6 h"), parse_deadline("1.5min")
        (21600.0, 90.0)
    """
    found = _DEADLINE.fullmatch(text.strip())
    seconds = float(Decimal(found[1]) * _SECONDS[found[2]]) if found else 0.0
    if seconds <= 0:
        raise ConfigError(f'{text!r} is not a time above 0; write one such as "90 min", "6 h" or "2 d"')
    return seconds
