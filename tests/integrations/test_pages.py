"""The pages about frameworks are executed, as ``tests/house/test_readme.py`` executes the others."""

import importlib
import runpy
from pathlib import Path

import pytest
from tests.house.test_readme import FRAMEWORK_PAGES, PAGES, program


@pytest.mark.filterwarnings("ignore")  # of the frameworks, whatever they are about
@pytest.mark.filterwarnings("error::microbatch.MicrobatchWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if page.name in FRAMEWORK_PAGES], ids=lambda page: page.name)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / f"{page.stem}.py"
    file.write_text(program(page.read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    try:
        runpy.run_path(str(file))
    finally:
        if page.name == "accelerate.md":  # its state is the process's own
            importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
