"""The contracts between the rooms hold, and each of them refuses a file that breaks it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package that a test may spoil."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def broken(folder: Path) -> set[str]:
    """Return the names of the contracts that the package in a folder breaks."""
    result = subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src"), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Contracts:" in result.stdout, result.stdout + result.stderr
    return {line.removesuffix(" BROKEN") for line in result.stdout.splitlines() if line.endswith(" BROKEN")}


def test_every_contract_is_kept(copy: Path) -> None:
    assert broken(copy) == set()


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("batch/cut.py", "import microbatch.step.accumulator", "The arrows between the rooms run one way"),
        ("batch/cut.py", "import microbatch.loss.loss", "The arrows between the rooms run one way"),
        ("new_room/__init__.py", "", "The arrows between the rooms run one way"),
        ("loss/loss.py", "import microbatch", "Nothing inside the package imports its facade"),
        (
            "train/training_loop.py",
            "from microbatch import Accumulator",
            "Nothing inside the package imports its facade",
        ),
        ("memory/meter.py", "import numpy", "The core, and the record of a job, need torch alone"),
        (
            "step/parts/autocast.py",
            "import microbatch.step.peers.alone",
            "Parts, passes and peers do not know one another",
        ),
        ("step/window.py", "import microbatch.step.parts.fused", "A window knows no feature by name"),
        ("train/job.py", "import rich.console", "The core, and the record of a job, need torch alone"),
        ("linting/finding.py", "import torch", "The doctor, and the errors, need no torch"),
        ("errors.py", "import torch", "The doctor, and the errors, need no torch"),
        ("linting/finding.py", "import microbatch.batch.cut", "The arrows between the rooms run one way"),
        ("linting/finding.py", "import microbatch.warned", "The arrows between the rooms run one way"),
    ],
)
def test_a_file_that_breaks_it_is_refused(copy: Path, file: str, line: str, contract: str) -> None:
    path = copy / "src" / "microbatch" / file
    path.parent.mkdir(exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{before}\n{line}\n", encoding="utf-8")
    assert contract in broken(copy)
