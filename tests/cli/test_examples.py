"""Every example runs as it is, is short, and comes to what it says."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def run(*command: str) -> list[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False, cwd=FOLDER
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def result_of(name: str) -> Any:
    """Return what the example's main function returns; a process of its own, in which types are not checked."""
    return ast.literal_eval(run(sys.executable, "-W", "error", "-c", f"import {name}; print({name}.main())")[-1])


def test_every_example_is_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert lines
    assert max(lines.values()) <= 80, lines


def test_clip_has_the_whole_batchs_gradient() -> None:
    assert result_of("clip") < 1e-5


def test_the_gan_draws_the_circle() -> None:
    assert abs(result_of("gan") - 2.0) < 0.4


def test_the_walkers_of_ppo_get_there() -> None:
    assert result_of("ppo") > 11.0


def test_the_graph_network_counts_neighbours() -> None:
    assert result_of("graphs") > 0.95


def test_the_detector_finds_boxes() -> None:
    heat, offset = result_of("detection")
    assert heat < 0.15
    assert offset < 0.3


def needs(package: str) -> None:
    """Skip where a package is missing: both need torchvision, which does not load beside every build of torch."""
    if not all(importlib.util.find_spec(name) for name in (package, "torchvision")):
        pytest.skip(f"needs {package} and torchvision")


def test_a_model_of_timm_learns() -> None:
    needs("timm")
    assert result_of("timm_model") < 0.9


def test_a_model_of_ultralytics_has_the_whole_batchs_gradient() -> None:
    needs("ultralytics")
    assert result_of("ultralytics_model") < 1e-4


@pytest.mark.parametrize(("package", "example"), [("optuna", "optuna_search"), ("ray", "ray_tune_search")])
def test_a_search_finds_a_rate_that_learns(package: str, example: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    assert result_of(example) < 0.6


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_process() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    alone = run(sys.executable, "ranks.py")
    two = run(*torchrun, "ranks.py")
    assert len(alone) == 2
    assert [line.rpartition(" on ")[0] for line in two] == [line.rpartition(" on ")[0] for line in alone]
