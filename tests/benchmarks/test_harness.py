"""The benchmarks' harness: right numbers from known measurements, fair order, and a run that goes through."""

import dataclasses
import itertools
import json
import re
import statistics
from typing import Any, TypeAlias

import pytest
import torch
from benchmarks import import_time, run, worker
from benchmarks.contenders import Subject, Window, loop, make_subject
from benchmarks.goals import agrees, verdicts
from benchmarks.measure import Entry
from benchmarks.memory import Peak
from benchmarks.summary import NOISY, Summary, order_of_round, summarize, summarize_ratio

Quick: TypeAlias = tuple[dict[str, Any], str]


def entry(contender: str, seconds: list[float], loop: list[float], **changes: Any) -> Entry:
    """Make the entry of one contender, as if it had been measured."""
    made = Entry(
        case="gpt",
        batch_size=32,
        microbatch_size=1,
        contender=contender,
        seconds=seconds,
        cpu_seconds=seconds,
        time=summarize(seconds),
        against_loop=summarize_ratio(seconds, loop),
        against_full=None,
        peak_bytes=1_000_000_000,
        rss_bytes=None,
        gradient_error=1e-7,
        update_error=1e-4,
        of_limit=0.5,
        others_cpu=0.0,
        noisy=False,
    )
    return dataclasses.replace(made, **changes)


def test_quartiles_are_those_of_known_numbers():
    found = summarize([7.0, 1.0, 3.0, 5.0, 9.0])
    assert (found.lower, found.median, found.upper, found.repeats) == (3.0, 5.0, 7.0, 5)
    assert found.spread == pytest.approx(4 / 5)
    assert summarize([2.0]) == Summary(2.0, 2.0, 2.0, 1)


def test_an_outlier_moves_neither_the_median_nor_the_quartiles_much():
    quiet = [1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06]
    found = summarize([*quiet[:-1], 50.0])
    assert found.median == statistics.median(quiet)
    assert not found.noisy
    assert summarize([1.0, 1.0, 1.2, 1.2, 1.4]).spread > NOISY
    assert summarize([1.0, 1.0, 1.2, 1.2, 1.4]).noisy


def test_a_ratio_is_taken_round_by_round():
    # The machine became half as fast after two rounds. The contender always took 1.1 of the loop's time.
    loop = [1.0, 1.0, 2.0, 2.0, 2.0]
    mine = [1.1 * each for each in loop]
    found = summarize_ratio(mine, loop)
    assert found.median == pytest.approx(1.1)
    assert found.spread == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="shorter"):
        summarize_ratio([1.0, 2.0], [1.0])


def test_every_contender_is_in_every_place_equally_often():
    names = ["full", "loop", "microbatch", "accelerate"]
    rounds = [order_of_round(names, index) for index in range(2 * len(names))]
    assert all(sorted(each) == sorted(names) for each in rounds)
    for place in range(len(names)):
        assert sorted(each[place] for each in rounds) == sorted(2 * names)
    before = {(a, b) for each in rounds for a, b in itertools.pairwise(each)}
    assert {("loop", "microbatch"), ("microbatch", "loop")} <= before


@pytest.mark.parametrize(
    ("ratio", "changes", "expected"),
    [
        (0.59, {}, ("met", "met", "met")),
        (0.61, {}, ("missed", "met", "met")),
        (0.61, {"noisy": True}, ("undecided", "met", "met")),
        (0.50, {"peak_bytes": 1_010_000_000}, ("met", "missed", "met")),
        (0.50, {"gradient_error": 0.01}, ("met", "met", "missed")),
        (0.50, {"update_error": 0.5}, ("met", "met", "missed")),
    ],
)
def test_verdicts(ratio: float, changes: dict[str, Any], expected: tuple[str, str, str]):
    loop = [1.0, 1.01, 0.99]
    entries = [entry("loop", loop, loop), entry("microbatch", [ratio * each for each in loop], loop, **changes)]
    found = verdicts(entries)
    assert tuple(each.verdict for each in found) == expected
    assert found[0].goal == "time at most 0.60 of loop's"


def test_memory_that_was_not_measured_decides_nothing():
    loop = [1.0, 1.01, 0.99]
    entries = [entry("loop", loop, loop), entry("microbatch", loop, loop, peak_bytes=None)]
    assert [each.goal for each in verdicts(entries)] == ["time at most 0.60 of loop's", "the loop's gradient"]


@pytest.mark.parametrize(("ratio", "verdict"), [(0.99, "met"), (1.01, "missed")])
def test_every_peer_is_to_be_faster_to_be_beaten(ratio: float, verdict: str):
    loop = [1.0, 1.01, 0.99]
    mine = [0.5 * each for each in loop]
    entries = [entry("loop", loop, loop), entry("microbatch", mine, loop)]
    entries.append(entry("fabric", [each / ratio for each in mine], loop))
    (found,) = [each for each in verdicts(entries) if "fabric" in each.goal]
    assert found.verdict == verdict


def test_peak_counts_what_was_there_and_what_lived_at_once():
    subject = make_subject("tiny", 1, device="cpu")
    with Peak(subject) as nothing:
        pass
    with Peak(subject) as peak:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(2000)
        del second
    assert peak.bytes - nothing.bytes == 8000
    weights = sum(each.numel() * each.element_size() for each in subject.model.parameters())
    inputs = sum(each.numel() * each.element_size() for each in subject.batch.values())
    assert nothing.bytes == weights + inputs


def test_a_contender_that_does_other_arithmetic_is_found(monkeypatch: pytest.MonkeyPatch):
    def forgetful(subject: Subject) -> Window:
        """Leave the last row out, as a loop does that drops what does not fill a window."""
        return loop(dataclasses.replace(subject, batch={name: each[:-1] for name, each in subject.batch.items()}))

    monkeypatch.setitem(worker.NATIVE, "full", forgetful)
    spec = worker.Spec(case="tiny", microbatch_size=1, contenders=("full", "microbatch"), device="cpu", threads=1)
    desk = worker._Desk(spec)
    assert desk.agreement("microbatch").gradient_error < 1e-6
    assert desk.agreement("full").gradient_error > 0.1
    assert desk.agreement("microbatch").gradient_error < 1e-6


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """Run the quick mode once, without the peers, which the tests do not install."""
    out = tmp_path_factory.mktemp("benchmarks") / "quick"
    arguments = ["--quick", "--microbatch-size", "2", "--threads", "1", "--contenders", "full", "loop", "microbatch"]
    assert run.main([*arguments, "--out", str(out)]) == 0
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()


def test_quick_mode_measures_everyone(quick: Quick):
    record, _ = quick
    assert [each["contender"] for each in record["entries"]] == ["full", "loop", "microbatch"]
    for each in record["entries"]:
        assert {field.name for field in dataclasses.fields(Entry)} == set(each)
        assert len(each["seconds"]) == len(each["cpu_seconds"]) == 2
        assert each["time"]["median"] == pytest.approx(statistics.median(each["seconds"]))
        assert agrees(Entry(**each))
        assert each["peak_bytes"] > 0
    by_name = {each["contender"]: each for each in record["entries"]}
    assert by_name["loop"]["against_loop"]["median"] == 1.0
    assert by_name["full"]["against_full"]["median"] == 1.0
    # Two rows at a time hold fewer activations than four.
    assert by_name["loop"]["peak_bytes"] < by_name["full"]["peak_bytes"]
    decided = {each["goal"]: each["verdict"] for each in record["verdicts"]}
    assert decided["memory at most 1.00 of loop's"] == decided["the loop's gradient"] == "met"


def test_the_record_says_on_what_and_names_no_machine(quick: Quick):
    record, markdown = quick
    assert set(record) == {
        "schema", "date", "hardware", "versions", "plan", "not_installed", "cases", "entries", "verdicts",
    }  # fmt: skip
    assert record["versions"]["torch"] == torch.__version__
    assert record["plan"]["threads"] == 1
    assert not re.search(r"/(home|root|work|tmp|Users)/", json.dumps(record) + markdown)
    assert "**microbatch**" in markdown


def test_a_size_that_does_not_divide_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run.main(["--case", "tiny", "--microbatch-size", "3"])
    assert "3 does not divide tiny's batch of 4" in capsys.readouterr().err


def test_import_time_is_over_torch():
    found = import_time.measure(1)
    bare, used = found["import microbatch"], found["import microbatch, and use Accumulator"]
    assert 0 < bare.median < used.median < 5
