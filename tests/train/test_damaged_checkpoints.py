"""Every flipped bit and every malformed document of a checkpoint is named, and the checkpoint before it is used."""

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from microbatch.errors import CheckpointError
from microbatch.train.checkpoint import read_checkpoint, read_newest, write_checkpoint
from microbatch.train.checkpoint_manifest import MANIFEST, write_manifest
from microbatch.train.start import PreparedRun, prepare

JOB = f"{Path(__file__).with_name('small_job.py')}:small"
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 2.5, 10**400, 1e308, "", "x", "\ud800", "../../etc/passwd", [], [[]], {}, {"": None}, [None] * 3,
    {"$tensor": "nowhere"}, {"$tensor": []}, {"$complex": "state.x"}, {"$numpy": 5}, {"$dict": [[[1], 2]]},
    {"$dict": 3}, {"$tuple": None}, {"$set": [[1]]}, {"$set": [{}]}, {"$float": "y"}, {"$float": None},
    {"$bytes": "zz"}, {"$dtype": "nn"}, {"$dtype": 7}, {"$device": "house"}, {"$unknown": 1},
)  # fmt: skip
RAW = (b"", b"[", b"\xff", b"nul", b"1e999", b'{"state": 1e999}', b'{"state": NaN}', b'{"state": -Infinity}',
       b"[" * 100_000, b'{"a":' * 100_000, b'{"state": ' + b"9" * 5000 + b"}", b'"\\ud800"', b"{}{}", b"\x00" * 50,
       b'{"tied": {}, "state": ' + b"[" * 5000 + b"]" * 5000 + b"}")  # fmt: skip


def newest(folder: Path, **more: Any) -> tuple[int, list[str]]:
    notices: list[str] = []
    return read_newest(folder, notice=notices.append, **more).step, notices


def two(folder: Path) -> Path:
    """Write two checkpoints, and return the newer one."""
    for step in (1, 2):
        state: Any = {"x": torch.ones(3), "text": "a", 3: (1.5, None)}
        path = write_checkpoint(folder, step=step, weights={"w": torch.zeros(2)}, state=state, keep=3)
    return path


def refused(folder: Path, content: bytes | None = None, file: Path | None = None, **more: Any) -> bool:
    """Write a file of the newest checkpoint, and tell whether it is named and the one before it used; put it back."""
    before = None
    if file is not None and content is not None:
        before = file.read_bytes()
        file.write_bytes(content)
    step, notices = newest(folder, **more)
    aside = folder / "step-000002.damaged"
    if aside.exists():
        aside.rename(folder / "step-000002")
    if file is not None and before is not None:
        file.write_bytes(before)
    assert all(line.encode() for line in notices)  # no lone surrogates, which no terminal can show
    assert step == 2 or (len(notices) == 1 and "step-000002" in notices[0] and "step-000001" in notices[0])
    return step == 1


def flips(content: bytes, *, most: int) -> Iterator[bytes]:
    bits = range(8 * len(content))
    chosen = bits if len(bits) <= most else random.Random(5).sample(bits, most)  # noqa: S311 -- places, not secrets
    for bit in chosen:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


@pytest.mark.parametrize(
    ("name", "most"), [(MANIFEST, 10**6), ("state.json", 400), ("weights.safetensors", 400), ("state.safetensors", 400)]
)
def test_every_flipped_bit_is_seen(tmp_path: Path, name: str, most: int) -> None:
    path = two(tmp_path) / name
    content = path.read_bytes()
    assert [damaged for damaged in flips(content, most=most) if not is_seen(damaged, path)] == []
    path.write_bytes(content)
    assert all(refused(tmp_path, damaged, path) for damaged in flips(content, most=40))
    assert refused(tmp_path) is False  # and it is whole again


def test_a_manifest_without_a_seal_is_still_read_and_would_not_show_every_bit(tmp_path: Path) -> None:
    """The control: the hashes of the files alone do not show what became of the manifest's own words."""
    path = two(tmp_path) / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["seal"]
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    assert refused(tmp_path) is False  # as earlier versions wrote it
    content = path.read_bytes()
    unseen = [damaged for damaged in flips(content, most=1500) if not is_seen(damaged, path)]
    versions = {json.loads(each)["torch"] for each in unseen}
    assert torch.__version__ not in versions
    assert len(versions) == len(unseen) > 0


def is_seen(content: bytes, file: Path) -> bool:
    """Tell whether a checkpoint with this content of a file is refused."""
    file.write_bytes(content)
    try:
        read_checkpoint(file.parent)
    except CheckpointError:
        return True
    return False


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a document, the whole of it first."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Replace the value at a path; without a value, remove it."""
    if not path:
        return value
    made = copy.deepcopy(document)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return made


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_every_malformed_manifest_is_refused(tmp_path: Path) -> None:
    path = two(tmp_path) / MANIFEST
    manifest = json.loads(path.read_text())
    for place in places(manifest):
        # Removed, the seal alone is allowed to be: earlier versions wrote none.
        for value in (*HOSTILE, *([...] if place and place != ("seal",) else [])):
            assert refused(tmp_path, as_json(changed(manifest, place, value)), path), (place, value)
    for name in ("../../x", "/etc/passwd", ".", "", "a" * 5000, "\ud800", "a\x00b"):
        manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
        assert refused(tmp_path, as_json(manifest), path)
        del manifest["files"][name]
    for raw in RAW:
        assert refused(tmp_path, raw, path), raw[:20]


def resealed(path: Path, name: str, content: bytes) -> None:
    """Write a file of a checkpoint, with a manifest whose hashes are right."""
    (path / name).write_bytes(content)
    (path / MANIFEST).unlink()
    write_manifest(path, 2, version=1)


def test_every_malformed_state_with_the_right_hash_is_refused(tmp_path: Path) -> None:
    path = two(tmp_path)
    document = json.loads((path / "state.json").read_text())
    bad: list[bytes] = [*RAW]
    for place in ((), ("state",), ("tied",)):
        bad += [as_json(changed(document, place, value)) for value in HOSTILE if not isinstance(value, dict)]
    bad += [as_json(changed(document, (place,), ...)) for place in ("state", "tied")]
    bad += [as_json({"tied": tied, "state": {}}) for tied in ({"a": "no"}, {"a": 1}, {"a": None})]
    inside = [value for value in HOSTILE if isinstance(value, dict) and next(iter(value), "").startswith("$")]
    bad += [as_json({"tied": {}, "state": {"x": value}}) for value in inside]
    for content in bad:
        resealed(path, "state.json", content)
        assert refused(tmp_path), content[:80]
    resealed(path, "state.json", as_json(document))
    assert not refused(tmp_path)


def test_every_malformed_tensor_file_with_the_right_hash_is_refused(tmp_path: Path) -> None:
    path = two(tmp_path)
    whole = (path / "weights.safetensors").read_bytes()

    def with_parts(parts: Any) -> bytes:
        file, text = tmp_path / "made", parts if isinstance(parts, str) else json.dumps(parts)
        save_file({"w@0": torch.zeros(2)}, file, metadata={"parts": text})
        content = file.read_bytes()
        file.unlink()
        return content

    part = {"name": "w", "shape": [2], "offsets": [0]}
    bad = [b"", whole[:7], b"\xff" * 100, whole[:-1], (2**62).to_bytes(8, "little") + whole[8:]]
    bad += [with_parts(each) for each in ("", "[", "nul", "1e999", "[" * 5000, [], 5, {"w@0": 3}, {"w@0": {}})]
    for key, values in {
        "name": (None, 5, []),
        "shape": (None, "x", [-1], [2.5], [10**30], [2**62], [3], [[2]]),
        "offsets": (None, [], [5], [-1], ["0"], [0, 0]),
    }.items():
        bad += [with_parts({"w@0": {**part, key: value}}) for value in values]
    for content in bad:
        resealed(path, "weights.safetensors", content)
        assert refused(tmp_path), content[:200]
    resealed(path, "weights.safetensors", with_parts({"w@0": part}))
    assert not refused(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = {"job": JOB, "steps": 2, "warmup_steps": 1, "compare": False, "checkpoint_every": 1, "device": "cpu"}
    prepare(flags, run=folder).train()
    shutil.rmtree(folder / "checkpoints" / "step-000000")
    return folder


@pytest.fixture(scope="module")
def resumed(trained: Path) -> PreparedRun:
    return prepare({}, run=trained, resume=True)


NO_NUMBER: tuple[Any, ...] = (True, "x", [], {}, None, (1,))
NO_COUNT: tuple[Any, ...] = (*NO_NUMBER, -1, 2.5, torch.zeros(3))
NO_MAPPING: tuple[Any, ...] = (True, 3, "x", [], None, torch.zeros(3))
NO_LIST: tuple[Any, ...] = (True, 3, "x", {}, torch.zeros(3))
NO_STATE: tuple[Any, ...] = (*NO_NUMBER, (3, (10**400,), None), (3, ("x",) * 625, None), torch.zeros(3))
WRONG: dict[tuple[Any, ...], tuple[Any, ...]] = {
    ("run",): (*NO_MAPPING, {}, ...), ("run", "seed"): (*NO_NUMBER, 2.5, ...), ("run", "samples"): (*NO_COUNT, ...),
    ("position",): (*NO_MAPPING, {}, ...), ("position", "epoch"): (*NO_COUNT, ...), ("position", "start"): NO_COUNT,
    ("seconds",): (*NO_NUMBER, -1, float("nan"), float("inf"), ...), ("peak_bytes",): (True, "x", [], -1, 2.5, ...),
    ("loss",): (True, "x", [], {}, ...), ("validation",): (*NO_MAPPING, {"loss": "x"}, {3: 4.0}, ...),
    ("extra",): (*NO_MAPPING, ...), ("accumulator",): (*NO_MAPPING, ...), ("scaler",): (True, 3, "x", [], ...),
    ("optimizers",): (*NO_LIST, [None], [3], ...), ("optimizers", 0): (*NO_MAPPING, {}),
    ("optimizers", 0, "state"): (True, 3, "x", [], ...), ("optimizers", 0, "param_groups"): (*NO_LIST, ...),
    ("optimizers", 0, "param_groups", 0): (True, 3, "x", []),
    ("optimizers", 0, "param_groups", 0, "lr"): NO_NUMBER, ("optimizers", 0, "param_groups", 0, "betas"): NO_LIST,
    ("optimizers", 0, "param_groups", 0, "maximize"): (3, "x", []),
    ("schedulers",): (*NO_LIST, [None], ...), ("schedulers", 0): (*NO_MAPPING, {}),
    ("schedulers", 0, "last_epoch"): (*NO_NUMBER, ...), ("schedulers", 0, "base_lrs"): (*NO_LIST, ["x"]),
    ("random",): (*NO_MAPPING, {}, ...), ("random", "python"): (*NO_STATE, ...), ("random", "torch"): (*NO_STATE, ...),
    ("random", "numpy"): NO_STATE,
}  # fmt: skip


@pytest.mark.parametrize("place", WRONG, ids=lambda place: ".".join(map(str, place)))
def test_every_malformed_state_of_a_run_is_refused(trained: Path, resumed: PreparedRun, place: tuple[Any, ...]) -> None:
    """Each declared value, replaced by others or left out; the job's own parts against what the job holds."""
    check = resumed.loop._state.check
    good = read_newest(trained / "checkpoints", notice=pytest.fail).state
    check(good)
    taken = list[Any]()
    for value in WRONG[place]:
        try:
            check(changed(good, place, value))
        except CheckpointError:
            continue
        taken.append(value)
    assert taken == []


def test_a_run_goes_on_from_the_checkpoint_before_a_malformed_one(trained: Path, resumed: PreparedRun) -> None:
    """Values anywhere in the state, chosen with a fixed budget: never a raw error, and mostly the one before."""
    chance = random.Random(3)  # noqa: S311 -- places, not secrets
    folder = trained / "checkpoints"
    path, aside = folder / "step-000002", folder / "step-000002.damaged"
    content = (path / "state.json").read_bytes()
    document = json.loads(content)
    # The numbers of the generators, of which there are thousands, are of one kind.
    everywhere = [each for each in places(document) if len(each) < 8 and not (len(each) > 4 and "random" in each)]
    steps = list[int]()
    for _ in range(150):
        value = chance.choice((*HOSTILE, ...))
        place = chance.choice(everywhere[1:])
        resealed(path, "state.json", as_json(changed(document, place, value)))
        with contextlib.suppress(CheckpointError):  # refused: the names of its tensors are another job's
            resumed.loop.restore()
            steps.append(resumed.loop.progress.step)
        if aside.exists():
            aside.rename(path)
    assert set(steps) == {1, 2}  # some values are harmless
    assert steps.count(1) > 60
    resealed(path, "state.json", content)
    resumed.loop.restore()
    assert resumed.loop.progress.step == 2
