"""Real ranks, as in ``tests/ranks``."""

import runpy
from pathlib import Path

run_ranks = runpy.run_path(str(Path(__file__).parents[1] / "ranks" / "conftest.py"))["run_ranks"]
