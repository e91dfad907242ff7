"""A checkpoint is whole or not there, is checked before it is believed, and gives back exactly what went in."""

import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from microbatch.errors import CheckpointError
from microbatch.step.saved_state import seed_everything
from microbatch.train.atomic_files import clear_unfinished
from microbatch.train.checkpoint import read_checkpoint, read_newest, write_checkpoint
from microbatch.train.encode import decode, encode
from microbatch.train.state import (
    load_model,
    load_optimizer,
    model_tensors,
    random_states,
    set_random_states,
)

CPU = torch.device("cpu")


def save(folder: Path, step: int, *, keep: int = 9, value: float | None = None, state: Any = None) -> Path:
    weights = {"w": torch.full((3, 2), float(step if value is None else value))}
    return write_checkpoint(folder, step=step, weights=weights, state=state or {"step": step}, keep=keep)


def newest(folder: Path) -> tuple[int, list[str]]:
    notices: list[str] = []
    return read_newest(folder, notice=notices.append).step, notices


def equal(a: Any, b: Any) -> bool:
    """Tell whether two nested states have the same types and values, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
nested = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(nested)
def test_nested_state_comes_back_with_its_types(state: Any) -> None:
    document, tensors = encode(state)
    assert equal(decode(json.loads(json.dumps(document)), tensors), state)


def test_the_comparison_of_states_sees_types_and_dtypes() -> None:
    assert not equal((1, 2), [1, 2])
    assert not equal({1: 2}, {"1": 2})
    assert not equal(torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64))
    assert not equal(1, 1.0)


def test_every_kind_of_tensor_goes_through_the_files(tmp_path: Path) -> None:
    wide = torch.randn(4, 6)
    state: dict[Any, Any] = {
        "scalar": torch.tensor(3.5),
        "bf16": torch.randn(3).bfloat16(),
        "bool": torch.tensor([True, False]),
        "bytes": torch.get_rng_state(),
        "complex": torch.randn(3, dtype=torch.complex64),
        "empty": torch.empty(0, 3),
        "view": wide[:, 2],
        "same view": wide[:, 2],
        "transposed": wide.t(),
        "numpy": np.arange(6, dtype=np.int64).reshape(2, 3),
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        7: (math.inf, -math.inf, math.nan),
    }
    path = write_checkpoint(tmp_path, step=1, weights={}, state={"all": state}, keep=1)
    assert equal(read_checkpoint(path).state["all"], state)


@pytest.mark.parametrize("value", [print, object(), {"deep": [lambda: 0]}, {(1, 2): 3}])
def test_what_only_pickle_could_store_is_refused_by_its_place(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"state\.schedule"):
        encode({"schedule": value})


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("hidden", torch.randn(3), persistent=False)

    model, other = Tied(), Tied()
    weights, extra = model_tensors(model)
    path = write_checkpoint(tmp_path, step=1, weights=weights, state={"extra": extra}, keep=1)
    assert (path / "weights.safetensors").stat().st_size < 2 * 50 * 8 * 4
    read = read_checkpoint(path)
    load_model(other, read.weights, read.state["extra"])
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, model.head.weight)
    assert torch.equal(other.get_buffer("hidden"), model.get_buffer("hidden"))


def test_optimizer_state_keeps_its_dtypes(tmp_path: Path) -> None:
    """`load_state_dict` alone rounds the fp32 moments of a bf16 parameter: the control shows it."""
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    moment = torch.tensor([1.0, 1 + 2**-20, 3.3, -0.1])

    def optimizer() -> torch.optim.Optimizer:
        made = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        made.state[parameter] = {"momentum_buffer": moment.clone(), "step": torch.tensor(3.0)}
        return made

    path = write_checkpoint(tmp_path, step=1, weights={}, state={"o": optimizer().state_dict()}, keep=1)
    saved = read_checkpoint(path).state["o"]
    ours, control = (torch.optim.SGD([parameter], lr=0.1, momentum=0.9) for _ in range(2))
    load_optimizer(ours, saved)
    control.load_state_dict(saved)
    assert equal(ours.state[parameter]["momentum_buffer"], moment)
    assert not equal(control.state[parameter]["momentum_buffer"], moment)


def test_every_global_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002, S311 -- global ones

    seed_everything(5)
    states = random_states(CPU)
    expected = draw()
    path = write_checkpoint(tmp_path, step=1, weights={}, state=states, keep=1)
    assert draw() != expected
    set_random_states(read_checkpoint(path).state, CPU)
    assert draw() == expected


@pytest.mark.parametrize("file", ["weights.safetensors", "state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 1)
    broken = save(tmp_path, 2, state={"x": torch.ones(3)}) / file
    content = bytearray(broken.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage == "remove":
        broken.unlink()
    else:
        broken.write_bytes(content[:-9] if damage == "cut" else content)
    if damage == "flip" and file == "manifest.json":
        # Whatever the bit was part of, a manifest that still reads must disagree with the files or say another step.
        broken.write_bytes(b"[" + content)
    step, notices = newest(tmp_path)
    assert step == 1
    assert len(notices) == 1
    assert "step-000002" in notices[0]
    assert file in notices[0]
    assert "step-000001" in notices[0]
    assert newest(tmp_path) == (1, [])  # set aside, so it is neither tried nor counted again


def test_when_every_checkpoint_is_damaged_each_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"(?s)step-000002.*step-000001"):
        newest(tmp_path)


def test_without_a_checkpoint_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        newest(tmp_path / "checkpoints")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000005", "step-000006"]


class Crash(BaseException):
    """The process ends here, as far as the code under test can tell."""


OPERATIONS = (
    (os, "fsync"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "mkdir"),
    (Path, "write_text"),
    (shutil, "rmtree"),
)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over an existing one"])
def test_a_crash_before_any_operation_leaves_old_or_new_and_never_half(
    tmp_path: Path, *, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: set[float] = set()
    for crash_at in range(1, 100):
        folder = tmp_path / str(crash_at)
        save(folder, 1)
        if existing:
            save(folder, 2, value=20.0)
        count = 0
        with monkeypatch.context() as patch:
            for owner, name in OPERATIONS:
                original = getattr(owner, name)

                def counted(*args: Any, _original: Any = original, _last: int = crash_at, **kwargs: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == _last:
                        raise Crash
                    return _original(*args, **kwargs)

                patch.setattr(owner, name, counted)
            try:
                save(folder, 2, keep=1, value=21.0)
                crashed = False
            except Crash:
                crashed = True
        checkpoint = read_newest(folder, notice=pytest.fail)
        value = float(checkpoint.weights["w"][0, 0])
        assert bool((checkpoint.weights["w"] == value).all())
        assert value in {1.0, 20.0, 21.0}
        outcomes.add(value)
        clear_unfinished(folder)
        assert all(path.name.startswith("step-") for path in folder.iterdir())
        if not crashed:
            assert crash_at > 8  # so many moments were tried
            break
    assert {1.0, 21.0} <= outcomes


def test_writing_in_place_would_be_caught(tmp_path: Path) -> None:
    """The control for the test above: half of a checkpoint under its final name is seen as damaged."""
    save(tmp_path, 1)
    whole = save(tmp_path, 2)
    (whole / "manifest.json").unlink()
    step, notices = newest(tmp_path)
    assert (step, len(notices)) == (1, 1)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    weights, extra = model_tensors(nn.Linear(3, 2))
    with pytest.raises(CheckpointError, match="of another shape: weight"):
        load_model(nn.Linear(4, 2), weights, extra)
    with pytest.raises(CheckpointError, match="unknown: bias"):
        load_model(nn.Linear(3, 2, bias=False), weights, extra)
