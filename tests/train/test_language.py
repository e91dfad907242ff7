"""The job `language`: real text in, the same tokens every time, a gradient that does not depend on the cut."""

import ast
import json
import logging
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from microbatch.errors import DataError, MissingDependencyError
from microbatch.train.job import Job
from microbatch.train.jobs import BUILT_IN, cache, text
from microbatch.train.jobs.cache import load_corpus, write_corpus
from microbatch.train.jobs.corpus import Corpus, Cut, Pieces, build_corpus, unigram_loss
from microbatch.train.jobs.language import language, next_token_loss, pad_pieces, write_text
from microbatch.train.jobs.transformer import Shape, Transformer
from microbatch.train.jobs.vocabulary import BOUNDARY, open_tokenizer

LIBRARY = Path(sysconfig.get_path("stdlib"))
SMALL = Cut(vocabulary_size=400, length=32, held_out=20)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to gain from threads, and lose much where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real modules of the standard library in a folder of their own."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("bisect.py", "heapq.py", "textwrap.py", "json/decoder.py", "json/encoder.py"):
        shutil.copy(LIBRARY / name, folder / Path(name).name)
    return folder


@pytest.fixture(scope="module")
def documents(sources: Path) -> list[str]:
    return text.read_documents(text.find_files(sources))


@pytest.fixture(scope="module")
def corpus(documents: list[str]) -> Corpus:
    return build_corpus(documents, cut=SMALL)


@pytest.fixture(scope="module")
def job(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return language(data=sources, cache=tmp_path_factory.mktemp("cache"))


def small_model(corpus: Corpus, *, dtype: torch.dtype = torch.float64) -> Transformer:
    shape = Shape(vocabulary=corpus.vocabulary_size, length=SMALL.length, layers=2, heads=2, channels=32)
    return Transformer(shape).to(dtype)


def gradients(model: nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ------------------------------------------------------------------------------------------------------ documents


def test_the_library_is_read_without_its_tests() -> None:
    files = text.find_files(None)
    names = [path.relative_to(LIBRARY).as_posix() for path in files]
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages", "idlelib"} & set(name.split("/"))]
    assert names == sorted(names)


def test_documents_are_functions_and_classes_of_different_lengths(documents: list[str]) -> None:
    kinds = {type(ast.parse(document).body[0]).__name__ for document in documents}
    assert kinds == {"FunctionDef", "ClassDef"}
    assert len(documents) == len(set(documents)) > 40
    lengths = sorted(map(len, documents))
    assert lengths[-1] > 10 * lengths[len(lengths) // 4]


def test_a_long_class_is_read_as_its_methods() -> None:
    body = "".join(f"    @staticmethod\n    def f{i}():\n        return {'x' * 300!r}\n\n" for i in range(4))
    found = list(text.code_documents(f"class Long:\n{body}\nasync def g(): pass\n"))
    assert [document.split("\n")[:2] for document in found[:4]] == [["@staticmethod", f"def f{i}():"] for i in range(4)]
    assert found[4:] == ["async def g(): pass"]


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Ä first passage.\r\n".encode("utf-8-sig"))
    (tmp_path / "b.md").write_text("# Title\n\n" + "long " * 60 + "\n\nEnd.", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n', encoding="utf-8")
    (tmp_path / "d.py").write_text("print 'Python 2'\n", encoding="utf-8")
    (tmp_path / "e.py").write_bytes(b"# -*- coding: latin-1 -*-\ndef f(): return '\xe4'\n")
    (tmp_path / ".hidden.txt").write_text("not this", encoding="utf-8")
    (tmp_path / "f.csv").write_text("nor this", encoding="utf-8")
    found = text.read_documents(text.find_files(tmp_path))
    prose = "# Title\n\n" + ("long " * 60).rstrip()
    assert found == ["Ä first passage.", prose, "End.", "one", "two", "print 'Python 2'", "def f(): return 'ä'"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"1,2", r"a\.csv ends in '\.csv'.*\.jsonl, \.md, \.py or \.txt"),
        ("a.txt", b" \n\n \n", r"a\.txt.*nothing but blanks"),
        ("a.txt", b"only one", r"1 document found, and one must be held out"),
        ("a.txt", b"caf\xe9", r"a\.txt is not utf-8.* text .*convert it to UTF-8"),
        ("a.py", b"# coding: nonsense\n", r"a\.py is not .* text .*nonsense"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'\n{"body": "x"}\n', r'a\.jsonl, line 2 has no string under "text"'),
        ("a.jsonl", b'["text"]\n', r'a\.jsonl, line 1 has no string under "text"'),
    ],
)
def test_text_that_cannot_be_used_is_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        language(data=tmp_path / name, cache=tmp_path / "cache")


def test_a_path_without_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder .*nowhere"):
        language(data=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"the folder .* holds no \.jsonl, \.md, \.py or \.txt file"):
        language(data=tmp_path)


def test_a_missing_library_says_what_to_install(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "microbatch\[jobs\]"'):
        language(data=sources)


# --------------------------------------------------------------------------------------------------------- tokens


@settings(max_examples=25)
@given(texts=st.lists(st.text(min_size=1, max_size=80), min_size=2, max_size=12, unique=True), length=st.integers(1, 9))
def test_pieces_hold_every_document_whole(texts: list[str], length: int) -> None:
    texts[0] += "<|document|>"  # the boundary's spelling in a text is not a boundary
    corpus = build_corpus(texts, cut=Cut(vocabulary_size=300, length=length, held_out=3))
    tokenizer = open_tokenizer(corpus.vocabulary)
    read: list[str] = []
    for pieces in (corpus.train, corpus.validation):
        document: list[int] = []
        for index in range(len(pieces)):
            piece = pieces[index]["tokens"].tolist()
            assert 2 <= len(piece) <= length + 1
            assert document[-1:] in ([], piece[:1])  # a later piece begins with what the one before it ended with
            document += piece[1:] if document else piece
            if document[-1] == BOUNDARY:
                assert BOUNDARY not in document[1:-1]
                read.append(tokenizer.decode(document[1:-1]))
                document = []
        assert document == []
    assert sorted(read) == sorted(texts)


def test_held_out_documents_are_few_and_do_not_depend_on_order(documents: list[str]) -> None:
    def held_out(texts: list[str]) -> list[str]:
        found = build_corpus(texts, cut=Cut(vocabulary_size=400, length=100_000))
        tokenizer = open_tokenizer(found.vocabulary)
        every = [
            [tokenizer.decode(pieces[i]["tokens"].tolist()[1:-1]) for i in range(len(pieces))]
            for pieces in (found.validation, found.train)
        ]
        assert sorted(every[0] + every[1]) == sorted(texts)
        return every[0]

    first = held_out(documents)
    assert len(first) == len(documents) // 20
    assert set(held_out(documents[::-1])) == set(first)


def test_an_index_outside_is_refused(corpus: Corpus) -> None:
    assert torch.equal(corpus.train[-1]["tokens"], corpus.train[len(corpus.train) - 1]["tokens"])
    for index in (len(corpus.train), -len(corpus.train) - 1):
        with pytest.raises(IndexError, match="there is no piece"):
            corpus.train[index]


def test_the_unigram_loss_is_the_mean_over_predicted_tokens(corpus: Corpus) -> None:
    counts = torch.ones(corpus.vocabulary_size, dtype=torch.float64)
    for index in range(len(corpus.train)):
        for token in corpus.train[index]["tokens"][1:].tolist():
            counts[token] += 1
    scores = (counts / counts.sum()).log()
    losses = [-scores[corpus.validation[i]["tokens"][1:]] for i in range(len(corpus.validation))]
    assert unigram_loss(corpus) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-12)


# ---------------------------------------------------------------------------------------------------------- cache


def same(first: Corpus, second: Corpus) -> bool:
    parts = [(one.train, two.train) for one, two in [(first, second)]] + [(first.validation, second.validation)]
    tensors = all(torch.equal(a.tokens, b.tokens) and torch.equal(a.ends, b.ends) for a, b in parts)
    return tensors and first.vocabulary == second.vocabulary


def test_the_second_run_reads_the_cache(sources: Path, tmp_path: Path) -> None:
    files = text.find_files(sources)
    built = load_corpus(files, cut=SMALL, folder=tmp_path)
    (stored,) = tmp_path.iterdir()  # one file, nothing temporary left
    assert same(load_corpus(files, cut=SMALL, folder=tmp_path), built)
    changed = Corpus(vocabulary=built.vocabulary, train=built.validation, validation=built.train)
    write_corpus(changed, stored)
    assert same(load_corpus(files, cut=SMALL, folder=tmp_path), changed)
    assert not same(changed, built)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_cache_is_built_again(
    damage: str, sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = text.find_files(sources)
    built = load_corpus(files, cut=SMALL, folder=tmp_path)
    (stored,) = tmp_path.iterdir()
    whole = stored.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    stored.write_bytes({"flipped": flipped, "cut": whole[:-1], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert same(load_corpus(files, cut=SMALL, folder=tmp_path), built)
    assert f"{stored} is damaged" in caplog.text
    caplog.clear()
    assert same(load_corpus(files, cut=SMALL, folder=tmp_path), built)
    assert caplog.text == ""


def test_other_text_and_other_settings_are_other_files(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    for content, cut in [("one\n\ntwo", SMALL), ("one\n\ntoo", SMALL), ("one\n\ntoo", Cut(length=9))]:
        source.write_text(content * 200, encoding="utf-8")
        load_corpus([source], cut=cut, folder=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_cache_that_cannot_be_written_costs_time_only(
    sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, corpus: Corpus
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert same(load_corpus(text.find_files(sources), cut=SMALL, folder=tmp_path / "file"), corpus)
    assert "could not be kept" in caplog.text


def test_the_cache_lies_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "microbatch"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.default_folder() == tmp_path / "home" / ".cache" / "microbatch"


# ------------------------------------------------------------------------------------------------ model and loss


def test_a_batch_holds_every_piece_once() -> None:
    rows = [[0, 5], [0, 1, 2, 3], [0, 9, 8]]
    batch = pad_pieces([{"tokens": torch.tensor(row)} for row in rows])
    assert batch["tokens"].tolist() == [[0, 0, 0], [0, 1, 2], [0, 9, 0]]
    assert batch["labels"].tolist() == [[5, -100, -100], [1, 2, 3], [9, 8, -100]]


def test_the_loss_is_every_row_alone(corpus: Corpus) -> None:
    model = small_model(corpus)
    pieces = [corpus.train[i] for i in range(7)]
    alone = [piece["tokens"] for piece in pieces]
    total = sum(F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum").item() for row in alone)
    loss = next_token_loss(model, pad_pieces(pieces))
    assert int(loss.count) == sum(len(piece["tokens"]) - 1 for piece in pieces)
    assert loss.sum.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("microbatch_size", [1, 3, 8, 12])
def test_the_gradient_does_not_depend_on_the_cut(microbatch_size: int, corpus: Corpus) -> None:
    model = small_model(corpus)
    shortest = sorted(range(len(corpus.train)), key=lambda i: len(corpus.train[i]["tokens"]))[:6]
    batch = pad_pieces([corpus.train[i] for i in (*shortest, *range(6))])
    whole = next_token_loss(model, batch)
    (whole.sum / whole.count).backward()
    wanted = gradients(model)

    means: list[Tensor] = []
    count = 0
    starts = range(0, 12, microbatch_size)
    for start in starts:
        loss = next_token_loss(model, {key: value[start : start + microbatch_size] for key, value in batch.items()})
        loss.sum.backward(retain_graph=True)
        count += int(loss.count)
        means.append(loss.sum / loss.count)
    assert relative(gradients(model) / count, wanted) < 1e-12
    if len(starts) > 1:  # the usual recipe, a mean of means, is not the batch's gradient
        torch.stack(means).mean().backward()
        assert relative(gradients(model), wanted) > 0.05


def test_no_token_sees_a_later_one(corpus: Corpus) -> None:
    model = small_model(corpus)
    tokens = torch.randint(corpus.vocabulary_size, (1, 20))
    other = tokens.clone()
    other[0, 12:] = torch.randint(corpus.vocabulary_size, (8,))
    first, second = model(tokens), model(other)
    assert torch.equal(first[0, :12], second[0, :12])
    assert not torch.allclose(first[0, 12:], second[0, 12:])


def test_the_model_knows_where_a_token_is(corpus: Corpus) -> None:
    model = small_model(corpus)
    first = model(torch.tensor([[5, 6, 7]]))[0, -1]
    swapped = model(torch.tensor([[6, 5, 7]]))[0, -1]
    assert not torch.allclose(first, swapped)


def test_it_learns_from_context() -> None:
    files = [LIBRARY / name for name in ("argparse.py", "ast.py", "difflib.py", "inspect.py", "tarfile.py")]
    corpus = build_corpus(text.read_documents(files), cut=SMALL)
    model = Transformer(Shape(vocabulary=corpus.vocabulary_size, length=SMALL.length, layers=2, heads=2, channels=64))
    held_out = pad_pieces([corpus.validation[i] for i in range(len(corpus.validation))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = next_token_loss(model, held_out).mean.item()
    for rows in torch.randint(len(corpus.train), (60, 16)).tolist():
        optimizer.zero_grad()
        next_token_loss(model, pad_pieces([corpus.train[row] for row in rows])).mean.backward()
        optimizer.step()
    after = next_token_loss(model, held_out).mean.item()
    assert after < unigram_loss(corpus) - 0.2
    assert before > unigram_loss(corpus) + 0.2


# ------------------------------------------------------------------------------------------------------------ job


def test_the_job_is_the_same_every_time(sources: Path, tmp_path: Path, job: Job) -> None:
    state = torch.get_rng_state()
    again = language(data=sources, cache=tmp_path)  # its own cache: built, not read
    assert torch.equal(torch.get_rng_state(), state)
    assert again.facts == job.facts
    assert again.files == job.files
    for first, second in ((job.data, again.data), (job.validation, again.validation)):
        assert isinstance(first, Pieces)
        assert isinstance(second, Pieces)
        assert torch.equal(first.tokens, second.tokens)
    weights, others = job.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_the_seed_draws_the_weights_and_not_the_text(sources: Path, tmp_path: Path, job: Job) -> None:
    other = language(data=sources, cache=tmp_path, seed=1, batch_size=12)
    assert other.batch_size == 12
    assert other.facts == job.facts
    assert not torch.equal(next(other.model.parameters()), next(job.model.parameters()))


def test_the_first_loss_is_that_of_guessing(job: Job) -> None:
    assert job.batch_size >= 64
    batch: Any = job.collate([job.data[i] for i in range(8)])
    size = len(json.loads(job.files["vocabulary.json"])["model"]["vocab"])
    assert job.loss_fn(job.model, batch).mean.item() == pytest.approx(torch.tensor(size).log().item(), rel=0.03)


def test_every_parameter_has_one_group(job: Job) -> None:
    optimizer = job.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in job.model.parameters())
    assert [group["weight_decay"] > 0 for group in optimizer.param_groups] == [True, False]


def test_the_sample_is_the_same_every_time_and_disturbs_nothing(job: Job) -> None:
    def sample(seed: int) -> str:
        return write_text(job.model, vocabulary=job.files["vocabulary.json"], prompt="class ", seed=seed, length=20)

    state = torch.get_rng_state()
    job.model.train()
    first = sample(0)
    assert first.startswith("class ")
    assert len(first) > len("class ")
    assert sample(0) == first != sample(1)
    assert job.model.training
    assert job.show is not None
    assert job.show(job.model).startswith("def ")
    assert torch.equal(torch.get_rng_state(), state)


def test_listing_the_jobs_does_not_import_torch() -> None:
    program = "import sys; from microbatch.train.jobs import BUILT_IN; print(*BUILT_IN, 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.split() == [*BUILT_IN, "False"]
