"""The job `pairs`: docstrings and functions in, the whole batch's gradient, recall over all held-out pairs."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microbatch.errors import ConfigError, DataError, MissingDependencyError
from microbatch.train.config import load_settings
from microbatch.train.evaluate import evaluate
from microbatch.train.job import Job
from microbatch.train.jobs.dual import DualEncoder
from microbatch.train.jobs.functions import Pair, described_functions, read_pairs
from microbatch.train.jobs.pairs import TokenPairs, encode, pad_pairs, pairs, pairs_scores
from microbatch.train.resolve import resolve
from microbatch.train.rundir import RunDirectory
from microbatch.train.training_loop import TrainingLoop
from microbatch.warned import MicrobatchWarning

CPU = torch.device("cpu")
VERBS = ("open", "close", "count", "sort", "merge", "split", "read", "write")
NOUNS = ("file", "list", "table", "socket", "tree", "queue")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """This model is too small to gain from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 functions whose names and bodies use the words of their docstrings."""
    path = tmp_path_factory.mktemp("pairs") / "module.py"
    functions = [
        f'def {verb}_{noun}(it):\n    """{verb.title()} the {noun} that is given."""\n    return {noun}.{verb}(it)\n'
        for verb in VERBS
        for noun in NOUNS
    ]
    path.write_text("\n\n".join(functions), encoding="utf-8")
    return path


def trained(job: Job, folder: Path, **flags: Any) -> list[dict[str, Any]]:
    config = resolve(load_settings(flags), job, device=CPU)
    directory = RunDirectory(folder)
    directory.start(config="", files={})
    assert TrainingLoop(job, config=config, run=directory).run() is None
    return [json.loads(line) for line in directory.metrics.read_text().splitlines()]


def pick(job: Job, rows: Any) -> dict[str, Tensor]:
    return job.collate([job.data[row] for row in rows])


def rows_in(data: Any) -> int:
    assert isinstance(data, TokenPairs)
    return len(data)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# --------------------------------------------------------------------------------------------------------- reading


def test_a_function_is_its_code_without_what_is_said_of_it() -> None:
    source = '''
class A:
    @property
    def size(self):
        """Count what
        is in it.

        At most 3.
        """
        # why
        return 3

    async def wait(self) -> None:
        "Wait until it is done."
        await self.done

def said_alone():
    """Do nothing at all."""

def in_a_line(): "Do it in one line."; return 1

def name():
    """Name."""
    return 2
'''
    assert sorted(described_functions(source), key=lambda pair: pair.anchor) == [
        Pair("Count what is in it.", "def size(self):\n    # why\n    return 3"),
        Pair("Wait until it is done.", "async def wait(self) -> None:\n    await self.done"),
    ]


def test_a_text_of_two_pairs_belongs_to_neither(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [("a", "1"), ("b", "2"), ("a", "3"), ("c", "2"), ("d", "4"), ("e", "5"), ("e", "5")]
    path.write_text("\n".join(json.dumps({"anchor": a, "positive": p, "more": 1}) for a, p in rows), encoding="utf-8")
    assert read_pairs(path) == [Pair("d", "4"), Pair("e", "5")]


def test_a_table_is_read_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('positive,anchor\n"x, y",first\nz,second\n', encoding="utf-8")
    assert read_pairs(path) == [Pair("first", "x, y"), Pair("second", "z")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"anchor": "a", "positive": "b"}\n{"anchor": 3}', 'line 2 has no text under "anchor"'),
        ("a.jsonl", "[1]", 'line 1 has no text under "anchor"'),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.csv", "anchor,other\na,b\n", 'line 2 has no text under "positive"'),
        ("a.csv", 'anchor,positive\n"a,b\n', "is not CSV"),
        ("a.txt", "a", r"ends in '.txt'; pairs are read from .csv, .jsonl, .py"),
        ("a.py", "x = 1\n", "holds 0 pairs of texts that occur once; pass at least 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_as_pairs_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_pairs(tmp_path / name)


# --------------------------------------------------------------------------------------------------------- the job


def test_the_job_is_the_same_every_time(file: Path) -> None:
    state = torch.get_rng_state()
    job, again, other = pairs(data=file), pairs(data=file), pairs(data=file, seed=1, batch_size=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(flat(job.model), flat(again.model))
    assert not torch.equal(flat(job.model), flat(other.model))
    assert (job.batch_size, other.batch_size) == (512, 8)
    assert (rows_in(job.data), rows_in(job.validation)) == (44, 4)
    batch, same = pick(job, range(44)), pick(again, range(44))
    assert all(torch.equal(batch[name], same[name]) for name in batch)


def test_rows_do_not_depend_on_one_another_or_on_padding(file: Path) -> None:
    model = pairs(data=file).model
    assert isinstance(model, DualEncoder)
    model = model.double()
    rows = [{"anchor": torch.tensor(ids), "positive": torch.tensor(ids)} for ids in ([5, 6], [7, 8, 9, 10, 11])]
    together = model.anchor(pad_pairs(rows)["anchor"])
    alone = model.anchor(pad_pairs(rows[:1])["anchor"])
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-15)


def test_recall_counts_the_partner_among_all_others_and_ties_against_it() -> None:
    model = DualEncoder(vocabulary=4, channels=8, width=4)
    basis = torch.eye(12)
    found = {"anchor": basis.clone(), "positive": basis.clone()}
    found["anchor"][0] = basis[1]  # its partner ties with ten others, behind one
    found["anchor"][1] = 0.6 * basis[1] + 0.8 * basis[2]  # second
    with torch.no_grad():
        scores = {name: float(loss.mean) for name, loss in pairs_scores(model, found).items()}
    assert scores["recall@1"] == pytest.approx(10 / 12)
    assert scores["recall@10"] == pytest.approx(11 / 12)


def test_the_held_out_set_is_scored_whole_however_it_is_cut(file: Path) -> None:
    job = pairs(data=file)
    job.model.double()
    scores = [evaluate(job, microbatch_size=size, device=CPU) for size in (1, 3, 48)]
    assert scores[0] == pytest.approx(scores[2], rel=1e-12)
    assert scores[1] == pytest.approx(scores[2], rel=1e-12)
    assert scores[0].keys() == {"loss", "recall@1", "recall@10"}


def test_a_step_is_the_whole_batchs_and_the_plain_one_is_not(file: Path, tmp_path: Path) -> None:
    def weights(name: str, **flags: Any) -> Tensor:
        job = pairs(data=file, batch_size=24)
        job.model.double()
        for optimizer in [job.optimizer]:
            assert isinstance(optimizer, torch.optim.Optimizer)
            for group in optimizer.param_groups:
                group["eps"] = 1e-3  # or Adam turns the rounding of a gradient that is nearly zero into a whole step
        trained(job, tmp_path / name, batch_size=24, steps=2, warmup_steps=0, **flags)
        return flat(job.model)

    whole = weights("whole", microbatch_size=24)
    exact = weights("exact", microbatch_size=5)
    with pytest.warns(MicrobatchWarning, match="encode="):  # that is what the plain way leaves out
        plain = weights("plain", microbatch_size=5, accumulation="plain")
    assert float((exact - whole).norm() / whole.norm()) < 1e-12
    assert float((plain - whole).norm() / whole.norm()) > 1e-3


def test_plain_accumulation_is_refused_where_it_is_the_same(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    job = Job(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=lambda model, x: model(x).mean(),
        data=[torch.zeros(1)] * 4,
        batch_size=2,
        microbatch_size=1,
        steps=1,
    )
    with pytest.raises(ConfigError, match="--accumulation plain: neither this job's loss nor its model"):
        trained(job, tmp_path / "run", accumulation="plain")


def test_it_learns_to_find(file: Path, tmp_path: Path) -> None:
    job = pairs(data=file, batch_size=44)
    lines = trained(job, tmp_path / "run", batch_size=44, microbatch_size=11, steps=30, warmup_steps=2)
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    with torch.no_grad():
        found = encode(job.model, pick(job, range(44)))
    assert pairs_scores(job.model, found)["recall@1"].mean.item() > 0.9


def test_a_missing_library_is_named_without_another_job(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r'"tokenizers".*pip install "microbatch\[jobs\]"') as error:
        pairs(data=file)
    assert "language" not in str(error.value)
