"""The command for a GPU, without one: nothing ends it, nothing is said to have passed that did not run."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import exact_proofs, marked_tests, memory_proofs, run, schedule, stand_ins
from benchmarks.gpu.here import Here
from benchmarks.gpu.outcome import (
    FAILED,
    NOT_HERE,
    NOT_REACHED,
    PASSED,
    Log,
    NotHeldError,
    NotHereError,
    Outcome,
    outcomes,
)
from benchmarks.gpu.page import as_markdown, summary_lines
from benchmarks.gpu.speed import goal
from benchmarks.gpu.variables import ITEM, LOG
from tests.benchmarks.gpu_items import ITEMS
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
# What a machine with a GPU may well not have.
ABSENT = [
    "PIL",
    "beartype",
    "greenlet",
    "hypothesis",
    "matplotlib",
    "pydantic",
    "rich",
    "safetensors",
    "sklearn",
    "starlette",
    "tokenizers",
    "transformers",
    "typer",
    "uvicorn",
    "yaml",
]


def run_items(folder: Path, *, seconds: float) -> dict[str, Outcome]:
    log = Log(folder / "gpu.jsonl")
    with (folder / "output").open("wb") as output:
        one = run.Run(
            ITEMS, "cpu", True, log, time.monotonic() + seconds, output, schedule="tests.benchmarks.gpu_items"
        )
        try:
            one.go()
        finally:
            one.stop()
    return one.found()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return run_items(tmp_path_factory.mktemp("gpu"), seconds=120)


@pytest.mark.parametrize(
    ("item", "status", "note"),
    [
        ("crashes", FAILED, "status -11"),
        ("first", PASSED, ""),
        ("hangs", FAILED, "stopped after"),
        ("not held", FAILED, "2 + 2 is 5"),
        ("raises", FAILED, "illegal memory access"),
        ("not here", NOT_HERE, "CUDA only"),
        ("last", PASSED, ""),
    ],
)
def test_no_item_ends_the_others(found: dict[str, Outcome], item: str, status: str, note: str) -> None:
    assert found[item].status == status
    assert note in found[item].note


def test_what_was_reported_before_the_end_is_kept(found: dict[str, Outcome]) -> None:
    assert found["hangs"].rows == [{"row": "one"}]
    assert found["first"].numbers == {"answer": 42}


def test_the_page_and_the_summary_have_every_item(found: dict[str, Outcome]) -> None:
    page = as_markdown(ITEMS, found, device="cuda")
    assert "| Proofs | 2 | 4 | 1 | 0 |" in page
    assert all(f"| {each.name} | {found[each.name].status} |" in page for each in ITEMS)
    assert "passed, 2: first, last" in summary_lines(found)


def test_what_time_is_over_for_is_not_reached(tmp_path: Path) -> None:
    assert {each.status for each in run_items(tmp_path, seconds=0.5).values()} == {NOT_REACHED}


def test_the_dry_run_says_that_it_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["losses that couple samples", "two devices, NCCL", "GPT 124M"]
    assert run.main(["--device", "cpu", "--items", *names, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "proves and measures nothing about a GPU" in page
    assert "| losses that couple samples | passed |" in page
    assert "| two devices, NCCL | not here |" in page
    assert "met:" not in page  # times of tiny sizes decide nothing
    assert "passed, 3: machine, GPT 124M, losses that couple samples" in capsys.readouterr().out


def test_the_suite_needs_neither_hypothesis_nor_beartype(tmp_path: Path) -> None:
    # Its conftest and the marked tests, with the small modules that stand in for them.
    run.main(["--device", "cpu", "--only", "tests", "--out", str(tmp_path)])
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "all else of it passed" in page
    assert re.search(r"\| Tests marked `cuda` \| [1-9]\d* \| 0 \|", page)  # passed, failed


def test_without_a_gpu_the_dry_run_is_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "_has_cuda", lambda: False)
    assert run.main(["--out", str(tmp_path)]) == 2
    assert "--device cpu" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_every_item_can_be_found_and_takes_its_arguments() -> None:
    for each in schedule.ITEMS:
        assert callable(schedule.function_of(each))
    assert len({each.name for each in schedule.ITEMS}) == len(schedule.ITEMS)


def test_nothing_else_is_needed() -> None:
    modules = sorted(f"benchmarks.gpu.{file.stem}" for file in Path(run.__file__).parent.glob("[a-z]*.py"))
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); import {', '.join(modules)}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths})


# -- proofs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out of memory in backward", "prefetch overlaps"])
def test_what_is_about_cuda_alone_never_passes_on_a_cpu(name: str) -> None:
    item = next(each for each in schedule.ITEMS if each.name == name)
    with pytest.raises(NotHereError, match="CUDA only; all else of it passed"):
        schedule.function_of(item)(Here(torch.device("cpu"), tiny=True), lambda **_: None)


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, *_: Any, **__: Any) -> list[Tensor]:
        return [torch.ones_like(each) for each in model.parameters()]

    monkeypatch.setattr(exact_proofs, "ours", wrong)
    with pytest.raises(NotHeldError, match="off"):
        exact_proofs.coupled(Here(torch.device("cpu"), tiny=True), lambda **_: None)


def test_a_window_that_retries_without_need_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_proofs.Hungry, "backward", staticmethod(lambda _ctx, grad: (grad, None, None)))
    with pytest.raises(NotHeldError, match="memory did not end"):
        memory_proofs.recovery(Here(torch.device("cpu"), tiny=True), lambda **_: None, where="backward")


# -- the suite with pytest alone ---------------------------------------------------------------------------------------


def test_every_file_with_a_marked_test_is_found() -> None:
    marked = {file.name for file in marked_tests.files()}
    assert {"test_spill.py", "test_memory.py", "test_normalisation.py", "test_feed.py"} <= marked
    assert "test_words.py" not in marked


def test_every_strategy_of_those_files_has_a_stand_in() -> None:
    used = {
        name for file in marked_tests.files() for name in re.findall(r"\bst\.(\w+)", file.read_text(encoding="utf-8"))
    }
    assert {"integers", "lists"} <= used
    assert used <= {each.__name__ for each in stand_ins.STRATEGIES}


def test_a_test_that_fails_is_written_down(tmp_path: Path) -> None:
    file, log = tmp_path / "test_some.py", Log(tmp_path / "log.jsonl")
    file.write_text(
        "import pytest\n"
        "from hypothesis import given, strategies as st\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
        "@given(n=st.integers(3, 5))\ndef test_drawn(n): assert n < 3\n"
    )
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.suite", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), str(file)],
        check=True,
        cwd=ROOT,
        env={**os.environ, LOG: str(log.path), ITEM: "tests", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.DEVNULL,
    )
    one = outcomes(log.read(), ["tests"])["tests"]
    statuses = {row["test"].rpartition(":")[2]: row["status"] for row in one.rows}
    assert statuses == {"test_good": PASSED, "test_bad": FAILED, "test_skipped": NOT_HERE, "test_drawn": FAILED}
    assert (one.status, one.collected) == (FAILED, 4)


def test_a_property_is_held_on_its_examples_and_on_drawn_ones() -> None:
    seen: list[tuple[Any, ...]] = []

    large_first = stand_ins.lists(stand_ins.integers(1, 3), min_size=1).filter(lambda values: values[0] > 1)

    @stand_ins.given(values=large_first, flag=stand_ins.booleans())
    @stand_ins.example(flag=True, values=[7])
    def holds(fixture: str, values: list[int], *, flag: bool) -> None:
        stand_ins.assume(condition=fixture == "fixture")
        seen.append((values, flag))

    holds("fixture")
    assert seen[0] == ([7], True)
    assert len(seen) == 1 + stand_ins.DRAWN
    assert all(values[0] > 1 and set(values) <= {1, 2, 3} for values, _ in seen[1:])
    first = list(seen)
    seen.clear()
    holds("fixture")
    assert seen == first


def test_a_property_that_does_not_hold_is_seen() -> None:
    @stand_ins.given(number=stand_ins.integers(0, 10))
    def fails(number: int) -> None:
        assert number > 10

    with pytest.raises(AssertionError):
        fails()


# -- goals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "ratios", "verdict"),
    [
        (1, {"loop": 0.95, "full": 3.0}, "met"),
        (4, {"loop": 0.96, "full": 1.0}, "missed"),
        (8, {"loop": 0.9, "full": 1.04}, "missed"),
        (16, {"loop": 1.01, "full": 1.03}, "met"),
        (32, {"loop": 1.02, "full": 1.02}, "missed"),
        (16, {"loop": 1.0}, "met"),
    ],
)
def test_goals(size: int, ratios: dict[str, float], verdict: str) -> None:
    assert goal(size, ratios, noisy=False).startswith(verdict)
    assert goal(size, ratios, noisy=True).startswith("undecided")
