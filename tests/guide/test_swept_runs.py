"""The live view shows one run of each batch size of a sweep."""

from pathlib import Path

import pytest

from microbatch.errors import ConfigError
from microbatch.guide.live import open_runs
from microbatch.guide.swept_runs import runs_in


def run(folder: Path, name: str, *, lines: int) -> None:
    path = folder / "runs" / name
    path.mkdir(parents=True)
    (path / "config.toml").write_text("batch_size = 8\n")
    (path / "metrics.jsonl").write_text('{"step": 1}\n' * lines)


def test_one_run_of_each_batch_is_shown(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    for name, lines in (
        ("batch-128-lr-0.1-seed-0", 3),
        ("batch-16-lr-0.1-seed-0", 2),
        ("batch-16-lr-1e-05-seed-0", 9),
        ("batch-16-lr-1e-05-seed-1", 20),
        ("batch-x-lr-0.1-seed-0", 20),
    ):
        run(tmp_path, name, lines=lines)
    assert [each.name for each in open_runs([tmp_path])] == ["batch-16-lr-1e-05-seed-0", "batch-128-lr-0.1-seed-0"]


def test_a_sweep_without_runs_is_told(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ConfigError, match="none of its runs has begun"):
        open_runs([tmp_path])


def test_a_run_directory_is_itself(tmp_path: Path) -> None:
    assert runs_in(tmp_path) == [tmp_path]
