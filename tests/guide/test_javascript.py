"""The page's own functions, tested by Node: the machine's, or the one that the type checker brings."""

import subprocess
from pathlib import Path

import pytest

from microbatch.errors import MissingDependencyError
from microbatch.guide.measure import node

TESTS = Path(__file__).parent / "page"


def test_the_pages_functions() -> None:
    try:
        program = node()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    files = sorted(str(file) for file in TESTS.glob("*.test.mjs"))
    assert files
    result = subprocess.run([program, "--test", *files], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
