"""Two checkouts in turn: here this one against itself."""

import json
from pathlib import Path

from benchmarks.against import HERE, main


def test_a_checkout_against_itself_has_the_same_peak(tmp_path: Path) -> None:
    flags = ["--case", "tiny", "--microbatch-size", "2", "--repeats", "1", "--windows", "1"]
    assert main([str(HERE), *flags, "--out", str(tmp_path / "against")]) == 0
    (row,) = json.loads((tmp_path / "against.json").read_text())["rows"]
    assert row["peak_bytes_ratio"] == 1
    assert row["here"][0]["seconds"] > 0 < row["other"][0]["peak_bytes"]
