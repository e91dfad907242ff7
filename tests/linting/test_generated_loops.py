"""500 random loops: what the doctor says of each is what the loop does when it runs."""

import json
import subprocess
import sys
from functools import cache

import pytest
from tests.linting.generated_loops import FAULTS, TAIL_FAULTS, Loop, generate, is_right, weights_of

LOOPS = 500
WINDOWS = (2, 3, 4)


@cache
def loops() -> list[Loop]:
    return [generate(seed) for seed in range(LOOPS)]


def verdicts(loop: Loop) -> dict[bool, set[bool]]:
    """Whether a loop is right: where N divides the length of an epoch, and where it does not."""
    found: dict[bool, set[bool]] = {True: set(), False: set()}
    for size in WINDOWS:
        for length in (2 * size, 3 * size - 1):
            steps, seen = weights_of(loop, size, length)
            found[length % size == 0].add(is_right(steps, seen, size, length))
    return found


def test_every_loop_does_what_it_was_made_for() -> None:
    for seed, loop in enumerate(loops()):
        whole, short = verdicts(loop)[True], verdicts(loop)[False]
        if not loop.fault:
            expected = ({True}, {True})
        elif loop.fault in TAIL_FAULTS:
            expected = ({True}, {False})
        else:
            expected = ({False}, {False})
        assert (whole, short) == expected, f"{seed}: {loop.fault}\n{loop.source}"


def test_every_fault_and_many_forms_are_there() -> None:
    faults = [loop.fault for loop in loops()]
    assert min(faults.count(fault) for fault in FAULTS) >= 20
    assert len({loop.source for loop in loops()}) > 300


_READ = """
import json, sys
from microbatch.linting.doctor import doctor
found = [[(each.rule, each.confidence, each.line) for each in doctor(source)] for source in json.load(sys.stdin)]
json.dump(found, sys.stdout)
"""


@cache
def findings() -> list[list[tuple[str, str, int]]]:
    """What the doctor finds in each loop, in a process without the checker of types: that takes half of the time."""
    sources = json.dumps([loop.source for loop in loops()])
    read = subprocess.run([sys.executable, "-c", _READ], input=sources, capture_output=True, text=True, check=True)
    return json.loads(read.stdout)


@pytest.mark.parametrize("part", range(10))
def test_the_doctor_says_what_the_run_shows(part: int) -> None:
    for seed in range(part, LOOPS, 10):
        loop = loops()[seed]
        found = [each for each in findings()[seed] if each[0].startswith("MB1")]
        told = f"{seed}: {loop.fault}, {found}\n{loop.source}"
        rules = {rule for rule, _, _ in found}
        certain = {rule for rule, confidence, _ in found if confidence == "certain"}
        if not loop.fault:
            assert not found, told
        elif loop.fault in TAIL_FAULTS:
            assert not certain, told
            assert rules == {FAULTS[loop.fault]}, told
        else:
            # Whether the loss is a mean is not in the file, so MB101 and MB102 may depend on it.
            assert FAULTS[loop.fault] in rules, told
            assert certain <= {FAULTS[loop.fault]}, told
