"""Every planted cause is named, with where it is, and none that is not there."""

from typing import Any

import pytest

import microbatch as mb

from .programs import SIZE, Program, programs

PROGRAMS = programs()
PLANTED = [name for name in PROGRAMS if not name.startswith("nothing")]


def found_in(program: Program) -> mb.Check:
    options: dict[str, Any] = {"microbatch_size": SIZE, **program.options}
    return mb.check(program.model, program.loss_fn, program.batch, **options)


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_causes_are_named_and_no_other(name: str) -> None:
    program = PROGRAMS[name]()
    found = found_in(program)
    assert {cause.kind for cause in found.causes} == set(program.planted), str(found)
    assert found.ok == (not program.planted), str(found)
    for cause in found.causes:
        part = program.planted[cause.kind]
        assert any(part in place for place in cause.where) or not part, (cause.kind, cause.where)
        assert cause.remedy
    if {"batch_statistics", "randomness"} <= set(program.planted):
        (randomness,) = (cause for cause in found.causes if cause.kind == "randomness")
        assert "but not beside" in randomness.remedy  # the one excludes the other


def test_there_are_programs_of_every_kind() -> None:
    planted = [len(PROGRAMS[name]().planted) for name in PROGRAMS]
    assert min(planted.count(number) for number in (0, 1, 2)) >= 6
    assert len(planted) >= 20
