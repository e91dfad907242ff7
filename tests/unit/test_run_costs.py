"""The cost of a run, the cheapest setup within a deadline, and the table that compares setups."""

import dataclasses
import json
import re
from decimal import Decimal
from typing import Any

import pytest

from microbatch.errors import ConfigError
from microbatch.planning.money import Price
from microbatch.planning.run_costs import RunCost, cheapest, costs_table, deadline_words, steps_of_run

MADE = RunCost(
    where="2 x h100-80gb",
    devices=2,
    microbatch_size=8,
    microbatches=4,
    peak_bytes=1 << 30,
    fits=True,
    step_seconds=1.8,
    least_step_seconds=1.5,
    steps=1000,
    price=Price.parse("2.50 EUR/h"),
    limit="arithmetic",
    basis="predicted",
)


def made(where: str, **changed: Any) -> RunCost:
    return dataclasses.replace(MADE, where=where, **changed)


SLOW = made("slow", devices=1, step_seconds=3.0)  # 2.08 EUR in 50 min
FAST = made("fast", devices=4, step_seconds=1.0)  # 2.78 EUR in 16.7 min
LARGE = made("large", fits=False, limit="memory", price=Price.parse("0.01 EUR/h"))
DARK = made("dark", step_seconds=None, least_step_seconds=None, limit=None)
ALL = (FAST, SLOW, LARGE, DARK)


def test_a_run_costs_what_its_steps_cost() -> None:
    # 2 devices * 2.50 EUR/h * 1.8 s / 3600 = 0.0025 EUR a step
    assert str(MADE.step_cost) == "0.00250 EUR"
    assert str(MADE.run_cost) == "2.50 EUR"
    assert MADE.run_seconds == 1800
    said = "cost on 2 x h100-80gb, at 2.50 EUR/h a device, predicted: a step 1.80 s, 0.00250 EUR; "
    assert MADE.words() == said + "1,000 steps 30.0 min, 2.50 EUR"


@pytest.mark.parametrize(("unknown", "said"), [(LARGE, "it does not fit"), (DARK, "the time of a step is not known")])
def test_what_is_not_known_has_no_cost(unknown: RunCost, said: str) -> None:
    assert (unknown.step_cost, unknown.run_cost, unknown.run_seconds, unknown.meets(1e9)) == (None,) * 4
    assert said in unknown.words()


def test_without_a_price_there_is_time_and_no_money() -> None:
    free = made("free", price=None)
    assert (free.run_cost, free.run_seconds) == (None, 1800)
    assert free.words() == "cost on free, predicted: a step 1.80 s; 1,000 steps 30.0 min"
    assert cheapest([free]) is None


@pytest.mark.parametrize(("deadline", "best"), [(None, SLOW), (3000, SLOW), (2999, FAST), (1000, FAST), (999, None)])
def test_the_cheapest_within_a_deadline(deadline: float | None, best: RunCost | None) -> None:
    assert cheapest(ALL, deadline=deadline) is best


def test_of_equal_costs_the_faster_one() -> None:
    twice = made("twice", devices=4, step_seconds=0.9)
    assert twice.run_cost == MADE.run_cost
    assert cheapest([MADE, twice]) is twice


def test_without_a_length_the_cheapest_step() -> None:
    steps = [dataclasses.replace(each, steps=None) for each in (FAST, SLOW)]
    assert cheapest(steps) is steps[1]
    assert cheapest(steps, deadline=1e9) is None


def test_the_deadline_in_words() -> None:
    assert deadline_words(ALL, 2400) == "cheapest within 40.0 min: fast, 16.7 min, 2.78 EUR (predicted)"
    said = "within 60.0 s: none of these; the fastest is fast, 16.7 min, 2.78 EUR (predicted)"
    assert deadline_words(ALL, 60) == said
    assert deadline_words([SLOW], 3600) == "within 60.0 min: yes, 50.0 min, 2.08 EUR (predicted)"
    assert deadline_words([SLOW], 60) == "within 60.0 s: no; the run takes 50.0 min, 2.08 EUR (predicted)"
    assert "the time of no run is known" in deadline_words([LARGE, DARK], 60)


def test_the_table_marks_the_best_and_leaves_unknown_columns_out() -> None:
    head, *lines = (re.split(r"  +", line) for line in costs_table(ALL, best=SLOW).splitlines())
    assert head[1:] == ["devices", "cut", "peak", "fits", "step", "run", "step costs", "run costs", "limited by"]
    fast, slow, large, dark = lines
    size = ["4 x 8", "1.00 GiB"]
    assert slow == [">", "slow", *size, "yes", "3.00 s", "50.0 min", "0.00208 EUR", "2.08 EUR", "arithmetic"]
    assert fast[:2] == ["", "fast"]
    assert large[1:] == ["large", *size, "no", "-", "-", "-", "-", "memory"]
    assert dark[1:] == ["dark", *size, "yes", "-", "-", "-", "-", "-"]
    bare = costs_table([dataclasses.replace(MADE, price=None, steps=None)]).splitlines()[0]
    assert re.split(r"  +", bare)[1:] == ["devices", "cut", "peak", "fits", "step", "limited by"]
    narrow = costs_table(ALL, width=60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert "run costs" in narrow


def test_json_holds_exact_decimals_and_no_nan() -> None:
    told = json.loads(json.dumps(MADE.as_dict(), allow_nan=False))
    assert (Decimal(told["step_cost"]), Decimal(told["run_cost"])) == (Decimal("0.0025"), Decimal("2.5"))
    assert told["currency"] == "EUR"
    assert json.loads(json.dumps(DARK.as_dict(), allow_nan=False))["run_cost"] is None


@pytest.mark.parametrize(
    ("steps", "samples", "expected"), [(7, None, 7), (None, 128, 2), (None, 129, 3), (None, 1, 1), (None, None, None)]
)
def test_the_length_of_a_run(steps: int | None, samples: int | None, expected: int | None) -> None:
    assert steps_of_run(64, steps=steps, samples=samples) == expected


@pytest.mark.parametrize(("steps", "samples"), [(1, 1), (0, None), (None, 0)])
def test_an_impossible_length_is_refused(steps: int | None, samples: int | None) -> None:
    with pytest.raises(ConfigError):
        steps_of_run(64, steps=steps, samples=samples)
