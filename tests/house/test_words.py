"""Our own words, plain docstrings, and one base name for one file.

What others call chunks, mini-batches or accumulation steps has another name here.
"""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "microbatch"
FOREIGN = re.compile(r"chunk|mini[ _-]?batch|accumulat(?:e|ion|ing)[ _-]?steps?\b|micro[ _-]batch", re.IGNORECASE)
# Where one of them may stand, and why: {("room/file.py", "the word as written"): "reason"}.
ALLOWED: dict[tuple[str, str], str] = (
    {
        ("step/options.py", word): "the name of another library's option, which an error answers with our name"
        for word in ("micro_batch", "mini_batch", "accumulation_steps")
    }
    | {
        (f"integrations/{file}.py", "accumulation_steps"): "the name of a framework's own option"
        for file in ("accelerate", "sentence_transformers", "transformers", "packed_batches", "trl")
    }
    | {
        (
            f"linting/rules/{family}_rules.py",
            "accumulation_steps",
        ): "the name of a framework's own option, in a loop for it"
        for family in ("weight", "schedule")
    }
    | {
        (f"linting/{file}.py", word): "what the loops that the doctor reads call theirs"
        for file, words in {
            "guesses": ("chunk", "micro_batch"),
            "judge_loss": ("chunk",),
            "judge_weights": ("accumulation_steps",),
            "module": ("accumulation_steps",),
            "training_objects": ("accumulation_steps",),
        }.items()
        for word in words
    }
)


def names(source: str) -> Iterator[str]:
    """Yield the names that source gives: what it defines, takes and assigns, not what it calls of others."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def prose(source: str) -> Iterator[str]:
    """Yield what source says in words: its comments, docstrings and texts, flags of the command line among them."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            yield token.string


def foreign(source: str) -> set[str]:
    """Return the foreign words in the names and the prose of source, as they are written."""
    return {match.group() for text in (*names(source), *prose(source)) for match in FOREIGN.finditer(text)}


def found() -> set[tuple[str, str]]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    return {
        (file.relative_to(PACKAGE).as_posix(), word)
        for file in files
        for word in foreign(file.read_text(encoding="utf-8")) | {m.group() for m in FOREIGN.finditer(file.stem)}
    }


def test_our_own_words_are_used() -> None:
    assert found() - set(ALLOWED) == set()


def test_no_exception_outlives_its_use() -> None:
    assert set(ALLOWED) - found() == set()


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("def split(x, chunks): ...", "chunk"),
        ("class MiniBatch: ...", "MiniBatch"),
        ("for minibatch in batch: ...", "minibatch"),
        ("self.accumulation_steps = 4", "accumulation_steps"),
        ("import rows as micro_batch", "micro_batch"),
        ("flag = '--accumulation-steps'", "accumulation-steps"),
        ("x = 1  # one mini-batch", "mini-batch"),
        ("def f():\n    '''Take gradient accumulation steps.'''", "accumulation steps"),
        ("f'{size} chunks'", "chunk"),
    ],
)
def test_a_foreign_word_is_seen(source: str, word: str) -> None:
    assert word in foreign(source)


@pytest.mark.parametrize("source", ["first, second = x.chunk(2)", "microbatches = cut(batch, microbatch_size)"])
def test_what_others_call_theirs_is_theirs(source: str) -> None:
    assert foreign(source) == set()


# -- plain docstrings -------------------------------------------------------------------------------------------------

# The rooms whose docstrings are held to plain words so far.
PLAIN_ROOMS = ("batch", "loss", "gradients", "ranks", "memory", "step")
ARCHAIC = re.compile(r"(?:Say|Tell|Learn|Come|Let|Give back|Look)\b")
FIRST_LINE_WORDS = 25
SENTENCE_WORDS = 32
HEADING = re.compile(r"[A-Z][a-z]+:")
ENTRIES = {"Args:", "Attributes:", "Raises:"}  # each entry begins with a name at one level of indentation


def docstrings(source: str) -> Iterator[str]:
    """Yield every docstring of a module: its own, and those of its classes and functions, private ones included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def paragraphs(docstring: str) -> Iterator[str]:
    """Yield each paragraph of a docstring, and each entry of its Args, Attributes and Raises; no code, no formulas."""
    heading, lines = "", list[str]()
    for line in [*docstring.splitlines(), ""]:
        indent = len(line) - len(line.lstrip())
        begins = not line or HEADING.fullmatch(line) or (heading in ENTRIES and indent == 4)
        if begins and lines:
            yield " ".join(lines)
            lines = []
        if HEADING.fullmatch(line):
            heading = line
        elif line and heading != "Example:" and not (indent and not heading):
            lines.append(re.sub(r"^\s*\w+: ", "", line) if begins else line.strip())


def words(sentence: str) -> int:
    """Count the words of a sentence; a piece of code is one word, and a dash is none."""
    plain = re.sub(r"``.+?``|`.+?`", "code", sentence)
    return sum(any(letter.isalnum() for letter in word) for word in plain.split())


def sentences(docstring: str) -> Iterator[str]:
    for paragraph in paragraphs(docstring):
        yield from re.split(r"(?<=[.!?])\s+(?=[A-Z`0-9(])", paragraph)


def archaic(source: str) -> list[str]:
    """Return the first lines of docstrings that begin with a word that does not say what the code does."""
    return [line for text in docstrings(source) if ARCHAIC.match(line := text.splitlines()[0])]


def long_first_lines(source: str) -> list[str]:
    return [line for text in docstrings(source) if words(line := text.splitlines()[0]) > FIRST_LINE_WORDS]


def long_sentences(source: str) -> list[str]:
    return [each for text in docstrings(source) for each in sentences(text) if words(each) > SENTENCE_WORDS]


@pytest.fixture(params=PLAIN_ROOMS)
def room(request: pytest.FixtureRequest) -> dict[str, str]:
    """The source of every file of a room, by its path in the package."""
    files = sorted((PACKAGE / request.param).rglob("*.py"))
    assert files
    return {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_no_docstring_begins_with_an_archaic_word(room: dict[str, str]) -> None:
    assert {path: lines for path, source in room.items() if (lines := archaic(source))} == {}


def test_first_lines_are_short(room: dict[str, str]) -> None:
    assert {path: lines for path, source in room.items() if (lines := long_first_lines(source))} == {}


def test_sentences_are_short(room: dict[str, str]) -> None:
    assert {path: lines for path, source in room.items() if (lines := long_sentences(source))} == {}


@pytest.mark.parametrize(
    "line",
    ["Say which rows come next.", "Come to the end of backward.", "Let it run.", "Give back the sum.", "Look away."],
)
@pytest.mark.parametrize(
    "source", ['"""{}"""', 'class C:\n    """{}"""', 'class C:\n    def _f(self):\n        """{}"""']
)
def test_an_archaic_word_is_seen(source: str, line: str) -> None:
    assert archaic(source.format(line)) == [line]


@pytest.mark.parametrize("line", ["Compute the sum.", "Letters of a text.", "Give each rank the same seed."])
def test_a_plain_first_line_is_left_alone(line: str) -> None:
    assert archaic(f'"""{line}"""') == []


def test_a_long_first_line_is_seen() -> None:
    line = "Sum " + "of a " * 12
    assert long_first_lines(f'"""{line}x."""') == [f"{line}x."]
    assert long_first_lines(f'"""{line}."""') == []


LONG = " ".join(["word"] * 33)


@pytest.mark.parametrize(
    "text",
    [
        "Sum rows.\n\n{}.",
        "Sum rows.\n\nA short one. {}. Another one.",
        "Sum rows.\n\nArgs:\n    x: Shape `a`.\n    y: {}.",
        "Sum rows.\n\nReturns:\n    {}.",
        "Sum rows.\n\nCost:\n    One read.\n    {}.",
    ],
)
def test_a_long_sentence_is_seen(text: str) -> None:
    assert [words(each) for each in long_sentences(f'"""{text.format(LONG.capitalize())}"""')] == [33]
    assert long_sentences(f'"""{text.format(LONG.removeprefix("word ").capitalize())}"""') == []


@pytest.mark.parametrize(
    "text",
    [
        "Sum rows.\n\n    {}\n\nof the batch.",  # a formula
        "Sum rows.\n\nExample:\n    >>> {}\n",
        "Sum rows.\n\nUse ``{}``.",
        "Sum rows.\n\nArgs:\n    x: Rows of a batch.\n" + "    y: Rows of a batch.\n" * 12,
    ],
)
def test_code_and_entries_are_not_one_sentence(text: str) -> None:
    assert long_sentences(f'"""{text.format(LONG)}"""') == []


# -- plain texts ------------------------------------------------------------------------------------------------------

# Errors, warnings and help: longer than in docstrings, because a field may hold several words.
TEXT_WORDS = 35


def texts(source: str) -> Iterator[str]:
    """Yield every text of a module that is no docstring, with each field of an f-string as one word."""
    tree = ast.parse(source)
    skipped = {
        id(each)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr | ast.JoinedStr)
        for each in ([node.value] if isinstance(node, ast.Expr) else node.values)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [each.value if isinstance(each, ast.Constant) else "{field}" for each in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def long_texts(source: str) -> list[str]:
    """Return the sentences of texts that are too long; the lines of a program in a text are one sentence each."""
    found = (each for text in texts(source) for each in re.split(r"(?<=[.!?])\s+|\n", text))
    return [each for each in found if words(each) > TEXT_WORDS]


def test_errors_warnings_and_help_are_short() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    found = {file.relative_to(PACKAGE).as_posix(): long_texts(file.read_text(encoding="utf-8")) for file in files}
    assert found
    assert {path: lines for path, lines in found.items() if lines} == {}


# A file, a rank or an option does not speak. The texts of `linting` are not held yet.
OLD_WORDS = re.compile(
    r"(?<!scikit-)\b(?:says?|said|tells?|told|learns?|(?:come|comes|came) to(?! a halt)|one's|whom|as ever|likewise|"
    r"nobody)\b"
)


def old_words(source: str) -> list[str]:
    """Return the texts of several words that have an old word, from the word on."""
    plain = (re.sub(r"<[^>]*>", "", text) for text in texts(source) if " " in text)
    return [text[each.start() :] for text in plain for each in OLD_WORDS.finditer(text)]


def test_errors_warnings_and_help_have_no_old_words() -> None:
    files = sorted(file for file in PACKAGE.rglob("*.py") if file.parts[len(PACKAGE.parts)] != "linting")
    found = {file.relative_to(PACKAGE).as_posix(): old_words(file.read_text(encoding="utf-8")) for file in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize("text", ["the file says so", "nothing to learn from", "did not come to an end", "it is told"])
def test_an_old_word_is_seen(text: str) -> None:
    assert len(old_words(f"raise ValueError(f'{{x}}: {text}')")) == 1


@pytest.mark.parametrize("source", ["x = 'say'", "'the learning rate'", "'it came to a halt'", "x = 1  # it says so"])
def test_what_is_no_old_word_is_left_alone(source: str) -> None:
    assert old_words(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError('{}')",
        "raise ValueError(f'{{x}} {}')",
        "raise ValueError('a ' f'{{x}}. A {}')",
        "HELP = {{'key': 'A short one. A {}'}}",
    ],
)
def test_a_long_text_is_seen(source: str) -> None:
    assert len(long_texts(source.format(" ".join(["word"] * 36)))) == 1
    assert long_texts(source.format(" ".join(["word"] * 33))) == []


def test_a_docstring_is_no_text() -> None:
    assert long_texts(f'"""{" ".join(["word"] * 40)}."""') == []


# -- one base name, one file ------------------------------------------------------------------------------------------

# Rooms whose files may, for now, be named like a file elsewhere.
NOT_YET_UNIQUE: frozenset[str] = frozenset()


def shared_base_names(files: Iterable[PurePath]) -> dict[str, list[str]]:
    """Return the base names that several files of the package have, each with its files; `__init__.py` aside."""
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        if file.name != "__init__.py" and file.parts[0] not in NOT_YET_UNIQUE:
            by_name[file.name].append(file.as_posix())
    return {name: paths for name, paths in by_name.items() if len(paths) > 1}


def test_one_base_name_stands_for_one_file() -> None:
    files = [file.relative_to(PACKAGE) for file in sorted(PACKAGE.rglob("*.py"))]
    assert files
    assert shared_base_names(files) == {}


def test_a_shared_base_name_is_seen() -> None:
    files = ["step/__init__.py", "loss/__init__.py", "loss/plan.py", "step/window.py", "engines/deep/window.py"]
    assert shared_base_names(map(PurePath, files)) == {"window.py": ["step/window.py", "engines/deep/window.py"]}
