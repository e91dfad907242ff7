"""Values of wrong kinds, by flag and by file: an error that names value and flag, and never a traceback."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from microbatch.cli.flag_words import in_flags
from microbatch.cli.main import app
from microbatch.errors import ConfigError
from microbatch.train.config import load_settings
from microbatch.train.run_settings import FLAGS, Settings, flag_name

JOB = """
import torch
from torch import nn
import microbatch as mb

def job(*, device="cpu", seed=0):
    raise AssertionError("no job is made of settings that cannot work")
"""
VALUES = (
    "", " ", "x", "-1", "0", "1.5", "nan", "inf", "-inf", "1e999", "9" * 400, "0x10", "1_000", "none", "auto",
    "true", "[1]", "{}", "\u2603", "\udcff", "a\nb", "../..", "--", "3 GiX", "-3 GiB", "1e5 GiB", "\x7f", "NULL",
)  # fmt: skip
OF_FILES = (
    "inf", "-inf", "nan", "1e400", "9" * 400, "-1", "0", "1.5", "true", "[]", "[1, 2]", "{}", "{a = 1}", '""',
    '"x"', '"\\u2603"', "1979-05-27T07:32:00Z", "07:32:00", "'''a\nb'''", "[[[[[[1]]]]]]", '"6 GiX"',
)  # fmt: skip
NUMBERS = ("--batch-size", "--steps", "--epochs", "--lr", "--warmup-steps", "--validate-every", "--checkpoint-every",
           "--seed", "--rank-timeout", "--microbatch-size", "--max-grad-norm")  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "job.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def flags_of(command: str) -> list[str]:
    """Return the flags of a command that take a value."""
    params = get_command(app).commands[command].params  # type: ignore[attr-defined]
    return [each.opts[0] for each in params if each.opts[0].startswith("--") and not getattr(each, "is_flag", False)]


def run(*arguments: str) -> tuple[int, str, str, bool]:
    result = CliRunner().invoke(app, list(arguments))
    known = result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stderr, result.stdout, known and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["train", "check", "plan", "lr", "sweep"])
def test_no_value_of_a_flag_is_a_traceback(here: Path, command: str) -> None:
    """Every flag with a fixed number of wrong values; a job is never reached, because the last flag cannot work."""
    chance = random.Random(command)  # noqa: S311 -- values, not secrets
    for flag in flags_of(command):
        for value in chance.sample(VALUES, 6):
            code, _, _, ours = run(command, "job.py:job", flag, value, "--data", "/nowhere/at/all")
            assert ours, (flag, value)
            assert code in {1, 2}, (flag, value)


@pytest.mark.parametrize("flag", NUMBERS)
@pytest.mark.parametrize("value", ["many", "1.5.2", ""])
def test_a_number_that_is_none_is_named_with_its_flag(here: Path, flag: str, value: str) -> None:
    code, error, shown, ours = run("train", "job.py:job", flag, value)
    assert (code, shown, ours) == (2, "", True)
    assert f"{flag} is {json.dumps(value)}: it must be " in error
    assert "number" in error


def test_a_number_that_is_none_is_named_for_other_hardware_too(here: Path) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    (here / "config.json").write_text(json.dumps(gpt2))
    for flag in ("--batch-size", "--microbatch-size", "--sequence-length", "--utilisation", "--ranks", "--bandwidth"):
        code, error, _, ours = run("plan", "config.json", "--device", "h100", "--batch-size", "8", flag, "many")
        assert (code, ours) == (2, True), flag
        assert "many" in error
    assert "--port" in run("guide", "--port", "many")[1]
    assert run("guide", "--port", "99999")[0] == 2


def refusal(given: dict[str, Any], file: Path | None = None) -> str | None:
    """Return the error of ours that settings are refused with; `None` where they are taken."""
    try:
        load_settings(given, file=file)
    except ConfigError as error:
        return str(error)
    return None


def test_no_value_in_a_file_is_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    refused = 0
    for key, value in itertools.product(Settings.model_fields, OF_FILES):
        file.write_text(f"{key} = {value}\n")
        message = refusal({}, file=file)
        refused += message is not None
        assert message is None or key in message or str(file) in message
        assert message is None or message.encode()
    assert refused > 0.7 * len(Settings.model_fields) * len(OF_FILES)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
nested = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5
)


@given(st.dictionaries(st.sampled_from([*Settings.model_fields, "x", "", "lr"]), nested, max_size=4))
def test_no_value_from_anywhere_is_a_raw_error(given: dict[str, Any]) -> None:
    assert refusal(given) != ""


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"\x00", b"a" * 10, b"[" * 3000, b"x = " + b"[" * 3000, b"steps = 1\nsteps = 2"]
)
def test_no_file_is_a_raw_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    if not content:
        assert load_settings({}, file=file) == Settings()
        return
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load_settings({}, file=file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings({}, file=tmp_path)


def test_the_job_is_an_argument_and_no_flag(here: Path) -> None:
    assert flag_name("job") == "JOB"
    params = get_command(app).commands["train"].params  # type: ignore[attr-defined]
    known = {name for each in params for name in each.opts}
    # What is set in a file alone is named as in the file.
    for key in FLAGS:
        assert flag_name(key) in known, key
    for key in set(Settings.model_fields) - set(FLAGS) - {"job"}:
        assert flag_name(key) == key


@pytest.mark.parametrize("flag", ["--run", "--data", "--config"])
@pytest.mark.parametrize("path", ["9" * 400, "a/" * 3000, "job.py/x"])
def test_a_path_that_no_file_can_have_is_refused(here: Path, flag: str, path: str) -> None:
    code, error, _, ours = run("train", "job.py:job", "--data", "/nowhere/at/all", flag, path)
    assert ours
    assert code == 2
    assert error.startswith("error: ")


@pytest.mark.parametrize(
    ("python", "flags"),
    [
        ("pass a smaller microbatch_size, or a larger memory_budget",
         "pass a smaller --microbatch-size, or a larger --memory"),
        ('Try activation checkpointing (checkpoint="all"), shorter rows',
         "Try activation checkpointing (--checkpoint all), shorter rows"),
        ('checkpoint="all" found no repeated blocks in Net; pass the names of submodules',
         "--checkpoint all found no repeated blocks in Net; leave it out"),
        ('Pass nonfinite="skip" to drop such windows',
         'Write nonfinite = "skip" in a file for --config to drop such windows'),
        ("memory_budget=3: 3 B cannot hold", "--memory 3: 3 B cannot hold"),
        ("out of memory. The original error: OutOfMemoryError: the memory budget of 3 B was passed", "out of memory."),
        ("the job's microbatch_size is 0", "the job's microbatch_size is 0"),
        ("Job(microbatch_size=) or --microbatch-size", "Job(microbatch_size=) or --microbatch-size"),
    ],
)  # fmt: skip
def test_errors_of_the_library_speak_of_flags(python: str, flags: str) -> None:
    assert in_flags(python) == flags
