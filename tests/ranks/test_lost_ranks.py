"""Law F6: in a loop of one's own, the error on the other ranks names the rank that is lost, and its step."""

from pathlib import Path
from typing import Any

import pytest
from tests.ranks.losing import CASES, LONG, PATIENCE, lose


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Any]]:
    return lose(tmp_path_factory.mktemp("lost"))


# What the error must say; where the rank that is lost also holds the store, it cannot be told whether it ended or died.
EXPECTED = {
    "killed": ["step 2 came to a halt", "rank 1 has died (process "],
    "stopped": ["step 2 came to a halt", "rank 1", "stopped"],
    "late": ["step 2 came to a halt", "rank 1 did not arrive: in step 2 it was computing"],
    # With the error where the store still answers: rank 0, which holds it, may have ended before rank 2 asks.
    "failing": ["1 of 3 ranks failed inside this window", "rank 1 failed in step 2"],
    "store_lost": ["step 2 came to a halt", "rank 0 has ended or died; it took part in step 1"],
    "ended": ["step 2 came to a halt", "rank 1 has ended, last heard of in step 1", "fewer batches"],
    "returned": ["step 2 came to a halt", "rank 1 has ended, last heard of in step 1", "fewer batches"],
    "sharded": ["step 2 came to a halt", "rank 1 failed in step 2 (ValueError: mine)"],
    "goes_on": ["1 of 3 ranks failed inside this window", "rank 1 failed in step 2"],
    "goes_on_sharded": ["step 2 came to a halt", "rank 1 failed in step 2 (ValueError: mine)"],
    "engine": ["step 2 came to a halt", "rank 1 has died (process "],
    "engine_inside": ["step 2 came to a halt", "rank 1 has died (process "],
    "engine_fails": ["step 2 came to a halt", "rank 1 failed in step 2 (ValueError: mine)"],
    "loader_fails": ["step 2 came to a halt", "rank 1 failed in step 2 (OSError: no such file)"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_lost_rank_is_named_with_its_step_by_every_other_rank(told: dict[str, dict[int, Any]], case: str) -> None:
    for rank, found in told[case].items():
        assert found is not None, f"rank {rank} never ended"
        assert found["error"] == "RankError", found
        for words in EXPECTED[case]:
            assert words in found["message"]
        assert all(f"rank {other} " not in found["message"].replace("rank 0 has ended or died", "") for other in (0, 2))


@pytest.mark.parametrize("case", ["failing", "goes_on"])
def test_the_error_of_a_rank_that_failed_is_told(told: dict[str, dict[int, Any]], case: str) -> None:
    assert "rank 1 failed in step 2 (ValueError: mine)" in told[case][0]["message"]


@pytest.mark.parametrize("case", CASES)
def test_nobody_waits_much_longer_than_the_time_out(told: dict[str, dict[int, Any]], case: str) -> None:
    for found in told[case].values():
        assert found["waited"] < PATIENCE.get(case, LONG / 2) + 15  # the rest is a busy machine's


def test_a_case_in_which_no_rank_is_lost_ends_without_an_error(tmp_path: Path) -> None:
    for found in lose(tmp_path, cases={"nothing": 2})["nothing"].values():
        assert found["error"] == ""
