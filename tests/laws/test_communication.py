"""Communication on hardware that is not there: its time, and the depth from which on it is little."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from microbatch.cli.cluster_command import run_cluster_plan
from microbatch.errors import ConfigError
from microbatch.planning.block_profile import Model, Profile
from microbatch.planning.cluster_plan import Simulation
from microbatch.planning.communication import LITTLE, Assumed, Communication, enough_microbatches
from microbatch.planning.flops import flops_of
from microbatch.planning.hardware import DEVICES, Device, find_device
from microbatch.planning.links import Link, find_link, parse_bandwidth, parse_duration
from microbatch.planning.model_shapes import Case, case_from_config
from microbatch.planning.sharding import PRECISIONS, Setup

GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 8, "n_head": 4, "vocab_size": 300, "n_positions": 32}
ROOM = Device(name="room", memory_bytes=1 << 50, reserved_bytes=0, source="for tests", half_flops=1e9)
SECONDS = st.floats(0.001, 10)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a terminal that shows lines whole."""
    monkeypatch.setenv("COLUMNS", "200")


@cache
def gpt2() -> Simulation:
    return Simulation(case_from_config(GPT2))


def plan(setup: Setup, *, microbatches: int = 4, **assumed: object) -> Communication:
    batch_size = 2 * microbatches * setup.ranks
    told = Assumed(**assumed)  # pyright: ignore[reportArgumentType] - by name, as flags give them
    found = gpt2().plan(setup, batch_size=batch_size, microbatch_size=2, assumed=told)
    assert found.communication is not None
    return found.communication


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_arithmetic_is_counted_by_hand():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(10, 20, bias=False), nn.Linear(20, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x))

    case = Case(name="two", model=Two(), batch=torch.ones(1, 10), loss_fn=lambda model, x: model(x).square().mean())
    # Forward, and two products in backward but for the first layer's input, which has no gradient.
    expected = 2 * (10 * 20 * 2 + 20 * 1 * 3)
    assert Profile(Model(case), checkpointing=False).row_flops == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_multiplied_have_the_arithmetic_of_all_of_them(checkpointing: bool):
    model = Model(case_from_config(GPT2))
    few, all_ = (Profile(model, checkpointing=checkpointing, multiply=multiply) for multiply in (True, False))
    assert few.row_flops == all_.row_flops
    tokens, parameters = 32, sum(each.numel() for each in model.case.model.parameters())
    times = few.row_flops / (6 * tokens * parameters)
    assert 1.2 * checkpointing < times < 1.6 + 0.4 * checkpointing


def test_attention_on_the_cpu_is_counted():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.scale
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    # Of 5 tokens and 4 features in 3 heads, two products of 5 x 4 x 5 each; more than twice as many in backward.
    case = Case(name="a", model=Attends(), batch=torch.ones(1, 3, 5, 4), loss_fn=lambda model, x: model(x).mean())
    forward = 2 * 2 * 3 * (5 * 4 * 5)
    assert 3 * forward <= Profile(Model(case), checkpointing=False).row_flops <= 3.5 * forward
    assert flops_of(torch.ops.aten.add.Tensor, (torch.ones(2), 1), torch.ones(2)) == 0


# -- time --------------------------------------------------------------------------------------------------------------


@given(fixed=SECONDS, each=st.floats(0, 0.2), arithmetic=SECONDS)
def test_the_depth_is_the_first_at_which_communication_is_little(fixed: float, each: float, arithmetic: float):
    def share(microbatches: int) -> float:
        communicated = fixed + microbatches * each
        return communicated / (communicated + microbatches * arithmetic)

    depth = enough_microbatches(fixed=fixed, each=each, arithmetic=arithmetic)
    if depth is None:
        assert share(10**9) > LITTLE * (1 - 1e-6)
        return
    assert share(depth) < LITTLE * (1 + 1e-9)
    assert depth == 1 or share(depth - 1) >= LITTLE * (1 - 1e-9)


def test_time_is_bytes_over_bandwidth_and_calls():
    setup = Setup(device=ROOM, ranks=4, precision=PRECISIONS["mixed"])
    found = plan(setup, bandwidth="1 MB/s", latency="10 ms", microbatch_seconds="2 s")
    once, every = found.ways
    assert once.seconds == pytest.approx(once.bytes / 1e6 + once.calls * 0.01)
    assert once.least_seconds == once.most_seconds == pytest.approx(4 * 2 + (once.seconds or 0))
    assert every.least_seconds == pytest.approx(max(8, every.seconds or 0))
    assert (every.bytes, every.depth) == (4 * (every.bytes // 4), None)
    # Of a loop that communicates as much with every microbatch the share is the same at any depth.
    assert once.depth == enough_microbatches(fixed=once.seconds or 0, each=0, arithmetic=2)


def test_sharded_weights_are_gathered_whatever_the_depth():
    setup = Setup(device=ROOM, ranks=4, strategy="fsdp", precision=PRECISIONS["mixed-fp32-gradients"])
    slow = plan(setup, bandwidth="1 MB/s", microbatch_seconds="1 s")
    assert [each.depth for each in slow.ways] == [None, None]
    assert slow.lines()[1].endswith("below 5 % of it never, it grows with them")
    quick = plan(setup, bandwidth="100 GB/s", microbatch_seconds="1 s")
    assert [each.depth for each in quick.ways] == [1, 1]
    held = plan(replace(setup, strategy="zero2"), bandwidth="1 MB/s", latency="0 s", microbatch_seconds="1 s")
    lean, fast = held.ways
    assert (lean.depth, fast.depth is not None and fast.depth > 1) == (None, True)


def test_arithmetic_takes_the_peak_by_what_is_reached_of_it():
    found = plan(Setup(device=ROOM, ranks=2), bandwidth="1 GB/s", utilisation=0.5)
    flops = Profile(Model(case_from_config(GPT2)), checkpointing=False, dtype=torch.bfloat16).row_flops
    assert found.microbatch_seconds == pytest.approx(2 * flops / 0.5e9)
    unknown = plan(Setup(device=ROOM, ranks=2, precision=PRECISIONS["fp32"]), bandwidth="1 GB/s")
    assert unknown.microbatch_seconds is None
    assert unknown.ways[0].seconds is not None
    assert "--microbatch-seconds" in "\n".join(unknown.lines())


def test_a_link_is_the_devices_own_within_a_machine():
    device = find_device("h100")
    found = find_link(device, ranks=8)
    assert found is not None
    assert found.bandwidth == 450e9
    assert find_link(device, ranks=16) is None
    assert find_link(device, ranks=1, bandwidth="1 GB/s") is None
    assert find_link(ROOM, ranks=2) is None
    assert find_link(ROOM, ranks=2, bandwidth="1 Gbit/s", latency="1 ms") == Link(bandwidth=125e6, latency=1e-3)
    assert all(each.half_flops and each.single_flops and each.link for each in DEVICES.values())


@pytest.mark.parametrize("text", ["", "25 GB", "fast", "0 Gbit/s", "1 GB/min", "Gbit/s"])
def test_what_is_no_bandwidth_is_refused(text: str):
    with pytest.raises(ConfigError):
        parse_bandwidth(text)


@pytest.mark.parametrize("text", ["", "20", "1 min", "-1 s"])
def test_what_is_no_time_is_refused(text: str):
    with pytest.raises(ConfigError):
        parse_duration(text)


def test_what_cannot_be_reached_is_refused():
    with pytest.raises(ConfigError, match="utilisation"):
        Assumed(utilisation=40)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "small.json"
    file.write_text(json.dumps(GPT2))
    flags = {"device": "l4", "batch_size": 64, "microbatch_size": 4, "sequence_length": 32, "strategy": "zero1"}
    assert run_cluster_plan(str(file), {**flags, "ranks": 2, "bandwidth": "1 Gbit/s"}, as_json=False) == 0
    text = capsys.readouterr().out
    for said in ("0.125 GB/s", "once a step", "every microbatch", "40% of 121 TFLOP/s", "latency assumed"):
        assert said in text
    assert run_cluster_plan(str(file), {**flags, "ranks": "1,2"}, as_json=True) == 0
    alone, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert alone["communication"] is None
    assert two["communication"]["link"]["source"] == "PCIe 4 x16, data sheet, latency assumed"
    assert [each["name"] for each in two["communication"]["ways"]] == ["once a step", "every microbatch"]
    assert run_cluster_plan(str(file), {**flags, "ranks": "1,2"}, as_json=False) == 0
    assert "communicated (once a step)" in capsys.readouterr().out.splitlines()[2]
    assert run_cluster_plan(str(file), {**flags, "ranks": 2, "bandwidth": "much"}, as_json=True) == 2
