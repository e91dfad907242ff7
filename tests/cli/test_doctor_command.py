"""The command line of the doctor: exit codes, what goes to which stream, and no torch, however it is started."""

import ast
import inspect
import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.linting.findings import LOOP, judge
from typer.main import get_command
from typer.testing import CliRunner

from microbatch.cli import doctor_options
from microbatch.cli.doctor_command import DoctorFlags, read_arguments, run_doctor
from microbatch.cli.main import app
from microbatch.linting.finding import Finding
from microbatch.linting.rewrite import Sketch
from microbatch.linting.rules.table import RULES
from microbatch.linting.sources import Source

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, and a doctor that finds what marks in the source say."""
    stand_in = types.ModuleType("microbatch.linting.doctor")
    stand_in.__dict__["judge"] = judge
    monkeypatch.setitem(sys.modules, "microbatch.linting.doctor", stand_in)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str, text: str | bytes | None = None) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments], input=text)


# -- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "strict"),
    [
        ("x.backward()\n", 0, 0),
        ("x.backward()  # MB105!\n", 1, 1),
        ("x.backward()  # MB110?\n", 0, 1),
        ("x.backward()  # MB601!\n", 0, 0),
        ("for in:\n", 2, 2),
    ],
)
def test_exit_codes(folder: Path, text: str, code: int, strict: int) -> None:
    (folder / "train.py").write_text(text)
    assert invoke("train.py").exit_code == code
    assert invoke("--strict", "train.py").exit_code == strict
    (folder / "pyproject.toml").write_text("[tool.microbatch.doctor]\nstrict = true\n")
    assert invoke("train.py").exit_code == strict


def test_what_could_not_be_read_wins_over_what_was_found(folder: Path) -> None:
    (folder / "a.py").write_text("x.backward()  # MB105!\n")
    (folder / "b.py").write_bytes(b"x = '\xe9'\n")
    assert invoke().exit_code == 2
    gone = invoke("a.py", "gone.py")
    assert gone.exit_code == 2
    assert "gone.py:1:1: MB000 [error] cannot be read: there is no such file or folder" in gone.stdout
    assert invoke("a.py").exit_code == 1
    assert invoke("--ignore", "MB0", "b.py").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output-format", "xml"], "'xml' is not there; choose one of text, json, jsonl, github, sarif"),
        (["--select", "MB9"], "'MB9'"),
        (["--ignore", "E501"], "'E501'"),
        (["--explain", "MB999"], "'MB999'"),
        (["--diff", "--rewrite"], "use one of them"),
        (["--diff", "--output-format", "json"], "no --output-format"),
        (["--explain", "MB105", "--output-format", "json"], "--explain is text"),
        (["--selct", "MB1"], "--selct"),
        (["--select"], "--select"),
    ],
)
def test_a_mistake_ends_with_2_and_nothing_on_standard_output(arguments: list[str], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in " ".join(result.stderr.split())


def test_bad_settings_end_with_2(folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[tool.microbatch.doctor]\nselekt = []\n")
    result = invoke(".")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "selekt" in result.stderr


# -- what is read -----------------------------------------------------------------------------------------------------


def test_folders_files_and_notebooks(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "train.py").write_text(LOOP)
    (folder / "a" / "other.py").write_text("x = 1\n")
    cell = {"cell_type": "code", "source": "%time\ny.backward()  # MB105!"}
    (folder / "a" / "n.ipynb").write_text(json.dumps({"cells": [cell]}))
    text = invoke().stdout
    assert "a/n.ipynb:cell 1:2:1: MB105 [certain]" in text
    assert "a/train.py:6:9: MB105 [certain]" in text
    assert text.endswith("2 certain, 1 depends, 3 speed notes (3 files read)\n")
    assert invoke(str(folder)).stdout == text
    assert invoke("a", "a/train.py", "./a/train.py").stdout == text
    assert "(1 file read)" in invoke("--exclude", "*.ipynb,other.py", ".").stdout


def test_standard_input(folder: Path) -> None:
    result = invoke("-", text=LOOP)
    assert result.exit_code == 1
    assert result.stdout.startswith("<stdin>:6:9: MB105 [certain]")
    assert invoke("--stdin-filename", "src/train.py", text=LOOP).stdout.startswith("src/train.py:6:9: ")
    notebook = json.dumps({"cells": [{"cell_type": "code", "source": "y.backward()  # MB105!"}]})
    assert invoke("-", "--stdin-filename", "n.ipynb", text=notebook).stdout.startswith("n.ipynb:cell 1:1:1: ")
    assert invoke("-", text=b"x = '\xe9'\n").exit_code == 2
    (folder / "pyproject.toml").write_text('[tool.microbatch.doctor]\nignore = ["MB105"]\n')
    assert invoke("-", text=LOOP).exit_code == 0


def test_rules_are_selected_and_silenced(folder: Path) -> None:
    (folder / "train.py").write_text(LOOP)
    assert "MB105 [" not in invoke("--ignore", "MB105", "train.py").stdout
    assert "MB110 [" not in invoke("--select", "MB105,MB6", "train.py").stdout
    (folder / "train.py").write_text(LOOP.replace("# MB105!~", "# MB105!  # microbatch: ignore[MB105] meant"))
    assert invoke("train.py").exit_code == 0
    (folder / "train.py").write_text("x.backward()  # microbatch: ignore\n")
    assert "MB003 [note]" in invoke("train.py").stdout


def test_that_there_is_no_loop_is_said_of_a_file_alone(folder: Path) -> None:
    (folder / "a.py").write_text("x = 1\n")
    (folder / "b.py").write_text("x = 1\n")
    assert "a.py:1:1: MB001 [note] no loop was found" in invoke("a.py").stdout
    assert "MB001" not in invoke("a.py", "b.py").stdout
    assert "MB001" not in invoke(".").stdout
    assert invoke("a.py").exit_code == 0


def test_files_of_a_folder_without_a_word_of_accumulation_are_not_parsed(folder: Path) -> None:
    (folder / "template.py").write_text("import {{ name }}\nx = 1\n")
    assert invoke(".").exit_code == 0
    assert invoke("template.py").exit_code == 2
    (folder / "template.py").write_text("import {{ name }}\nloss.backward()\n")
    assert invoke(".").exit_code == 2
    (folder / "template.py").write_text("x = 1  # microbatch: ignore\n")
    assert "MB003" in invoke(".").stdout


def test_imports_are_looked_up_in_the_folder_that_is_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = list[tuple[str, Path | None]]()

    def watch(source: Source, within: Path | None) -> list[Finding]:
        looked.append((source.path, within))
        return []

    monkeypatch.setattr(sys.modules["microbatch.linting.doctor"], "judge", watch)
    (folder / "a").mkdir()
    (folder / "a" / "train.py").write_text("x.backward()\n")
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "train.py").write_text("x.backward()\n")
    invoke("a", "-", str(elsewhere / "train.py"), text="x.backward()\n")
    invoke("a/train.py")
    assert looked == [
        ("a/train.py", Path("a")),
        ("<stdin>", folder),
        ((elsewhere / "train.py").as_posix(), elsewhere),
        ("a/train.py", folder),
    ]


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "sarif"])
def test_standard_output_is_the_form_alone(folder: Path, form: str) -> None:
    (folder / "train.py").write_text(LOOP)
    (folder / "broken.py").write_text("x.backward() for in:\n")
    result = invoke("--output-format", form, ".", "gone.py")
    assert (result.exit_code, result.stderr) == (2, "")
    json.loads(result.stdout)


def test_forms_of_lines(folder: Path) -> None:
    (folder / "train.py").write_text(LOOP)
    lines = invoke("--output-format=jsonl", "train.py").stdout.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["finding"] * 5 + ["summary"]
    github = invoke("--output-format=github", "train.py").stdout.splitlines()
    assert [line.split(" ")[0] for line in github] == ["::notice"] * 3 + ["::error", "::warning"]


def test_a_rule_is_explained(folder: Path) -> None:
    result = invoke("--explain", "mb105")
    assert result.exit_code == 0
    assert result.stdout.startswith("MB105 window-phase (error)\n")
    assert RULES["MB105"].right.splitlines()[0] in result.stdout
    (folder / "train.py").write_text(LOOP)
    shown = invoke("--explain", "window-phase", "train.py")
    assert shown.exit_code == 1
    assert "  the window:\n    step 1: 0\n" in shown.stdout
    assert "MB110 [" not in shown.stdout.split("Right:")[1]


def test_the_window_is_drawn(folder: Path) -> None:
    (folder / "train.py").write_text(LOOP)
    assert "  the window:\n    step 1: 0\n" in invoke("--show-window", "train.py").stdout
    assert "the window:" not in invoke("train.py").stdout


def test_a_diff_mends_the_file_and_is_to_be_read_first(folder: Path) -> None:
    (folder / "train.py").write_text(LOOP)
    (folder / "broken.py").write_text("for in:\n")
    result = invoke("--diff", "train.py")
    assert result.exit_code == 1
    assert "Read each of them before you apply it." in result.stderr
    assert "learning rate" not in result.stderr
    subprocess.run(["git", "apply", "-"], input=result.stdout, text=True, check=True)  # noqa: S607
    assert (folder / "train.py").read_text() == LOOP.replace("  # MB105!~", "")
    assert invoke("--diff", "train.py").exit_code == 0
    assert invoke("--diff", "train.py").stdout == ""
    broken = invoke("--diff", ".", "broken.py")
    assert (broken.exit_code, broken.stdout) == (2, "")
    assert "broken.py:1:5: MB000" in broken.stderr


def test_a_division_that_is_mended_asks_for_another_learning_rate(folder: Path) -> None:
    (folder / "train.py").write_text("x.backward()  # MB101!~\n")
    assert "with SGD, tune the learning rate again" in invoke("--diff", "train.py").stderr


def test_changes_of_one_line_are_left_for_the_next_time(folder: Path) -> None:
    (folder / "train.py").write_text("x.backward()  # MB105!~  # MB201!~\n")
    result = invoke("--diff", "train.py")
    assert "left out, because they change the same lines: 1" in result.stderr
    assert result.stdout.count("+x.backward()\n") == 1


def test_a_sketch_of_the_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("microbatch.linting.rewrite")
    stand_in.__dict__["sketch"] = lambda source: Sketch(f"--- {source.path}\n", ("line 1: no reason",))
    monkeypatch.setitem(sys.modules, "microbatch.linting.rewrite", stand_in)
    (folder / "a.py").write_text("x.backward()\n")
    (folder / "b.py").write_text("x = 1\n")
    result = invoke("--rewrite", ".")
    assert (result.exit_code, result.stdout) == (0, "--- a.py\n")
    assert "a sketch to read" in result.stderr
    assert "a.py: not rewritten: line 1: no reason\n" in result.stderr
    (folder / "b.py").write_text("x.backward() for in:\n")
    result = invoke("--rewrite", ".")
    assert (result.exit_code, result.stdout) == (2, "--- a.py\n")
    stand_in.__dict__["sketch"] = lambda source: 1 / 0
    result = invoke("--rewrite", "a.py")
    assert (result.exit_code, "ZeroDivisionError" in result.stderr) == (2, True)


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_terminal_without_unicode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "train.py").write_text("größe.backward()  # MB105!\n", encoding="utf-8")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run_doctor(["train.py"], DoctorFlags()) == 1
    assert rb"gr\xf6\xdfe.backward()" in written.getvalue()


STAND_IN = """
import sys, types
sys.path.insert(0, {root!r})
from tests.linting.findings import judge
stand_in = types.ModuleType("microbatch.linting.doctor")
stand_in.judge = judge
sys.modules["microbatch.linting.doctor"] = stand_in
for name in {absent!r}:
    sys.modules[name] = None
sys.argv = ["microbatch", *{arguments!r}]
from microbatch.cli.entry import main
main()
"""


def start(*arguments: str, absent: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start the command line in a process of its own, in which packages are absent."""
    code = STAND_IN.format(root=str(ROOT), absent=list(absent), arguments=list(arguments))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_reader_that_has_ended_is_no_error(folder: Path) -> None:
    (folder / "train.py").write_text("x.backward()  # MB105!\n" * 5_000)
    with start("doctor", "train.py") as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert (process.returncode, errors) == (1, b"")


OTHERS = ("torch", "numpy", "rich", "typer", "pydantic", "safetensors")


def test_the_standard_library_is_enough(folder: Path) -> None:
    (folder / "train.py").write_text(LOOP)
    for form in ("text", "json", "github", "sarif"):
        with start("doctor", "train.py", "--output-format", form, absent=OTHERS) as process:
            out, errors = process.communicate()
        assert (process.returncode, errors) == (1, b"")
        assert b"MB105" in out
    with start("doctor", "train.py", "--diff", absent=OTHERS) as process:
        out, _ = process.communicate()
    assert b"+        if i % N == 0:\n" in out
    # The negative control: help is Typer's.
    with start("doctor", "--help", absent=OTHERS) as process:
        _, errors = process.communicate()
    assert b"typer" in errors


def test_no_other_package_is_imported(folder: Path) -> None:
    (folder / "train.py").write_text(LOOP)
    names = "print(sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    code = STAND_IN.format(root=str(ROOT), absent=[], arguments=["doctor", "train.py"])
    code = code.replace("main()", f"try:\n    main()\nfinally:\n    {names}", 1)
    code = code.replace("import try:", "import main\ntry:")
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False, env=path())
    loaded = set(ast.literal_eval(result.stdout.splitlines()[-1]))
    assert loaded <= {"__main__", "microbatch", "tests"}, result.stderr


def path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}


# -- the doctor itself ------------------------------------------------------------------------------------------------

WRONG = """\
def train(model, loader, optimizer, N):
    for i, (x, y) in enumerate(loader):
        loss = F.mse_loss(model(x), y) / N
        loss.backward()
        if i % N == 0:
            optimizer.step()
            optimizer.zero_grad()
"""


DOCTOR = """
import runpy
sys.argv = ["microbatch", "doctor", "train.py"]
runpy.run_module("microbatch", run_name="__main__")
"""


def alone(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own that has the standard library and this package."""
    absent = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in OTHERS)
    return subprocess.run(
        [sys.executable, "-c", absent + code], capture_output=True, text=True, check=False, env=path(), timeout=60
    )


def test_the_real_doctor_needs_the_standard_library_alone(folder: Path) -> None:
    (folder / "train.py").write_text(WRONG)
    result = alone(DOCTOR)
    assert (result.returncode, result.stderr) == (1, "")
    assert "train.py:6:13: MB105 [certain]" in result.stdout
    result = alone("import microbatch as mb\nprint([each.rule for each in mb.doctor('train.py')])")
    assert "MB105" in result.stdout
    # The negative control: a part of the package that needs torch.
    assert "torch" in alone("import microbatch as mb\nmb.Accumulator").stderr


HOSTILE = {
    "a long function": "def f(loader, m, opt, N):\n" + "    x = 1\n" * 10_000 + WRONG.split("\n", 1)[1],
    "deep blocks": "".join(" " * depth + "if c:\n" for depth in range(90)) + " " * 90 + "loss.backward()\n",
    "a cycle of helpers": "def a(x):\n  b(x)\ndef b(x):\n  x.backward()\n  a(x)\nfor x in y:\n  a(x)\n  opt.step()\n",
    "a long sum": "for x in y:\n    loss = " + " + ".join(["m(x)"] * 3_000) + "\n    loss.backward()\n    opt.step()\n",
    "huge numbers": "N = 9 ** 9 ** 9\nfor i in range(10 ** 12):\n    loss.backward()\n    if i % N == 0: opt.step()\n",
    "no end": "while True:\n    loss.backward()\n    while True:\n        opt.step()\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_soon_and_without_a_traceback(folder: Path, name: str) -> None:
    (folder / "train.py").write_text(HOSTILE[name])
    result = alone(DOCTOR)
    assert result.returncode in {0, 1, 2}
    assert result.stderr == ""
    assert "fault of its own" not in result.stdout


# -- one command line, two readers of it ------------------------------------------------------------------------------


def test_both_readers_know_the_same_flags() -> None:
    typers = {each.name: each for each in get_command(app).commands["doctor"].params}  # type: ignore[attr-defined]
    ours = {each.name: each.default for each in fields(DoctorFlags)}
    assert set(typers) == {"paths", *ours}
    for name, default in ours.items():
        assert typers[name].is_flag is isinstance(default, bool)
        assert typers[name].multiple is isinstance(default, tuple)
        assert typers[name].opts == [f"--{name.replace('_', '-')}"]
    assert inspect.signature(doctor_options.doctor).parameters["output_format"].default == DoctorFlags().output_format


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "a.py b.py",
        "a.py --strict b.py",
        "- --stdin-filename x.py",
        "--select MB1 --select MB2,MB3 --ignore=MB105 .",
        "--output-format json --diff",
        "--output-format=json --output-format github",
        "--explain MB105 --show-window",
        "--rewrite -- --strict -x",
        "--exclude= a",
    ],
)
def test_both_readers_read_the_same(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[tuple[Sequence[str], DoctorFlags]]()

    def record(paths: Sequence[str], flags: DoctorFlags) -> int:
        given.append((tuple(paths), flags))
        return 0

    monkeypatch.setattr("microbatch.cli.doctor_command.run_doctor", record)
    assert invoke(*arguments.split()).exit_code == 0
    assert given == [read_arguments(arguments.split())]


@pytest.mark.parametrize("arguments", ["--help", "a.py --selct x", "--select", "--strict=yes", "-x", "--diff --hel"])
def test_help_and_mistakes_are_left_to_typer(arguments: str) -> None:
    assert read_arguments(arguments.split()) is None


def test_the_hook_is_this_command() -> None:
    text = (ROOT / ".pre-commit-hooks.yaml").read_text()
    hook = dict(line[2:].split(": ", 1) for line in text.splitlines())
    assert hook["id"] == "microbatch-doctor"
    assert hook["language"] == "python"
    assert hook["types_or"] == "[python, jupyter]"
    program, *arguments = hook["entry"].split()
    assert (program, arguments) == ("microbatch", ["doctor"])
    assert read_arguments([*arguments[1:], "a.py", "b.ipynb"]) == (("a.py", "b.ipynb"), DoctorFlags())
