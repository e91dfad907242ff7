"""The prose is executed: every Python block runs, every command exists."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
# What these show needs frameworks, which only `make test-integrations` installs; it runs their blocks.
FRAMEWORK_PAGES = {
    "accelerate.md",
    "lightning.md",
    "sentence-transformers.md",
    "trackers.md",
    "transformers-loop.md",
    "transformers.md",
    "trl.md",
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
# The loops of the doctor's rules, right and wrong, need values for their names: tests/linting runs them.
RULE_PAGES = ROOT / "docs" / "doctor"
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
SHELLS = {"console", "sh", "bash", "shell"}


def blocks(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield the language, the code and the number of the lines before it, of every fenced block."""
    for match in FENCE.finditer(text):
        yield match["language"], match["code"], text.count("\n", 0, match.start("code"))


def program(text: str) -> str:
    """Join a page's Python blocks into one program in which every line keeps its number."""
    lines: list[str] = []
    for language, code, before in blocks(text):
        if language == "python":
            lines += [""] * (before - len(lines)) + code.splitlines()
    return "\n".join(lines)


def commands(text: str) -> list[list[str]]:
    """Return the commands of a page's console blocks, as words; what a command prints is left out."""
    found: list[str] = []
    for language, code, _ in blocks(text):
        if language in SHELLS:
            lines = code.replace("\\\n", " ").splitlines()
            prompted = [line[2:] for line in lines if line.startswith("$ ")]
            found += prompted or lines
    return [words for words in (shlex.split(line, comments=True) for line in found) if words]


def refusal(words: list[str]) -> str:
    """Return why the command line does not know a command, or nothing when it does."""
    if "microbatch" in words:  # torchrun and its own flags may stand before it
        from microbatch.cli.main import app

        result = CliRunner().invoke(app, [*words[words.index("microbatch") + 1 :], "--help"])
        return "" if result.exit_code == 0 else result.output
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        named = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
        return ", ".join(sorted(named - targets))
    return ""


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in FRAMEWORK_PAGES and page.parent != RULE_PAGES],
    ids=lambda page: page.name,
)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / f"{page.stem}.py"
    file.write_text(program(page.read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(file))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists(page: Path) -> None:
    unknown = [(words, why) for words in commands(page.read_text(encoding="utf-8")) if (why := refusal(words))]
    assert unknown == []


def test_the_readme_has_both_commands_and_a_program() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {("make", "train"), ("make", "test")} <= {tuple(words) for words in commands(text)}
    assert "import microbatch as mb" in program(text)


def test_every_test_that_proves_a_claim_exists() -> None:
    text = (ROOT / "docs" / "what-goes-wrong.md").read_text(encoding="utf-8")
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    functions = set(re.findall(r"def (test_\w+)", source))
    files = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"\btest_\w+(?:\.py)?", text))
    assert named
    assert named <= functions | files


SAMPLE = """\
Words.

```python
first = 1
```

```console
$ make train ARGS="--steps 3"  # and more
what it prints
$ microbatch train language \\
    --steps 3
```

```python
assert first == 2
```
"""


def test_a_block_that_fails_is_seen_and_says_its_line(tmp_path: Path) -> None:
    file = tmp_path / "page.py"
    file.write_text(program(SAMPLE), encoding="utf-8")
    with pytest.raises(AssertionError) as failure:
        runpy.run_path(str(file))
    assert SAMPLE.splitlines()[failure.traceback[-1].lineno] == "assert first == 2"


def test_commands_are_read_whole_and_without_what_they_print() -> None:
    assert commands(SAMPLE) == [
        ["make", "train", "ARGS=--steps 3"],
        ["microbatch", "train", "language", "--steps", "3"],
    ]


@pytest.mark.parametrize(
    "command", ["make trian", "microbatch trian", "microbatch train --batchsize 3", "torchrun microbatch train --no"]
)
def test_a_command_that_does_not_exist_is_seen(command: str) -> None:
    assert refusal(command.split())
