"""What the doctor reads: any encoding, notebooks, broken files. What cannot be read is a finding, never a traceback."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from microbatch.linting.doctor import doctor
from microbatch.linting.finding import Finding
from microbatch.linting.notebooks import as_python
from microbatch.linting.sources import LARGEST, Source, read_bytes, read_file, read_text, source_of

LOOP = "for x in loader:\n    loss = f(x)\n    loss.backward()\n"


def read(source: Source | Finding) -> Source:
    assert isinstance(source, Source)
    return source


def unread(source: Source | Finding) -> Finding:
    """The finding of a source that cannot be read, or cannot be parsed."""
    found = source.tree if isinstance(source, Source) else source
    assert isinstance(found, Finding)
    assert (found.rule, found.confidence) == ("MB000", "note")
    assert found.message.startswith("cannot be read: ")
    return found


def notebook(*cells: str | list[str], version: int = 4, **extra: Any) -> str:
    key = "source" if version == 4 else "input"
    code = [{"cell_type": "code", key: cell} for cell in cells]
    markdown = {"cell_type": "markdown", "source": ["# %time no code"]}
    both = [markdown, *code]
    content = {"cells": both} if version == 4 else {"worksheets": [{"cells": both}]}
    return json.dumps({**content, "nbformat": version, **extra})


# -- scripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfx = 1\n", "x = 1\n"),
        (b"# coding: latin-1\nx = '\xe9'\n", "# coding: latin-1\nx = 'é'\n"),
        ("# -*- coding: cp1251 -*-\nx = 'ж'\n".encode("cp1251"), "# -*- coding: cp1251 -*-\nx = 'ж'\n"),
        (b"x = 1\r\ny = 2\r\n", "x = 1\ny = 2\n"),
        (b"x = 1\ry = 2\r", "x = 1\ny = 2\n"),
        (b"x = '\x0c'\nif x:\n\x0c\n    y = 1\n", "x = '\x0c'\nif x:\n\x0c\n    y = 1\n"),
        (b"", ""),
    ],
)
def test_a_file_is_read_as_python_reads_it(tmp_path: Path, data: bytes, text: str) -> None:
    file = tmp_path / "script.py"
    file.write_bytes(data)
    source = read(read_file(file))
    assert source.text == text
    assert not isinstance(source.tree, Finding)
    assert source.newline == ("\r\n" if b"\r\n" in data else "\n")


@pytest.mark.parametrize(
    ("data", "line", "words"),
    [
        (b"x = 1\ny = '\xe9'\n", 2, "0xe9 is not utf-8"),
        (b"# coding: klingon\n", 1, "unknown encoding"),
        (b"# coding: rot13\n", 1, "rot13"),
        (b"# coding: undefined\nx\n", 1, "undefined"),
        ("x = 1\n".encode("utf-16"), 1, "UTF-8"),
        (b"x = 1\ny = \x00\n", 2, "'\\x00'"),
        (b"\x7fELF\x02\x01\x01\x00\x00", 1, "it is not Python"),
        (b"x = 1\nfor in:\n", 2, "invalid syntax"),
        (b"def f():\nx = 1\n", 2, "expected an indented block"),
        (b"print 'two'\n", 1, "Missing parentheses"),
        (b"x = (1,\n", 1, "was never closed"),
    ],
)
def test_a_file_that_is_no_python_is_one_finding_with_the_line(data: bytes, line: int, words: str) -> None:
    found = unread(read_bytes(data, path="a.py"))
    assert found.line == line
    assert words in found.message
    assert found.path == "a.py"


@pytest.mark.parametrize(
    "text",
    [
        "x = '\ud800'\n",
        "x = " + "(" * 5_000 + ")" * 5_000,
        "x = " + "-" * 100_000 + "1",
        "x = " + "[" * 90 + "]" * 90 + "\n" + "x" + ".a" * 100_000,
        "x = 1" + " + 1" * 100_000,
        "x = " + "not " * 100_000 + "1",
        "f" + "()" * 100_000,
        "\n".join(" " * depth + "if x:" for depth in range(200)),
    ],
    ids=["surrogate", "brackets", "signs", "attributes", "sum", "not", "calls", "blocks"],
)
def test_text_that_python_itself_cannot_parse_is_a_finding(text: str) -> None:
    unread(read_text(text))


def test_a_source_that_can_be_read_is_no_finding() -> None:
    assert not isinstance(read(read_text(LOOP)).tree, Finding)
    assert not isinstance(read(read_text("x = " + "(" * 50 + "1" + ")" * 50)).tree, Finding)


def test_what_is_no_file_is_a_finding(tmp_path: Path) -> None:
    assert "no such file" in unread(read_file(tmp_path / "none.py")).message.lower()
    assert "it is a folder" in unread(read_file(tmp_path)).message
    assert "no regular file" in unread(read_file(Path("/dev/zero"))).message
    unread(read_file(Path("a" * 5_000)))
    unread(read_file(Path("nul\0l.py")))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "data.py"
    file.write_bytes(b"#" * (LARGEST + 1))
    assert "larger than 5 MB" in unread(read_file(file)).message
    file.write_bytes(b"#" * LARGEST)
    read(read_file(file))


@pytest.mark.parametrize(("text", "may"), [(LOOP, True), ("x = 1\n", False), ("def training_step(self): ...", True)])
def test_most_files_are_told_apart_by_a_look_at_their_words(text: str, may: bool) -> None:
    assert read(read_text(text)).can_accumulate is may


def test_text_and_paths_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(LOOP)
    assert read(source_of(file)).text == LOOP
    assert read(source_of(str(file))).path == file.as_posix()
    assert read(source_of(LOOP)).path == "<source>"
    assert read(source_of("loss.backward()")).text == "loss.backward()"
    assert read(source_of("")).text == ""
    assert "no such file" in unread(source_of("gone.py")).message.lower()
    read(source_of("x" * 10_000))


def test_a_column_is_counted_in_characters() -> None:
    source = read(read_text("é = 'ß'; loss.backward()\n"))
    offset = "é = 'ß'; ".encode()
    assert source.column(1, len(offset)) == 10
    assert source.column(9, 3) == 4


# -- notebooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 4])
def test_the_code_cells_of_a_notebook_are_one_source(version: int) -> None:
    text = notebook("import torch\nx = 1", ["for x in y:\n", "    loss.backward()\n"], "z = 2", version=version)
    source = read(read_text(text, path="a.ipynb"))
    assert not isinstance(source.tree, Finding)
    assert source.lines == ["import torch", "x = 1", "for x in y:", "    loss.backward()", "", "z = 2"]
    assert [source.place(line) for line in range(1, 7)] == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 1)]
    assert [source.line_of(*source.place(line)) for line in range(1, 7)] == [*range(1, 7)]


def test_a_line_of_a_script_is_its_own_place() -> None:
    source = read(read_text(LOOP))
    assert source.place(3) == (None, 3)
    assert source.line_of(None, 3) == 3


@pytest.mark.parametrize(
    ("cell", "python"),
    [
        ("%matplotlib inline\nx = 1", "pass\nx = 1"),
        ("if a:\n    !pip install torch\nx = 1", "if a:\n    pass\nx = 1"),
        ("!pip install \\\n  torch \\\n  numpy\nx = 1", "pass\n\n\nx = 1"),
        ("%%time\nx = 1", "\nx = 1"),
        ("%%time\n%load_ext a\nx = 1", "\npass\nx = 1"),
        ("\n%%bash\nfor x in y; do\n  echo\ndone", "\n\n\n\n"),
        ("%%html", ""),
        ("files = !ls *.py\nx = 1", "files = None\nx = 1"),
        ("t = %timeit -o f(x)", "t = None"),
        ("torch.nn.Linear?\nx = 1", "pass\nx = 1"),
        ("?torch\nmodel??", "pass\npass"),
        # What is Python is left as it is.
        ("x = (a\n     % b)", "x = (a\n     % b)"),
        ("s = '''\n%time\n'''", "s = '''\n%time\n'''"),
        ("await f(x)", "await f(x)"),
    ],
)
def test_the_commands_of_a_notebook_are_no_python(cell: str, python: str) -> None:
    assert as_python(cell) == python
    assert len(as_python(cell).split("\n")) == len(cell.split("\n"))


def test_a_cell_of_commands_alone_ends_soon() -> None:
    assert set(as_python("%%time\n" * 3_000).split("\n")) == {"", "pass"}


def test_a_broken_cell_is_named_and_the_others_are_judged(tmp_path: Path) -> None:
    file = tmp_path / "a.ipynb"
    step = "    if i % 4 == 0:\n        optimizer.step()\n        optimizer.zero_grad()"
    loop = f"for i, (x, y) in enumerate(loader):\n    (F.mse_loss(net(x), y) / 4).backward()\n{step}"
    file.write_text(notebook("net = Net()", "z = 3\nfor in:", loop))
    found = doctor(file)
    assert [(each.rule, each.cell, each.line) for each in found] == [("MB000", 2, 2), ("MB105", 3, 4)]
    assert found[0].message.endswith("invalid syntax; the other cells are read without this one")
    source = read(read_file(file))
    assert isinstance(source.tree, ast.Module)
    assert source.place(source.tree.body[-1].lineno) == (3, 1)


def test_a_notebook_of_broken_cells_is_a_finding() -> None:
    found = unread(read_text(notebook("x = ", "z = 3\nfor in:"), path="a.ipynb"))
    assert (found.cell, found.line) == (1, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{'cells': []}", "it is not JSON"),
        ('{"cells": [\n{"cell_type"', "it is not JSON"),
        ("[]", "not an object"),
        ("{}", "no list of cells"),
        ('{"cells": {"a": 1}}', "no list of cells"),
        ('{"cells": [{"cell_type": "code", "source": 3}]}', "code cell 1 is not text"),
        ('{"cells": [{"cell_type": "code", "source": ["a", null]}]}', "code cell 1 is not text"),
        ("[" * 100_000, "JSON"),
        ('{"cells": ' + "1" * 5_000 + "}", "JSON"),
        ("", "it is not JSON"),
    ],
)
def test_a_broken_notebook_is_a_finding(text: str, words: str) -> None:
    assert words in unread(read_text(text, path="a.ipynb")).message


@pytest.mark.parametrize("cells", [[None, 3, "text", {"cell_type": "code"}], [{"cell_type": 7}]])
def test_odd_cells_are_no_code(cells: list[Any]) -> None:
    assert read(read_text(json.dumps({"cells": cells}), path="a.ipynb")).text == ""


def test_a_notebook_in_another_language_is_not_judged() -> None:
    text = notebook("for x in 1:3; end", metadata={"kernelspec": {"language": "julia"}})
    assert read(read_text(text, path="a.ipynb")).text == ""
    python = notebook("x = 1", metadata={"kernelspec": {"language": "python"}})
    assert read(read_text(python, path="a.ipynb")).text == "x = 1"
