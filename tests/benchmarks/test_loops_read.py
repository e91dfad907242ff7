"""The benchmarks of the doctor, on the smallest of inputs."""

import json
from pathlib import Path

import pytest
from benchmarks import labelled_loops, read_loops

from microbatch.linting.doctor import doctor

WRONG = """for i, (x, y) in enumerate(loader):
    loss = criterion(model(x), y) / N
    loss.backward()
    if i % N == 0:
        optimizer.step()
        optimizer.zero_grad()
"""


def test_found_missed_and_false_alarms_are_counted(tmp_path: Path) -> None:
    labels = [
        {"faults": [{"kind": "first-window-short", "line": 4, "certain": True}], "silent": ["loss-not-divided"]},
        {"faults": [{"kind": "clip-every-microbatch", "line": 4, "certain": True}], "silent": ["window-phase"]},
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps(each) for each in labels), encoding="utf-8")
    for number in (1, 2):
        (tmp_path / f"{number:02d}").mkdir()
        (tmp_path / f"{number:02d}" / "train.py").write_text(WRONG, encoding="utf-8")
    found = labelled_loops.judge_loops(tmp_path / "labels.jsonl")
    assert (found["loops"], found["certain"], found["found"], found["false_certain"]) == (2, 2, 1, 1)
    assert found["missed"] == ["02: clip-every-microbatch (line 4)"]
    assert found["false_alarms"] == ["02: window-phase (line 5)"]


def test_the_file_that_is_timed_holds_loops_that_the_doctor_reads() -> None:
    text = read_loops.a_file()
    assert 1000 <= text.count("\n") <= 1020
    assert {each.function for each in doctor(text)} >= {"train_0", "train_1"}


def test_real_files_are_read_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inside").mkdir()
    for place in ("short.py", "inside/long.py"):
        text = read_loops.a_file() if "long" in place else "for x in loader:\n    loss.backward()\n"
        (tmp_path / place).write_text(text, encoding="utf-8")
    found = {each.name: each for each in read_loops.read_real([tmp_path], repeats=1)}
    assert {name: each.lines for name, each in found.items()} == {"short.py": 2, "long.py": 1003}
    assert all(each.cpu_seconds > 0 < each.command_cpu_seconds for each in found.values())
    assert "long.py, 1003 lines: " in capsys.readouterr().out
