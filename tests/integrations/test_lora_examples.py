"""The examples that fine-tune one model in five ways have the same losses at every step."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
NEEDS = {
    "lora_trainer": "transformers",
    "lora_sft": "trl",
    "lora_lightning": "lightning",
    "lora_accelerate": "accelerate",
}


def losses(name: str, folder: Path) -> list[float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path])}
    command = [sys.executable, "-c", f"import {name}; print({name}.main())"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def own_loop(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    pytest.importorskip("peft")
    found = losses("lora", tmp_path_factory.mktemp("lora"))
    assert len(found) == 8
    assert found[-1] < found[0]
    return found


@pytest.mark.parametrize("name", NEEDS)
def test_the_framework_has_the_losses_of_the_own_loop(name: str, own_loop: list[float], tmp_path: Path) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    assert losses(name, tmp_path) == pytest.approx(own_loop, rel=2e-6)
