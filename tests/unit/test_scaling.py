"""Hyperparameters go with the batch as the papers say, and the loss they are for stays where it was, a sample."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop

import microbatch as mb
from microbatch.errors import ConfigError
from microbatch.planning.rules import RULES

SIZES = st.integers(1, 4096)
RATES = st.floats(1e-6, 1.0)
BETAS = st.floats(0.9, 0.9999)


def sgd(**values: Any) -> mb.Hyperparameters:
    defaults: dict[str, Any] = {"learning_rate": 0.1, "momentum": 0.9}
    return mb.Hyperparameters(optimizer="SGD", **defaults | values)


def adam(optimizer: str = "Adam", **values: Any) -> mb.Hyperparameters:
    defaults: dict[str, Any] = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    return mb.Hyperparameters(optimizer=optimizer, **defaults | values)


def scale(values: mb.Hyperparameters, start: int, end: int, rule: str = "auto") -> mb.Hyperparameters:
    return mb.scale_hyperparameters(values, from_batch_size=start, to_batch_size=end, rule=rule).scaled[0]


def warned(values: mb.Hyperparameters, start: int, end: int, **settings: Any) -> str:
    settings = {"warmup_steps": 100} | settings
    scaling = mb.scale_hyperparameters(values, from_batch_size=start, to_batch_size=end, **settings)
    return "\n".join(scaling.warnings)


def same(first: mb.Hyperparameters, second: mb.Hyperparameters) -> bool:
    pairs = zip(first.rows().values(), second.rows().values(), strict=True)
    return list(first.rows()) == list(second.rows()) and all(math.isclose(a, b, rel_tol=1e-9) for a, b in pairs)


# ---------------------------------------------------------------------------------------- numbers from the papers


def test_linear_is_goyals_table_0_1_at_256_and_3_2_at_8192() -> None:
    assert same(scale(sgd(), 256, 8192), sgd(learning_rate=3.2))


def test_square_root_is_malladis_formula() -> None:
    # k = 4: sqrt 2; 1 - 4 * 0.1 = 0.6; 1 - 4 * 0.001 = 0.996; 1e-8 / 2.
    assert same(scale(adam(), 256, 1024), adam(learning_rate=2e-3, betas=(0.6, 0.996), eps=5e-9))
    # k = 1/4: 1 - 0.1 / 4 = 0.975, 1 - 0.001 / 4 = 0.99975.
    assert same(scale(adam("AdamW"), 256, 64), adam("AdamW", learning_rate=5e-4, betas=(0.975, 0.99975), eps=2e-8))


def test_half_life_is_mareks_beta2_of_0_95_at_512_and_0_9999_at_1() -> None:
    after = scale(adam(betas=(0.9, 0.95)), 512, 1, "half-life")
    assert after.betas is not None
    assert same(after, adam(betas=(0.9, after.betas[1])))
    assert round(after.betas[1], 4) == 0.9999
    assert math.isclose(after.betas[1] ** 512, 0.95)


def test_what_no_rule_names_is_left_alone() -> None:
    before = sgd(weight_decay=1e-4)
    assert scale(before, 32, 96) == dataclasses.replace(before, learning_rate=0.1 * 3)


# ------------------------------------------------------------------------------------------------ algebra of rules


@pytest.mark.parametrize("rule", RULES)
@given(start=SIZES, end=SIZES, rate=RATES, beta1=BETAS, beta2=BETAS)
def test_there_and_back_is_the_same(rule: str, start: int, end: int, rate: float, beta1: float, beta2: float) -> None:
    # Downwards first: upwards, a beta may meet 0, from where no way leads back.
    small, large = sorted((start, end))
    before = adam(learning_rate=rate, betas=(beta1, beta2)) if rule != "linear" else sgd(learning_rate=rate)
    assert same(scale(scale(before, large, small, rule), small, large, rule), before)


@pytest.mark.parametrize("rule", RULES)
@given(sizes=st.lists(SIZES, min_size=3, max_size=3), rate=RATES, beta1=BETAS, beta2=BETAS)
def test_two_changes_are_one(rule: str, sizes: list[int], rate: float, beta1: float, beta2: float) -> None:
    small, middle, large = sorted(sizes)
    before = adam(learning_rate=rate, betas=(beta1, beta2)) if rule != "linear" else sgd(learning_rate=rate)
    stepwise = scale(scale(before, large, middle, rule), middle, small, rule)
    assert same(stepwise, scale(before, large, small, rule))


@pytest.mark.parametrize("rule", RULES)
@given(size=SIZES, rate=RATES, beta1=BETAS, beta2=BETAS)
def test_the_same_batch_changes_nothing_and_warns_of_nothing(
    rule: str, size: int, rate: float, beta1: float, beta2: float
) -> None:
    before = adam(learning_rate=rate, betas=(beta1, beta2), weight_decay=0.1)
    scaling = mb.scale_hyperparameters(
        before, from_batch_size=size, to_batch_size=size, rule=rule, warmup_steps=7, steps=70, critical_batch_size=1
    )
    assert same(scaling.scaled[0], before)
    assert (scaling.warmup_steps, scaling.steps, scaling.warnings) == (7, 70, ())


@given(start=SIZES, end=SIZES, beta2=BETAS)
def test_the_second_moments_half_life_in_samples_is_kept(start: int, end: int, beta2: float) -> None:
    def half_life(values: mb.Hyperparameters, batch_size: int) -> float:
        assert values.betas is not None
        return batch_size * math.log(0.5) / math.log(values.betas[1])

    small, large = sorted((start, end))
    before = adam(betas=(0.9, beta2))
    after = scale(before, large, small, "half-life")
    assert math.isclose(half_life(after, small), half_life(before, large), rel_tol=1e-6)
    if large > 2 * small:  # shown a wrong value: beta2 as it was
        assert not math.isclose(half_life(before, small), half_life(before, large), rel_tol=0.1)


@given(start=SIZES, end=SIZES, steps=st.integers(0, 10**6))
def test_schedules_see_as_many_samples_to_half_a_step(start: int, end: int, steps: int) -> None:
    scaling = mb.scale_hyperparameters(sgd(), from_batch_size=start, to_batch_size=end, warmup_steps=steps, steps=steps)
    scaled = scaling.steps
    assert scaled is not None
    assert scaled == scaling.warmup_steps
    if scaled == 1:
        assert steps > 0
    else:
        assert 2 * abs(scaled * end - steps * start) <= end
    off = abs(scaled * end - steps * start) > 0.05 * steps * start
    assert any("steps in whole steps" in text for text in scaling.warnings) == (steps > 0 and off)


# -------------------------------------------------------------------------------------------- what they are for


def loss_curve(
    make: Callable[[list[nn.Parameter]], Optimizer], *, batch_size: int, scaling: Any, noise: float
) -> Tensor:
    """Train a quadratic with noisy gradients, and return the loss at every 320 samples."""
    # Few enough for one thread: two would wait for each other wherever another job runs.
    curvature = torch.logspace(-2, 0, 2048)
    weight = nn.Parameter(torch.ones_like(curvature))
    optimizer = make([weight])
    if scaling is not None:
        scaling.apply_to(optimizer)
    generator = torch.Generator().manual_seed(1)
    losses: list[Tensor] = []
    for step in range(6400 // batch_size):
        drawn = torch.randn(curvature.shape, generator=generator) * noise / math.sqrt(batch_size)
        weight.grad = curvature * weight.detach() + drawn
        optimizer.step()
        if (step + 1) * batch_size % 320 == 0:
            losses.append((curvature * weight.detach().square()).mean() / 2)
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("make", "noise", "factor", "right", "wrong", "within", "beyond"),
    [
        pytest.param(lambda p: SGD(p, lr=0.01), 0.5, 8, "linear", ("none", "sqrt"), 0.04, 1.0, id="SGD"),
        pytest.param(
            lambda p: Adam(p, lr=0.002, betas=(0.9, 0.99), eps=1e-3),
            20.0,
            4,
            "sqrt",
            ("none", "linear", "half-life"),
            0.03,
            0.1,
            id="Adam",
        ),
    ],
)
def test_the_loss_curve_a_sample_is_kept_by_the_right_rule_alone(
    make: Callable[[list[nn.Parameter]], Optimizer],
    noise: float,
    factor: int,
    right: str,
    wrong: tuple[str, ...],
    within: float,
    beyond: float,
) -> None:
    before = loss_curve(make, batch_size=4, scaling=None, noise=noise)

    def off(rule: str) -> float:
        scaling = None
        if rule != "none":
            optimizer = make([nn.Parameter(torch.ones(1))])
            scaling = mb.scale_hyperparameters(optimizer, from_batch_size=4, to_batch_size=4 * factor, rule=rule)
        after = loss_curve(make, batch_size=4 * factor, scaling=scaling, noise=noise)
        return ((after - before).abs() / before).max().item()

    assert off(right) <= within
    assert min(off(rule) for rule in wrong) >= beyond


# ------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("values", "start", "end", "settings", "words"),
    [
        (adam(), 256, 512, {"rule": "linear"}, 'the linear rule is SGD\'s: Adam.*rule="sqrt"'),
        (sgd(), 256, 512, {"warmup_steps": None}, "without warm-up, 0.2 meets the first steps.*start at 0.1"),
        (sgd(), 256, 512, {"warmup_steps": 0}, "without warm-up"),
        (sgd(), 256, 16384, {}, "16,384 is above 8,192"),
        (sgd(), 256, 512, {"rule": "sqrt"}, 'square-root rule is Adam\'s.*rule="linear"'),
        (adam(), 64, 1024, {}, "beta1 would be -0.6.*batch of 640"),
        (adam(betas=(0.9, 0.95)), 64, 64 * 15, {}, "beta2 falls to 0.25, an average over 1.3 steps"),
        (adam(), 64, 1, {"rule": "half-life"}, "learning rate at 0.001 for you to tune.*between 0.000125 and 0.001"),
        (adam(betas=(0.9, 0.9)), 64, 640, {"rule": "half-life"}, "beta2 falls to 0.348"),
        (adam(), 64, 8192, {"rule": "half-life"}, "8,192 is above 4,096"),
        (
            adam("AdamW", weight_decay=0.1),
            64,
            256,
            {},
            "weight_decay stays at 0.1.*shrinks the weights less; 0.2 would",
        ),
        (adam("AdamW", weight_decay=0.1), 256, 64, {}, "shrinks the weights more; 0.05 would"),
        (adam("Lion"), 64, 256, {"rule": "sqrt"}, "made for Adam and AdamW, and is only borrowed for Lion"),
        (sgd(), 64, 256, {"critical_batch_size": 100}, "256 is past the critical one of 100"),
        (sgd(), 64, 640, {"warmup_steps": 15}, "warmup_steps in whole steps are 1,280 samples rather than 960"),
        (sgd(), 64, 640, {"steps": 3}, "steps in whole steps are 640 samples rather than 192"),
    ],
)
def test_where_a_rule_breaks_it_says_so(
    values: mb.Hyperparameters, start: int, end: int, settings: dict[str, Any], words: str
) -> None:
    text = warned(values, start, end, **settings)
    assert re.search(words, text), text


@pytest.mark.parametrize(
    ("values", "start", "end", "settings"),
    [
        (sgd(weight_decay=1e-4), 256, 8192, {"critical_batch_size": 8192}),
        (sgd(), 8192, 256, {"warmup_steps": None, "critical_batch_size": 100}),
        (adam(weight_decay=0.1), 256, 1024, {"steps": 10_000}),
        (adam("AdamW"), 1024, 4, {}),
        (adam(betas=(0.0, 0.999)), 64, 1024, {}),
    ],
)
def test_where_a_rule_holds_it_says_nothing(
    values: mb.Hyperparameters, start: int, end: int, settings: dict[str, Any]
) -> None:
    assert warned(values, start, end, **settings) == ""


def test_a_beta_that_would_be_negative_is_0_and_one_of_0_stays() -> None:
    assert scale(adam(), 64, 640 * 2).betas == (0.0, 0.98)
    for end in (1, 4096):
        betas = scale(adam(betas=(0.0, 0.999)), 64, end).betas
        assert betas is not None
        assert betas[0] == 0


# ----------------------------------------------------------------------------------------------------- optimizers


class Subclass(AdamW):
    """A user's own, which is to be read as what it extends."""


def parameters(groups: int = 2) -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1 / (index + 1)} for index in range(groups)]


@pytest.mark.parametrize(
    ("make", "kind", "rule"),
    [
        (SGD, "SGD", "linear"),
        (Adam, "Adam", "sqrt"),
        (AdamW, "AdamW", "sqrt"),
        (Subclass, "AdamW", "sqrt"),
        (lambda groups: Adam(groups, decoupled_weight_decay=True), "AdamW", "sqrt"),
    ],
)
def test_an_optimizer_is_read_and_scaled_in_place_all_groups(
    make: Callable[..., Optimizer], kind: str, rule: str
) -> None:
    optimizer = make(parameters())
    scaling = mb.scale_hyperparameters(optimizer, from_batch_size=64, to_batch_size=256)
    assert [group.optimizer for group in scaling.given] == [kind, kind]
    assert scaling.rule == rule
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]  # nothing is written yet
    scaling.apply_to(optimizer)
    factor = {"linear": 4, "sqrt": 2}[rule]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * factor, 0.05 * factor]
    if rule == "sqrt":
        assert all(math.isclose(group["betas"][0], 0.6) for group in optimizer.param_groups)
        assert all(group["eps"] == 5e-9 for group in optimizer.param_groups)
    back = mb.scale_hyperparameters(optimizer, from_batch_size=256, to_batch_size=64)
    assert all(same(first, second) for first, second in zip(back.scaled, scaling.given, strict=True))


def test_nothing_is_scaled_twice_nor_in_another_optimizer() -> None:
    optimizer = SGD(parameters())
    scaling = mb.scale_hyperparameters(optimizer, from_batch_size=64, to_batch_size=256)
    scaling.apply_to(optimizer)
    with pytest.raises(ConfigError, match=r"learning_rate of parameter group 0 is 0\.4 and not 0\.1.*scaled before"):
        scaling.apply_to(optimizer)
    with pytest.raises(ConfigError, match="optimizer of parameter group 0 is 'Adam' and not 'SGD'"):
        scaling.apply_to(Adam(parameters()))
    with pytest.raises(ConfigError, match="2 parameter groups were given, and this optimizer has 3"):
        scaling.apply_to(SGD(parameters(3)))
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.2]


def test_a_difference_in_the_last_group_leaves_the_first_alone() -> None:
    optimizer = SGD(parameters())
    scaling = mb.scale_hyperparameters(optimizer, from_batch_size=64, to_batch_size=256)
    optimizer.param_groups[1]["lr"] = 0.07
    with pytest.raises(ConfigError, match="parameter group 1"):
        scaling.apply_to(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_plain_values_can_be_applied_to_an_optimizer_that_holds_them() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, weight_decay=1e-4)
    mb.scale_hyperparameters(sgd(momentum=None), from_batch_size=64, to_batch_size=128).apply_to(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4


def test_under_a_scheduler_the_peak_is_read_and_nothing_is_written() -> None:
    optimizer = SGD(parameters(1))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.01)
    scaling = mb.scale_hyperparameters(optimizer, from_batch_size=64, to_batch_size=128)
    assert scaling.scaled[0].learning_rate == 0.2
    with pytest.raises(ConfigError, match="scheduler holds this optimizer's learning rates already"):
        scaling.apply_to(optimizer)


def test_a_learning_rate_in_a_tensor_stays_the_same_tensor() -> None:
    rate = torch.tensor(0.5)
    optimizer = Adam([nn.Parameter(torch.ones(2))], lr=rate)
    mb.scale_hyperparameters(optimizer, from_batch_size=64, to_batch_size=256).apply_to(optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 1.0


def test_an_unknown_optimizer_needs_a_rule_by_name() -> None:
    optimizer = NAdam(parameters(1))
    with pytest.raises(ConfigError, match=r'no rule was made for NAdam; choose.*rule="sqrt" \(Adam and AdamW\)'):
        mb.scale_hyperparameters(optimizer, from_batch_size=64, to_batch_size=256)
    scaling = mb.scale_hyperparameters(optimizer, from_batch_size=64, to_batch_size=256, rule="sqrt")
    scaling.apply_to(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert "all of whose other settings are left alone" in scaling.warnings[-1]


@pytest.mark.parametrize(
    ("make", "rule", "words"),
    [
        (RMSprop, "sqrt", "changes betas and eps too, and RMSprop was given without them"),
        (SGD, "half-life", "changes beta2, and SGD was given without betas"),
    ],
)
def test_a_rule_that_needs_more_than_the_optimizer_has_is_refused(
    make: Callable[..., Optimizer], rule: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        mb.scale_hyperparameters(make(parameters(1)), from_batch_size=64, to_batch_size=256, rule=rule)


def test_what_others_keep_under_adams_names_is_not_read() -> None:
    optimizer = torch.optim.Adafactor([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    optimizer.param_groups[0]["betas"] = (0.9, 0.99, 0.999)
    scaling = mb.scale_hyperparameters(optimizer, from_batch_size=64, to_batch_size=128, rule="linear")
    assert (scaling.given[0].betas, scaling.given[0].eps) == (None, None)


def test_a_group_that_cannot_work_is_named() -> None:
    optimizer = SGD(parameters())
    optimizer.param_groups[1]["lr"] = 0.0
    with pytest.raises(
        ConfigError, match=r"parameter group 1 of SGD: learning_rate must be a positive number, not 0\.0"
    ):
        mb.scale_hyperparameters(optimizer, from_batch_size=64, to_batch_size=256)
    del optimizer.param_groups[1]["lr"]
    with pytest.raises(ConfigError, match=r"parameter group 1 of SGD has no learning rate.*mb\.Hyperparameters"):
        mb.scale_hyperparameters(optimizer, from_batch_size=64, to_batch_size=256)


# ---------------------------------------------------------------------------------------------------- what is shown


def scaling_of_two_groups() -> mb.Scaling:
    optimizer = AdamW(parameters(), weight_decay=0.1)
    return mb.scale_hyperparameters(optimizer, from_batch_size=512, to_batch_size=64, warmup_steps=100, steps=2_500)


def test_the_table_has_every_value_before_and_after() -> None:
    lines = scaling_of_two_groups().table().splitlines()
    assert lines[0] == "sqrt rule, batch of 512 to 64 (k = 1/8)"
    rows = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in lines if not line.startswith(("!", " ")) and line}
    assert rows["learning rate, group 1"] == ["0.05", "0.01767767"]
    assert rows["beta1, group 0"] == ["0.9", "0.9875"]
    assert rows["weight decay, group 0"] == ["0.1", "0.1"]
    assert rows["warm-up steps"] == ["100", "800"]
    assert rows["steps"] == ["2,500", "20,000"]
    assert sum(line.startswith("! weight_decay stays at 0.1") for line in lines) == 1  # once for both groups


def test_json_holds_every_field() -> None:
    scaling = scaling_of_two_groups()
    back = json.loads(json.dumps(scaling.as_dict()))
    assert set(back) == {field.name for field in dataclasses.fields(scaling)} | {"factor"}
    assert back["factor"] == 0.125
    assert [mb.Hyperparameters(**group | {"betas": tuple(group["betas"])}) for group in back["scaled"]] == list(
        scaling.scaled
    )


def test_the_page_names_every_rule_with_its_source() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    for rule in RULES.values():
        assert f'`"{rule.name}"`' in page
        assert rule.source.split("arXiv:")[1].split(",")[0] in page


# --------------------------------------------------------------------------------------------------------- nonsense


NOT_WHOLE: list[Any] = [0, -1, True]


@pytest.mark.parametrize("value", NOT_WHOLE)
@pytest.mark.parametrize("name", ["from_batch_size", "to_batch_size"])
def test_a_batch_that_is_none_is_refused(name: str, value: Any) -> None:
    sizes: dict[str, Any] = {"from_batch_size": 8, "to_batch_size": 8, name: value}
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1, not {value!r}"):
        mb.scale_hyperparameters(sgd(), **sizes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0, not -1"),
        ({"steps": True}, "steps must be a whole number of at least 0, not True"),
        ({"critical_batch_size": math.nan}, "critical_batch_size must be a positive number of samples, not nan"),
        ({"critical_batch_size": 0}, "critical_batch_size must be a positive number of samples, not 0"),
        ({"rule": "cubic"}, 'rule must be one of "auto", "linear", "sqrt", "half-life", not \'cubic\''),
    ],
)
def test_a_setting_that_cannot_work_is_named_with_its_value(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mb.scale_hyperparameters(sgd(), from_batch_size=8, to_batch_size=16, **settings)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 0.0}, r"learning_rate must be a positive number, not 0\.0"),
        ({"learning_rate": -0.1}, r"learning_rate .*not -0\.1"),
        ({"learning_rate": math.nan}, "learning_rate .*not nan"),
        ({"learning_rate": math.inf}, "learning_rate .*not inf"),
        ({"learning_rate": True}, "learning_rate .*not True"),
        ({"momentum": 1.0}, r"momentum must be a number from 0 up to, not including, 1, not 1\.0"),
        ({"momentum": -0.1}, "momentum"),
        ({"betas": (1.0, 0.9)}, "beta1"),
        ({"betas": (0.9, math.nan)}, "beta2"),
        ({"betas": (0.9, True)}, "beta2"),
        ({"eps": -1e-8}, "eps must be a number of at least 0, not -1e-08"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"optimizer": ""}, "optimizer must be the name of one"),
    ],
)
def test_a_value_that_no_optimizer_has_is_named(values: dict[str, Any], words: str) -> None:
    defaults: dict[str, Any] = {"optimizer": "SGD", "learning_rate": 0.1}
    with pytest.raises(ConfigError, match=words):
        mb.Hyperparameters(**defaults | values)


def test_a_beta_that_rounds_to_1_is_refused_rather_than_written() -> None:
    with pytest.raises(ConfigError, match=r"beta2 .*not 1\.0"):
        scale(adam(betas=(0.9, 1 - 1e-16)), 4096, 1, "half-life")
