"""Run tests of the suite where only pytest is installed, and write each result as it comes.

``python -m benchmarks.gpu.suite ARGUMENTS`` takes pytest's arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.outcome import FAILED, NOT_HERE, PASSED, Log
from benchmarks.gpu.stand_ins import put_in_place
from benchmarks.gpu.variables import ITEM, LOG

BROKEN = 70  # the status of a process in which CUDA has had an error that stays


class Results:
    """A plugin of pytest."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Write how many tests there are in this process."""
        _write(collected=len(session.items))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: Any
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Write what became of each test."""
        report = yield
        status = {"passed": PASSED, "failed": FAILED, "skipped": NOT_HERE}[report.outcome]
        if report.when == "call" or status != PASSED:
            note = (
                ""
                if status == PASSED or call.excinfo is None
                else f"{call.excinfo.typename}: {call.excinfo.value}"[:600]
            )
            _write(test=item.nodeid, status=status, seconds=round(report.duration, 2), note=note)
        return report

    def pytest_runtest_logfinish(self) -> None:
        """End the process where CUDA is broken for good, so that what comes after is not said to have failed."""
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                pytest.exit(f"CUDA is broken in this process: {error}", returncode=BROKEN)


def _write(**fields: Any) -> None:
    if path := os.environ.get(LOG):
        event = {"event": "row"} if "test" in fields else {"event": "collected"}
        Log(Path(path)).write(item=os.environ[ITEM], **event, **fields)


if __name__ == "__main__":
    put_in_place()  # pytest itself asks for a class of beartype, as the project file has it, before any plugin is there
    ENDED = pytest.main(sys.argv[1:], plugins=[Results()])
    fine = {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED}
    sys.exit(0 if ENDED in fine else int(ENDED))
