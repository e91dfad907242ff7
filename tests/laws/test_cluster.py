"""Hardware one does not have: what is predicted there against what can be measured here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from microbatch.batch.batch_tree import map_tensors
from microbatch.cli.cluster_command import is_for_a_cluster, run_cluster_plan
from microbatch.errors import ConfigError
from microbatch.memory.meter import MemoryMeter
from microbatch.planning.arithmetic import divide_batch
from microbatch.planning.block_profile import FORWARD, Model, Place, Profile
from microbatch.planning.cluster_plan import Simulation, cluster_plan
from microbatch.planning.cluster_report import ClusterPlan
from microbatch.planning.hardware import Device, find_device
from microbatch.planning.model_shapes import Case, case_from_config, next_token_loss
from microbatch.planning.sharding import PRECISIONS, STRATEGIES, Setup, State
from microbatch.planning.transformer_layers import Embedding, Shape
from microbatch.step.size.dry_run_copies import some_rows

GIB = 1024**3
SEVENTY = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
SMALL = SEVENTY | {
    "hidden_size": 64,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 500,
}
TINY = SMALL | {"num_hidden_layers": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 8, "n_head": 4, "vocab_size": 300, "n_positions": 32}
VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}
UNET = {"model_type": "unet", "image_size": 32, "widths": [16, 32, 64]}
ROOM = Device(name="room", memory_bytes=1 << 50, reserved_bytes=0, source="for tests")
A100 = find_device("a100-40gb")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a terminal that shows lines whole."""
    monkeypatch.setenv("COLUMNS", "200")


def same(some: Mapping[Place, Tensor], of: Mapping[Place, Tensor]) -> bool:
    return all(torch.equal(of[place], held) for place, held in some.items())


def peak(profile: Profile, size: int) -> int:
    return max(int(held.sum(1).max()) for held in profile.at(size).values() if len(held))


# -- blocks are run and multiplied -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "checkpointing"), [(SMALL, False), (SMALL, True), (GPT2, False), (VIT, True)])
def test_blocks_multiplied_are_all_of_them_to_the_byte(config: dict[str, object], checkpointing: bool):
    model = Model(case_from_config(config, sequence_length=32))
    multiplied = Profile(model, checkpointing=checkpointing)
    full = Profile(model, checkpointing=checkpointing, multiply=False)
    assert peak(multiplied, 2) == peak(full, 2)
    assert same(multiplied.at(2), full.at(2))
    assert len(multiplied.at(2)) < len(full.at(2))


def test_more_rows_are_run_or_drawn_to_the_byte():
    model = Model(case_from_config(TINY, sequence_length=32))
    drawn, run = (Profile(model, checkpointing=True) for _ in range(2))
    assert same(run._deep(9), drawn.at(9))
    assert not same(run._deep(9), drawn.at(8))


def test_the_peak_of_one_block_times_the_blocks_would_be_refused():
    model = Model(case_from_config(SMALL, sequence_length=32))
    one = Model(case_from_config(SMALL | {"num_hidden_layers": 1}, sequence_length=32))
    wrong = peak(Profile(one, checkpointing=False), 2) * 9
    assert abs(wrong / peak(Profile(model, checkpointing=False, multiply=False), 2) - 1) > 0.05


class Uneven(nn.Module):
    """Blocks that look alike, of which every other one holds more."""

    def __init__(self, wants: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(9)])
        self.wants = wants

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(torch.cat([x, x.new_zeros(1 + 7 * (index % 2), 8)])).tanh()[: len(x)]
        return self.blocks[self.wants](x)


@pytest.mark.parametrize("wants", [0, 8])
def test_blocks_that_only_look_alike_are_all_run(wants: int):
    with torch.device("meta"):
        case = Case(
            name="uneven", model=Uneven(wants), batch=torch.zeros(1, 8), loss_fn=lambda model, x: model(x).mean()
        )
    model = Model(case)
    assert model.depth == 9
    found, full = Profile(model, checkpointing=False), Profile(model, checkpointing=False, multiply=False)
    assert same(full.at(2), found.at(2))


# -- state is shared between ranks -------------------------------------------------------------------------------------


@given(
    ranks=st.integers(1, 9),
    strategy=st.sampled_from(STRATEGIES),
    precision=st.sampled_from(sorted(PRECISIONS)),
    offload=st.sampled_from([None, "optimizer", "optimizer+gradients", "all"]),
)
def test_shares_add_up_to_the_whole(ranks: int, strategy: str, precision: str, offload: str | None):
    bytes_ = PRECISIONS[precision]
    try:
        setup = Setup(device=ROOM, ranks=ranks, strategy=strategy, offload=offload, precision=bytes_)
    except ConfigError:
        assert offload in {"optimizer+gradients", "all"}
        assert strategy != "fsdp"
        return
    states = [State(TIED, setup, rank=rank) for rank in range(ranks)]
    held = [state.held(Place(FORWARD, 0, 0), microbatches=2) for state in states]
    elements = sum(each.numel() for each in TIED.case.model.parameters())
    for name, size, shared in (
        ("parameters", bytes_.parameters, strategy == "fsdp"),
        ("gradients", bytes_.gradients, strategy in {"zero2", "fsdp"}),
        ("optimizer state", bytes_.optimizer, strategy != "ddp"),
    ):
        whole = sum(each[name] for each in held) if shared else held[0][name]
        assert whole in {elements * size, 0}
        assert max(each[name] for each in held) - min(each[name] for each in held) <= size
    on_host = states[0].host_bytes()
    on_device = {name for name in ("parameters", "gradients", "optimizer state") if held[0][name]}
    sizes = {"parameters": bytes_.parameters, "gradients": bytes_.gradients, "optimizer state": bytes_.optimizer}
    assert on_host == elements * sum(size for name, size in sizes.items() if name not in on_device)


TIED = Model(case_from_config(SMALL | {"tie_word_embeddings": True, "num_hidden_layers": 2}, sequence_length=8))


# -- against a real run ------------------------------------------------------------------------------------------------


def really(case: Case, *, size: int, microbatches: int, checkpointed: bool = False) -> dict[str, int]:
    """Train for real, two windows, and say what was alive at the peak of the last one's microbatches."""
    model = case.model.to_empty(device="cpu")
    if case.name == "gpt2":  # `to_empty` unties
        model.head.linear.weight = model.embed.tokens.weight  # pyright: ignore[reportAttributeAccessIssue] -- a Transformer
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    if checkpointed:
        for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues] -- a list of modules
            run = block.forward
            block.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = map_tensors(lambda each: torch.zeros_like(each, device="cpu"), some_rows(case.batch, size))

    def window() -> None:
        for _ in range(microbatches):
            loss = case.loss_fn(model, batch)
            assert isinstance(loss, Tensor)
            loss.backward()
            del loss

    window()
    optimizer.step()
    optimizer.zero_grad()
    with MemoryMeter(detail=True) as meter:
        meter.track(model, optimizer)
        meter.track(batch)
        window()
    return dict(meter.report().at_peak)


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize(
    ("config", "checkpointed"), [(TINY, False), (TINY, True), (GPT2, False), (VIT, False), (UNET, False)]
)
def test_one_rank_is_as_predicted(config: dict[str, object], checkpointed: bool, microbatches: int):
    case, size = case_from_config(config, sequence_length=32), 4
    checkpointing = "blocks" if checkpointed else "none"
    setup = Setup(device=ROOM, checkpointing=checkpointing, precision=PRECISIONS["fp32"])
    plan = cluster_plan(case, setup, batch_size=size * microbatches, microbatch_size=size)
    real = really(case_from_config(config, sequence_length=32), size=size, microbatches=microbatches,
                  checkpointed=checkpointed)  # fmt: skip
    total = sum(real.values())
    # The only microbatch's gradients come one by one; those of a unit are counted as soon as its backward begins.
    early = 4 * max(unit.elements for unit in Model(case).units) if microbatches == 1 else 0
    assert 0.995 * total <= plan.peak_bytes <= 1.02 * total + early
    assert plan.parts["parameters"] == real["parameters"]
    # AdamW counts its steps in a number of its own for each parameter.
    assert 0 <= real["optimizer state"] - plan.parts["optimizer state"] <= 4 * len(list(case.model.parameters()))


def test_a_run_in_another_precision_would_be_refused():
    real = really(case_from_config(GPT2), size=4, microbatches=3)
    plan = cluster_plan(case_from_config(GPT2), Setup(device=ROOM), batch_size=12, microbatch_size=4)
    assert not 0.995 <= plan.peak_bytes / sum(real.values()) <= 1.02


# -- the claim ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seventy() -> dict[int, Simulation]:
    lengths = (512, 4096)
    return {each: Simulation(case_from_config(SEVENTY, sequence_length=each, name="70B")) for each in lengths}


def test_a_70b_decoder_does_not_fit_8_times_40_gb_whatever_the_microbatch(seventy: dict[int, Simulation]):
    simulation = seventy[4096]
    claim = Setup(device=A100, ranks=8, strategy="fsdp")
    plan = simulation.plan(claim, batch_size=512, microbatch_size=1)
    assert plan.division.microbatches == 64
    assert not plan.fits
    assert plan.largest == 0
    assert round(plan.resident_bytes / GIB) == 131  # of 16 bytes
    assert "the number of microbatches changes none of it" in plan.words
    _, more = simulation.peak(claim, divide_batch(8192, microbatch_size=1, ranks=8))
    assert sum(more.values()) == plan.peak_bytes
    assert 125 <= plan.parts["activations"] / GIB <= 140
    # What it takes: and each of them is planned again, and fits.
    assert plan.alternatives
    for each in plan.alternatives:
        cut = divide_batch(512, microbatch_size=each.microbatch_size, ranks=each.setup.ranks)
        _, again = simulation.peak(each.setup, cut)
        assert sum(again.values()) == each.peak_bytes <= A100.usable_bytes
    assert any(each.setup.ranks == 8 and "host" in each.words for each in plan.alternatives)
    # The gradients of a window kept whole until its end take more than all that.
    window = replace(claim, reduce="window", checkpointing="blocks")
    _, kept = simulation.peak(window, divide_batch(512, microbatch_size=1, ranks=8))
    assert kept["unsharded gradients"] / GIB > 131


@pytest.mark.parametrize(
    ("precision", "offload", "wanted"),
    [
        ("mixed", None, (138, 145)),
        ("bf16", None, (72, 79)),
        ("bf16-8bit", None, (56, 63)),
        ("mixed", "optimizer", (39, 46)),
        ("mixed", "optimizer+gradients", (23, 30)),
        ("mixed", "all", (6, 13)),
    ],
)
def test_its_bytes_are_those_counted_independently(
    seventy: dict[int, Simulation], precision: str, offload: str | None, wanted: tuple[int, int]
):
    setup = Setup(
        device=A100,
        ranks=8,
        strategy="fsdp",
        checkpointing="blocks",
        precision=PRECISIONS[precision],
        offload=offload,
    )
    for length, expected in zip((512, 4096), wanted, strict=True):
        _, parts = seventy[length].peak(setup, divide_batch(512, microbatch_size=1, ranks=8))
        assert abs(sum(parts.values()) / GIB - expected) < 2


# -- what a plan says --------------------------------------------------------------------------------------------------


def plan_tiny(**changes: object) -> ClusterPlan:
    setup = Setup(device=ROOM, ranks=2, strategy="fsdp", precision=PRECISIONS["fp32"])
    return TINY_SIMULATION.plan(replace(setup, **changes), batch_size=64)


TINY_SIMULATION = Simulation(case_from_config(TINY, sequence_length=32))


def test_the_largest_microbatch_fits_and_one_more_does_not():
    simulation = TINY_SIMULATION
    setup = Setup(device=find_device("5 MiB"), ranks=2, strategy="fsdp", precision=PRECISIONS["fp32"])
    plan = simulation.plan(setup, batch_size=64)
    assert 1 < plan.largest < 32
    assert plan.fits
    assert plan.division.microbatch_size == plan.largest
    assert not simulation.plan(setup, batch_size=64, microbatch_size=plan.largest + 1).fits


def test_the_same_batch_on_more_ranks_holds_less_of_the_state():
    peaks = [plan_tiny(ranks=ranks).resident_bytes for ranks in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] == pytest.approx(8 * peaks[3], rel=1e-3)
    whole = [plan_tiny(ranks=ranks, strategy="ddp").resident_bytes for ranks in (1, 2, 4, 8)]
    assert len(set(whole)) == 1


def test_a_network_without_blocks_cannot_be_asked_to_checkpoint_them():
    setup = Setup(device=ROOM, checkpointing="blocks")
    with pytest.raises(ConfigError, match="blocks that are alike"):
        cluster_plan(case_from_config(UNET), setup, batch_size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "zero3"}, "strategy must be one of"),
        ({"strategy": "ddp", "offload": "all"}, "needs strategy"),
        ({"strategy": "zero1", "offload": "optimizer+gradients"}, "needs strategy"),
        ({"offload": "optimizer+gradients", "reduce": "window", "strategy": "fsdp"}, "while a window holds"),
        ({"ranks": 0}, "ranks must be"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        replace(Setup(device=ROOM), **changes)


def test_a_model_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="model_type must be one of"):
        case_from_config({"model_type": "mixtral"})
    with pytest.raises(ConfigError, match="needs the key 'hidden_size'"):
        case_from_config({"model_type": "llama", "num_attention_heads": 2})
    with pytest.raises(ConfigError, match="is not one device"):
        find_device("a100")


def test_parameters_that_are_frozen_have_no_gradient():
    with torch.device("meta"):
        shape = Shape(width=8, layers=1, heads=1, shared_heads=1, head_width=8, hidden=8, gated=True, bias=False,
                      causal=True)  # fmt: skip
        embed = Embedding(shape, vocabulary=10, length=0).requires_grad_(requires_grad=False)
        model = nn.Sequential(embed, nn.Linear(8, 10))
        tokens = torch.zeros(1, 4, dtype=torch.int64)
    case = Case(name="frozen", model=model, batch={"tokens": tokens}, loss_fn=next_token_loss)
    plan = cluster_plan(case, Setup(device=ROOM), batch_size=8, microbatch_size=2)
    assert (plan.parts["parameters"], plan.parts["gradients"]) == (2 * 170, 2 * 90)


# -- the command -------------------------------------------------------------------------------------------------------


def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], *, as_json: bool, **flags: object) -> tuple[int, str]:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(TINY))
    code = run_cluster_plan(str(file), {"sequence_length": 32, "batch_size": 256, **flags}, as_json=as_json)
    return code, capsys.readouterr().out


def test_the_command_answers_from_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, text = command(tmp_path, capsys, as_json=True, device="24 GiB", ranks=4, strategy="fsdp")
    found = json.loads(text)
    assert (code, found["event"], found["fits"]) == (0, "cluster plan", True)
    assert found["peak_bytes"] == sum(found["parts"].values())
    assert found["division"]["batch_size"] == 256
    code, text = command(tmp_path, capsys, as_json=False, device="2 MiB")
    assert code == 1
    assert "It does not fit" in text
    assert "cheapest change first" in text


def test_the_command_compares_numbers_of_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, text = command(tmp_path, capsys, as_json=False, device="l4", ranks="1,2,4,8", microbatch_size=16)
    assert code == 0
    cuts = [line.split()[:5:2] for line in text.splitlines()[1:5]]
    assert cuts == [["1", "16", "16"], ["2", "8", "16"], ["4", "4", "16"], ["8", "2", "16"]]


@pytest.mark.parametrize(
    "flags", [{}, {"device": "a9000"}, {"device": "l4", "ranks": "two"}, {"device": "l4", "precision": "fp4"}]
)
def test_bad_input_is_said(flags: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, text = command(tmp_path, capsys, as_json=True, **flags)
    assert code == 2
    assert json.loads(text)["kind"] == "ConfigError"


def test_the_command_takes_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch, microbatch as mb\n"
        "def job():\n"
        "    model = torch.nn.Linear(4, 1)\n"
        "    return mb.Job(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),\n"
        "        loss_fn=lambda model, x: model(x).mean(), data=list(torch.zeros(8, 4)), batch_size=8)\n"
    )
    assert is_for_a_cluster(f"{file}:job", "h100")
    assert run_cluster_plan(f"{file}:job", {"device": "h100"}, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["division"]["batch_size"] == 8


def test_every_rank_count_divides_the_same_batch():
    sizes: Sequence[int] = [plan_tiny(ranks=ranks).division.batch_size for ranks in (1, 2, 4, 8)]
    assert set(sizes) == {64}
