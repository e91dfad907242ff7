"""Curves of a loss over a growing rate: what smoothing, divergence and the readings of a curve hold for any numbers."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.tuning.range_curve import (
    FALLS_AT_ONCE,
    FALLS_TO_THE_END,
    FLAT,
    GOOD,
    RISES,
    SMOOTHING,
    centred,
    diverged,
    longest_descent,
    noise,
    onset,
    read,
    smoothed,
    spaced,
)

LOSSES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)
RATES = spaced(1e-6, 1.0, 100)


def curve(*, fall: float = 1.0, at: float = 1e-3, rise: float = 1.0, wobble: float = 0.0, seed: int = 0) -> list[float]:
    """A loss that falls around a rate and rises around a hundred times that, with a wobble that is not random."""
    losses = [2.0]
    for index, rate in enumerate(RATES):
        down = fall / (1 + (at / rate) ** 2)
        up = rise * (rate / (100 * at)) ** 2
        losses.append(2.0 - down + up + wobble * math.sin(12.9898 * index + 78.233 * seed))
    return losses


@given(LOSSES)
def test_smoothing_is_the_average_that_its_definition_gives(losses: list[float]) -> None:
    for end, value in enumerate(smoothed(losses), start=1):
        weights = [SMOOTHING ** (end - 1 - index) for index in range(end)]
        expected = sum(w * loss for w, loss in zip(weights, losses[:end], strict=True)) / sum(weights)
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(LOSSES, st.floats(0.3, 6.0))
def test_averages_stay_between_the_smallest_and_the_largest(losses: list[float], width: float) -> None:
    slack = 1e-9 * max(map(abs, losses)) + 1e-300  # a denormal number rounds to 0
    for values in (smoothed(losses), centred(losses, width=width)):
        assert len(values) == len(losses)
        assert min(losses) - slack <= min(values)
        assert max(values) <= max(losses) + slack


@given(st.floats(-10, 10), st.floats(-1, 1), st.integers(20, 60))
def test_centred_smoothing_leaves_a_line_where_it_is_and_the_other_delays_it(
    begin: float, slope: float, count: int
) -> None:
    line = [begin + slope * index for index in range(count)]
    middle = count // 2
    assert centred(line, width=2.0)[middle] == pytest.approx(line[middle], abs=1e-9)
    behind = (line[-1] - smoothed(line)[-1]) / slope if abs(slope) > 1e-3 else 1.0
    assert 0 < behind < SMOOTHING / (1 - SMOOTHING)  # steps


@given(st.lists(st.floats(0.5, 1.5), min_size=1, max_size=80))
def test_a_loss_that_only_wobbles_has_not_diverged(losses: list[float]) -> None:
    assert not diverged(losses)


@given(st.lists(st.floats(0.5, 1.5), min_size=1, max_size=80), st.sampled_from([math.nan, math.inf, -math.inf, 100.0]))
def test_a_loss_that_is_not_finite_or_far_above_has(losses: list[float], last: float) -> None:
    assert diverged([*losses, last])


def test_losses_below_zero_diverge_too() -> None:
    falling = [-float(index) for index in range(20)]
    assert not any(diverged(falling[: index + 1]) for index in range(20))
    assert diverged([*falling, 1000.0])
    assert not diverged([-1.0, -2.0, -1.5])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(1, 20))
def test_the_last_rise_begins_where_every_later_loss_is_larger(before: list[float], count: int) -> None:
    rise = [before[-1] + 1.0 + index for index in range(count)]
    found = onset([*before, *rise])
    assert found <= len(before)
    whole = [*before, *rise]
    assert all(whole[index] > whole[index - 1] for index in range(found, len(whole)) if index > 1)


@given(st.floats(1e-3, 10.0), st.integers(0, 5))
def test_noise_is_found_under_a_descent(size: float, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - losses, not secrets
    falling = [100 * size * math.exp(-index / 40) + chance.gauss(0, size) for index in range(400)]
    assert noise(falling) == pytest.approx(size, rel=0.35)
    assert statistics.stdev(falling) > 5 * size  # which the usual estimate takes for noise


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_the_longest_descent_is_the_longest_of_all_falling_subsequences(values: list[int]) -> None:
    chosen = [[each for i, each in enumerate(values) if mask >> i & 1] for mask in range(1, 2 ** len(values))]
    longest = max(len(each) for each in chosen if all(b < a for a, b in itertools.pairwise(each)))
    begin, end = longest_descent([float(value) for value in values])
    assert end - begin + 1 == longest


def test_a_curve_with_a_descent_and_a_rise_is_read() -> None:
    found = read(RATES, [curve(wobble=0.01, seed=seed) for seed in range(3)])
    assert found.verdict == GOOD
    assert found.level == pytest.approx(2.0, abs=0.02)
    # The steepest point of f/(1 + (a/r)^2) over log r is r = a; its sum with the rise is lowest at 10 a.
    assert found.fastest == pytest.approx(1e-3, rel=0.3)
    assert found.lowest == pytest.approx(1e-2, rel=0.5)
    assert found.suggested == pytest.approx(math.sqrt(found.fastest * found.lowest))
    # What is read behind the delay of the smoothing is later.
    assert found.steepest is not None
    assert found.valley is not None
    assert found.steepest > found.fastest
    assert found.minimum >= found.lowest
    assert 1e-4 < found.valley < found.minimum


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    runs = [curve(wobble=0.01, seed=seed) for seed in range(3)]
    one, other = read(RATES, runs), read(RATES, [[scale * loss for loss in run] for run in runs])
    assert (one.verdict, one.suggested, one.valley) == (other.verdict, other.suggested, other.valley)


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([curve(fall=0.0, rise=0.0, wobble=0.1, seed=seed) for seed in range(3)], FLAT),
        ([[2.0] * 101], FLAT),
        ([curve(fall=0.02, rise=0.0, wobble=0.3, seed=seed) for seed in range(3)], FLAT),
        ([curve(fall=0.0, at=1e-6, wobble=0.01, seed=seed) for seed in range(3)], RISES),
        ([curve(at=1e-7, wobble=0.01, seed=seed) for seed in range(3)], FALLS_AT_ONCE),
        ([curve(rise=0.0, wobble=0.01, seed=seed) for seed in range(3)], FALLS_TO_THE_END),
        ([[2.0, 50.0]], RISES),
    ],
    ids=["flat", "constant", "less than noise", "only rises", "falls at once", "never rises", "two losses"],
)
def test_a_curve_that_says_nothing_suggests_nothing(losses: list[list[float]], verdict: str) -> None:
    found = read(RATES, losses)
    assert found.verdict == verdict
    assert found.suggested is None


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=30, max_size=30), min_size=1, max_size=3))
def test_any_losses_can_be_read(losses: list[list[float]]) -> None:
    rates = spaced(1e-3, 1.0, 30)
    found = read(rates, losses)
    assert rates[0] <= found.lowest <= rates[-1]
    assert found.suggested is None or rates[0] <= found.suggested <= rates[-1]


@given(st.floats(1e-12, 1e3), st.floats(1.5, 1e12), st.integers(2, 200))
def test_rates_grow_by_one_factor(low: float, factor: float, steps: int) -> None:
    rates = spaced(low, low * factor, steps)
    assert rates[0] == pytest.approx(low)
    assert rates[-1] == low * factor
    assert len(rates) == steps
    for before, after in itertools.pairwise(rates):
        assert after / before == pytest.approx(factor ** (1 / (steps - 1)), rel=1e-6)
