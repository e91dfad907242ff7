"""The command line's names are a contract: they may be added to, not renamed."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from microbatch.cli.main import app
from microbatch.train.run_settings import FLAGS, Settings, flag_name

COMMANDS = {"check", "doctor", "guide", "lr", "plan", "sweep", "train"}
TRAIN_FLAGS = {
    "--batch-size",
    "--microbatch-size",
    "--memory",
    "--steps",
    "--device",
    "--seed",
    "--config",
    "--json",
    "--resume",
    "--data",
}
PLAN_FLAGS = {"--batch-size", "--memory", "--device", "--json", "--plot", "--no-cache", "--config", "--seed"} | {
    "--price",
    "--deadline",
    "--steps",
    "--samples",
}
CHECK_FLAGS = {"--batch-size", "--microbatch-size", "--memory", "--loop", "--device", "--seed", "--config", "--json"}
LR_FLAGS = {
    "--batch-size",
    "--microbatch-size",
    "--memory",
    "--low",
    "--high",
    "--steps",
    "--seeds",
    "--device",
    "--seed",
    "--config",
    "--json",
    "--plot",
    "--output",
}
SWEEP_FLAGS = {
    "--batch-size",
    "--microbatch-size",
    "--lr",
    "--samples",
    "--target-loss",
    "--seeds",
    "--points",
    "--keep-all",
    "--output",
    "--plot",
    "--device",
    "--seed",
    "--config",
    "--json",
}
GUIDE_FLAGS = {"--port", "--no-browser", "--export"}
DOCTOR_FLAGS = {
    "--output-format",
    "--select",
    "--ignore",
    "--exclude",
    "--strict",
    "--explain",
    "--diff",
    "--rewrite",
    "--stdin-filename",
    "--show-window",
}


def flags(*path: str) -> dict[str, str]:
    """Return every flag of a command, with its help."""
    command = get_command(app)
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    return {flag: getattr(each, "help", None) or "" for each in command.params for flag in each.opts if flag[0] == "-"}


def test_every_command_is_there() -> None:
    assert set(get_command(app).commands) >= COMMANDS  # type: ignore[attr-defined]


def test_every_flag_of_train_is_there() -> None:
    assert set(flags("train")) >= TRAIN_FLAGS


def test_every_flag_of_plan_is_there() -> None:
    assert set(flags("plan")) >= PLAN_FLAGS


def test_every_flag_of_lr_is_there() -> None:
    assert set(flags("lr")) >= LR_FLAGS


def test_every_flag_of_check_is_there() -> None:
    assert set(flags("check")) >= CHECK_FLAGS


def test_every_flag_of_sweep_is_there() -> None:
    assert set(flags("sweep")) >= SWEEP_FLAGS


def test_every_flag_of_guide_is_there() -> None:
    assert set(flags("guide")) >= GUIDE_FLAGS


def test_every_flag_of_doctor_is_there() -> None:
    assert set(flags("doctor")) >= DOCTOR_FLAGS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_flag_says_what_it_is_for(command: str) -> None:
    assert [flag for flag, text in flags(command).items() if not text] == []


def test_the_version_is_the_installed_one() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert importlib.metadata.version("microbatch") in result.output


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--batchsize", "3"], ["train", "--steps", "many"]])
def test_what_does_not_exist_is_refused_without_a_traceback(arguments: list[str]) -> None:
    script = Path(sys.executable).parent / "microbatch"
    result = subprocess.run(
        [str(script), *arguments], capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"}
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert arguments[-1] in result.stderr or arguments[1] in result.stderr


@pytest.mark.parametrize("width", ["60", "80", "120", "200"])
def test_help_cuts_no_flag_and_no_line_is_too_long(width: str) -> None:
    code = """
import contextlib, sys
from microbatch.cli.main import main
for command in ("train", "plan", "lr", "sweep", "check", "doctor", "guide", "new"):
    sys.argv = ["microbatch", command, "--help"]
    with contextlib.suppress(SystemExit):
        main()
"""
    environment = {**os.environ, "COLUMNS": width}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert max(map(len, shown.stdout.splitlines())) <= int(width)
    words = set(re.split(r"[\s,|\u2502]+", shown.stdout))
    for command in sorted(COMMANDS):
        assert set(flags(command)) <= words, command
    assert "\u2026" not in shown.stdout


def test_each_flag_of_a_setting_names_its_values_and_its_default() -> None:
    help_of = flags("train")
    for key, field in Settings.model_fields.items():
        if key in FLAGS and field.default not in (None, False):
            default = f"{field.default:g}" if isinstance(field.default, float) else field.default
            assert help_of[flag_name(key)].endswith(f"Default: {default}."), key
    assert {flag_name(key) for key in FLAGS} <= set(help_of)


@pytest.mark.parametrize(
    ("words", "expected"), [("microbatch do", {"doctor"}), ("microbatch train --ba", {"--batch-size"})]
)
def test_a_shell_completes_commands_and_flags(words: str, expected: set[str]) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_MICROBATCH_COMPLETE": "complete_bash"}
    script = Path(sys.executable).parent / "microbatch"
    result = subprocess.run([str(script)], capture_output=True, text=True, check=False, env={**os.environ, **asked})
    assert set(result.stdout.split()) == expected
