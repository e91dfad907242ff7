"""The fit finds the critical batch size that made the data, and its interval is as wide as it says."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.tuning.sweep_fit import CriticalBatch, crossing, fit_critical, harmless_size

SIZES = (64, 128, 256, 512)


def drawn(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - no secret


def made(
    critical: float, steps: float, *, noise: float = 0.0, shared: float = 0.0, seeds: int = 1, draw: random.Random
) -> dict[int, list[tuple[float, float]]]:
    """Return steps and samples of every seed by the law ``S = S_min (1 + B_crit / B)``, with noise of two kinds."""
    common = [draw.gauss(0, shared) for _ in range(seeds)]
    return {
        size: [
            (
                steps * (1 + critical / size) * (factor := math.exp(each + draw.gauss(0, noise))),
                size * steps * (1 + critical / size) * factor,
            )
            for each in common
        ]
        for size in SIZES
    }


def fitted(found: dict[int, list[tuple[float, float]]]) -> CriticalBatch:
    fit = fit_critical(found)
    assert fit is not None
    return fit


@given(critical=st.floats(20, 2000), steps=st.floats(10, 1e5))
def test_the_law_is_recovered(critical: float, steps: float) -> None:
    fit = fitted(made(critical, steps, draw=drawn(0)))
    assert fit.batch_size == pytest.approx(critical, rel=1e-3)
    assert fit.steps == pytest.approx(steps, rel=1e-3)
    assert fit.samples == pytest.approx(steps * critical, rel=1e-3)
    assert fit.misfit < 1e-4
    # The law of the paper, for every size.
    for size, ((s, e),) in made(critical, steps, draw=drawn(0)).items():
        assert (s / fit.steps - 1) * (e / fit.samples - 1) == pytest.approx(1, rel=0.05), size


def test_another_law_is_seen_as_a_misfit() -> None:
    found = {size: [(1e4 / math.sqrt(size), 1e4 * math.sqrt(size))] for size in (8, 64, 512, 4096)}
    assert fitted(found).misfit > 0.02


@pytest.mark.parametrize(("noise", "shared", "seeds"), [(0.05, 0.0, 3), (0.03, 0.3, 3), (0.05, 0.1, 2)])
def test_the_interval_covers_the_truth(noise: float, shared: float, seeds: int) -> None:
    draw, hits, draws = drawn(3), 0, 20
    for _ in range(draws):
        fit = fitted(made(200.0, 1000.0, noise=noise, shared=shared, seeds=seeds, draw=draw))
        hits += (fit.low or 0.0) <= 200.0 <= (fit.high or math.inf)
    assert hits >= 0.85 * draws


def test_what_the_runs_of_a_seed_share_does_not_widen_the_interval() -> None:
    alone = fitted(made(200.0, 1000.0, noise=0.03, seeds=3, draw=drawn(5)))
    shared = made(200.0, 1000.0, noise=0.03, seeds=3, draw=drawn(5))
    shared = {
        size: [(s * f, e * f) for (s, e), f in zip(ways, (0.5, 1.0, 2.0), strict=True)] for size, ways in shared.items()
    }
    fit = fitted(shared)
    assert alone.low is not None
    assert fit.low is not None
    assert fit.low == pytest.approx(alone.low, rel=1e-6)
    # Without the pairing it does.
    broken = {size: ways[index % 3 :] + ways[: index % 3] for index, (size, ways) in enumerate(shared.items())}
    assert fitted(broken).low is None or fitted(broken).low < alone.low / 2  # type: ignore[operator]


def test_where_no_sample_is_lost_only_a_lower_end_is_told() -> None:
    draw = drawn(1)
    found = {size: [(e / size, e) for e in (1e4 * math.exp(draw.gauss(0, 0.01)) for _ in range(3))] for size in SIZES}
    fit = fitted(found)
    assert fit.low is not None
    assert fit.low > 512
    assert fit.high is None
    assert not fit.found


def test_where_no_step_is_saved_only_an_upper_end_is_told() -> None:
    draw = drawn(1)
    found = {size: [(s, s * size) for s in (100 * math.exp(draw.gauss(0, 0.01)) for _ in range(3))] for size in SIZES}
    fit = fitted(found)
    assert fit.high is not None
    assert fit.high < 64
    assert fit.low is None


def test_where_the_law_is_off_the_interval_is_wide_and_nothing_is_found() -> None:
    draw = drawn(2)
    found = made(200.0, 1000.0, noise=0.002, seeds=3, draw=draw)
    exact = fitted(found)
    assert exact.found
    # One batch size at a bad learning rate takes twice the steps; its seeds agree very well.
    found[512] = [(2 * steps, 2 * samples) for steps, samples in found[512]]
    fit = fitted(found)
    assert not fit.lawful or not fit.found or (fit.low or 0.0) <= 200.0 <= (fit.high or math.inf)
    assert fit.low is None or exact.low is None or fit.low / fit.batch_size < exact.low / exact.batch_size / 2


def test_one_seed_has_no_interval_and_one_size_no_fit() -> None:
    found = made(200.0, 100.0, draw=drawn(0))
    fit = fitted(found)
    assert (fit.low, fit.high, fit.found) == (None, None, False)
    assert fit_critical({64: found[64]}) is None
    assert fit_critical({64: found[64], 128: []}) is None
    assert fit_critical({}) is None


@given(critical=st.floats(1, 1e5), smallest=st.floats(1, 1e4))
def test_up_to_the_harmless_size_a_tenth_more_samples_are_taken(critical: float, smallest: float) -> None:
    largest = harmless_size(critical, smallest)
    assert (1 + largest / critical) / (1 + smallest / critical) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("losses", "target", "place"),
    [
        ([3.0, 2.0, 1.0], 2.5, 20.0),
        ([3.0, 2.0, 1.0], 2.0, 40.0),
        ([3.0, 2.0, 1.0], 5.0, 10.0),
        ([3.0, 1.0, 2.0], 1.5, 10 * 4**0.75),
        ([math.inf, 1.0, 1.0], 2.0, 40.0),
        ([3.0, 2.0, 1.0], 0.5, None),
        ([math.nan, math.nan, math.nan], 0.5, None),
        ([], 1.0, None),
    ],
)
def test_a_curve_reaches_a_target_between_its_points(losses: list[float], target: float, place: float | None) -> None:
    assert crossing(losses, [10.0, 40.0, 160.0][: len(losses)], target) == (place and pytest.approx(place))
