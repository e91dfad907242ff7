"""Every example runs as it is, is short, and comes to what it says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
FRAMEWORKS = {"lora_trainer", "lora_sft", "lora_lightning", "lora_accelerate"}  # of tests/integrations


def result_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


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


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_process() -> None:
    def said(*command: str) -> list[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [*command, str(FOLDER / "ranks.py")],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=True,
        )
        return [line.rpartition(" on ")[0] for line in run.stdout.splitlines() if line.startswith("step")]

    alone = said(sys.executable)
    assert len(alone) == 2
    assert said(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2") == alone
