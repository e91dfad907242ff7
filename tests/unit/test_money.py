"""Prices, costs and deadlines: exact numbers, one form, and no NaN."""

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.errors import ConfigError
from microbatch.planning.money import Money, Price, parse_deadline, parse_prices
from microbatch.planning.time_words import format_time


@pytest.mark.parametrize(
    ("text", "amount", "currency"),
    [
        ("2.50/h", "2.50", ""),
        ("2/h", "2", ""),
        ("0/h", "0", ""),
        ("2.50 EUR/h", "2.50", "EUR"),
        (" 2.50EUR / h ", "2.50", "EUR"),
        ("12 credits/h", "12", "credits"),
    ],
)
def test_a_price_has_one_form(text: str, amount: str, currency: str) -> None:
    assert Price.parse(text) == Price(Decimal(amount), currency)
    assert Price.parse(str(Price.parse(text))) == Price.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2.50",
        "2,50/h",
        "$2.50/h",
        ".50/h",
        "-1/h",
        "nan/h",
        "inf/h",
        "1e3/h",
        "2.5/min",
        "EUR 2/h",
        "2/h/h",
        "٣/h x",
    ],
)
def test_what_is_not_a_price_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a price; write .*2\.50 EUR/h"):
        Price.parse(text)


@given(
    cents=st.integers(0, 10**8),
    milliseconds=st.integers(0, 10**9),
    devices=st.integers(1, 4096),
)
def test_a_cost_is_the_exact_product(cents: int, milliseconds: int, devices: int) -> None:
    money = Price(Decimal(cents) / 100, "EUR").cost(milliseconds / 1000, devices)
    exact = Fraction(cents, 100) * devices * Fraction(milliseconds, 1000) / 3600
    assert abs(Fraction(money.amount) - exact) <= exact * Fraction(1, 10**24)
    assert money.currency == "EUR"


def test_a_cost_does_not_depend_on_the_callers_decimal_context() -> None:
    price = Price.parse("1.23456789/h")
    expected = price.cost(12345.678, 7)
    with localcontext() as context:
        context.prec = 2
        assert price.cost(12345.678, 7) == expected
        assert str(price.cost(12345.678, 7)) == str(expected)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_cost_of_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="finite time of at least 0 seconds"):
        Price.parse("1/h").cost(seconds)


def test_a_cost_needs_a_device() -> None:
    with pytest.raises(ConfigError, match="at least 1 device, not 0"):
        Price.parse("1/h").cost(1.0, devices=0)


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        ("0", "0 EUR"),
        ("2.5", "2.50 EUR"),
        ("9.999", "10.0 EUR"),
        ("99.96", "100 EUR"),
        ("1234.5", "1,230 EUR"),
        ("1E+7", "10,000,000 EUR"),
        ("0.000123456", "0.000123 EUR"),
        ("1.2E-9", "0.00000000120 EUR"),
    ],
)
def test_money_is_written_with_three_digits_and_no_exponent(amount: str, words: str) -> None:
    assert str(Money(Decimal(amount), "EUR")) == words


def test_prices_of_several_devices() -> None:
    assert parse_prices("2.50/h") == Price(Decimal("2.50"))
    assert parse_prices("l4=0.8/h, 24 GiB=1/h") == {"l4": Price(Decimal("0.8")), "24 GiB": Price(Decimal(1))}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("l4=1/h,2/h", "names no device"),
        ("=1/h", "names no device"),
        ("l4=1/h,l4=2/h", "two prices"),
        ("l4=1 EUR/h,t4=2 USD/h", r"different currencies \(EUR and USD\)"),
        ("l4=1 EUR/h,t4=2/h", r"different currencies \(EUR and none\)"),
        ("l4=1,50/h", "'1' is not a price"),
    ],
)
def test_a_wrong_list_of_prices_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_prices(text)


@pytest.mark.parametrize(("text", "seconds"), [("45 s", 45), ("90min", 5400), ("6 h", 21_600), ("0.5 d", 43_200)])
def test_deadlines(text: str, seconds: float) -> None:
    assert parse_deadline(text) == seconds


@pytest.mark.parametrize("text", ["", "6", "0 h", "6 hours", "-1 h", "nan h", "6,5 h", "1 h 30 min"])
def test_what_is_not_a_deadline_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match='such as "90 min", "6 h" or "2 d"'):
        parse_deadline(text)


def test_times_have_three_digits() -> None:
    told = [format_time(each) for each in (0.0123, 1, 119, 120, 7199, 7200, 172_800)]
    assert told == ["12.3 ms", "1.00 s", "119 s", "2.00 min", "120 min", "2.00 h", "2.00 d"]
