"""sentence-transformers: every supported loss in microbatches beside the loss of the whole batch."""

import copy
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microbatch as mb

pytest.importorskip("sentence_transformers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tests.faults import RunsOut
from tests.ranks.conftest import run_ranks_
from transformers import BertConfig, BertModel
from transformers.models.bert.tokenization_bert import BertTokenizer

from microbatch.integrations.embedding_losses import EmbeddingLoss, ModelAndLoss, check_loss
from microbatch.integrations.sentence_transformers import MicrobatchSentenceTransformerTrainer as Ours

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]
ROWS, MICROBATCH = 10, 3


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder with 16 dimensions, and a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    config: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    encoder: Any = BertModel(
        BertConfig(vocab_size=len(WORDS), intermediate_size=32, max_position_embeddings=32, **config)
    )
    encoder.save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@cache
def loaded(folder: Path) -> Any:
    transformer: Any = Transformer(str(folder), max_seq_length=16)
    return SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").double()


def model_of(folder: Path, *, dropout: float = 0.0) -> Any:
    model = copy.deepcopy(loaded(folder))
    for each in model.modules():
        if isinstance(each, nn.Dropout):
            each.p = dropout
    return model.train()


def texts(column: int) -> list[str]:
    generator = torch.Generator().manual_seed(column)
    lengths = torch.randint(1, 9, (ROWS,), generator=generator)
    return [" ".join(WORDS[5 + int(i)] for i in torch.randint(16, (int(n),), generator=generator)) for n in lengths]


def batch_of(model: Any, columns: int, label: Any) -> dict[str, Any]:
    """What the collator makes of a dataset with so many columns of texts."""
    batch: dict[str, Any] = {} if label is None else {"label": label}
    for column in range(columns):
        tokens = model.preprocess(texts(column))
        batch |= {f"column_{column}_{name}": value for name, value in tokens.items()}
    return batch


def columns_of(batch: Any) -> Any:
    """As `Trainer.collect_features` does."""
    prefixes = [name.removesuffix("input_ids") for name in batch if name.endswith("_input_ids")]
    features = [{k.removeprefix(p): v for k, v in batch.items() if k.startswith(p)} for p in prefixes]
    return features, batch.get("label")


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([each.grad.flatten() for each in module.parameters() if each.grad is not None])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def of(name: str, **options: Any) -> Callable[[Any], Any]:
    return lambda model: getattr(losses, name)(model, **options)


BINARY = torch.arange(ROWS) % 2
ORDER = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2))
SCORES = torch.linspace(0, 1, ROWS, dtype=torch.float64)[ORDER]
CLASSES = torch.arange(ROWS) % 3
TEACHER = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
MNRL = "MultipleNegativesRankingLoss"
BOTH = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def gist(model: Any, *, retokenizes: bool) -> Any:
    """A guide with other weights; its tokens may be the model's."""
    guide = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
    for index, each in enumerate(guide.parameters()):
        each.data.add_(0.1 * torch.sin(torch.arange(each.numel()) + index).reshape(each.shape))
    loss = losses.GISTEmbedLoss(model, guide, temperature=0.2)
    if retokenizes:
        loss.must_retokenize, loss.tokenizer = True, model.tokenizer
        guide.preprocess = lambda texts: model.preprocess([text[::-1] for text in texts])
    return loss


CASES: dict[str, tuple[Callable[[Any], Any], int, Any]] = {
    "mnrl": (of(MNRL), 2, None),
    "mnrl with negatives": (of(MNRL, scale=5.0), 4, None),
    "mnrl in all directions": (
        of(MNRL, directions=BOTH, hardness_mode="hard_negatives", hardness_strength=2.0),
        3,
        None,
    ),
    "symmetric": (of("MultipleNegativesSymmetricRankingLoss"), 2, None),
    "cosent": (of("CoSENTLoss"), 2, SCORES),
    "angle": (of("AnglELoss"), 2, SCORES),
    "cosine": (of("CosineSimilarityLoss"), 2, SCORES),
    "contrastive": (of("ContrastiveLoss"), 2, BINARY),
    "online contrastive": (of("OnlineContrastiveLoss"), 2, BINARY),
    "triplet": (of("TripletLoss", triplet_margin=9.0), 3, None),
    "all triplets": (of("BatchAllTripletLoss"), 1, CLASSES),
    "hard triplets": (of("BatchHardTripletLoss"), 1, CLASSES),
    "hard soft triplets": (of("BatchHardSoftMarginTripletLoss"), 1, CLASSES),
    "semi-hard triplets": (of("BatchSemiHardTripletLoss"), 1, CLASSES),
    "margin mse": (of("MarginMSELoss"), 3, SCORES),
    "kl": (of("DistillKLDivLoss"), 3, torch.stack([SCORES, SCORES.flip(0)], 1)),
    "mse": (of("MSELoss"), 1, TEACHER),
    "distillation": (of("EmbedDistillLoss", projection_dim=16), 1, TEACHER),
    "softmax": (of("SoftmaxLoss", sentence_embedding_dimension=16, num_labels=3), 2, CLASSES),
    "regularization": (of("GlobalOrthogonalRegularizationLoss"), 2, None),
    "gist": (lambda m: gist(m, retokenizes=False), 2, None),
    "gist with other tokens": (lambda m: gist(m, retokenizes=True), 3, None),
    "matryoshka of gist": (lambda m: losses.MatryoshkaLoss(m, gist(m, retokenizes=False), [16, 4]), 2, None),
    "matryoshka of mnrl": (lambda m: losses.MatryoshkaLoss(m, of(MNRL)(m), [16, 8, 4]), 3, None),
    "matryoshka of cosent": (lambda m: losses.MatryoshkaLoss(m, of("CoSENTLoss")(m), [16, 4]), 2, SCORES),
}


def value_of(loss: Any, batch: Any) -> Tensor:
    found: Any = loss(*columns_of(batch))
    return torch.stack(list(found.values())).sum() if isinstance(found, dict) else found


@pytest.mark.parametrize("case", CASES)
def test_a_loss_is_that_of_the_whole_batch(case: str, folder: Path) -> None:
    make, columns, label = CASES[case]
    whole = ModelAndLoss(model := model_of(folder), make(model).double())
    check_loss(whole.loss_of(None))
    batch = batch_of(model, columns, label)
    ours, theirs = copy.deepcopy(whole), copy.deepcopy(whole)
    expected = value_of(whole.loss_of(None), batch)
    expected.backward()
    adapter = EmbeddingLoss(columns_of)
    accumulator = mb.Accumulator(ours, microbatch_size=MICROBATCH)
    step = accumulator.gradient(batch, adapter.loss, encode=adapter.encode)
    assert step.microbatches == 4
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert distance(gradients(ours), gradients(whole)) < 1e-10
    assert "forward" not in vars(ours.model)
    # Their accumulation: the mean of the microbatches' losses, 61 % off for contrastive ones.
    pieces = mb.cut(batch, MICROBATCH)
    for piece in pieces:
        value = value_of(theirs.loss_of(None), piece)
        if value.requires_grad and bool(value.isfinite()):
            (value / len(pieces)).backward()
    assert distance(gradients(theirs), gradients(whole)) > 1e-3


def test_every_loss_with_embeddings_is_supported_or_refused() -> None:
    """A loss that a later version adds is seen here."""
    tested = {type_of(make) for make, _, _ in CASES.values()}
    for name in losses.__all__:
        kind = getattr(losses, name)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            continue
        if hasattr(kind, "compute_loss_from_embeddings") and "Cached" not in name:
            assert name in tested, name
        elif name not in {*tested, "GISTEmbedLoss", "MatryoshkaLoss"}:
            with pytest.raises(mb.errors.ConfigError):
                check_loss(kind.__new__(kind))


def type_of(make: Any) -> str:
    inner = [each.cell_contents for each in make.__closure__ or () if isinstance(each.cell_contents, str)]
    return inner[0] if inner else "GISTEmbedLoss or MatryoshkaLoss"


class Own(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Any, labels: Any = None) -> Tensor:
        return self.compute_loss_from_embeddings([self.model(each)["sentence_embedding"] for each in features], labels)

    def compute_loss_from_embeddings(self, embeddings: Any, labels: Any) -> Tensor:
        return (embeddings[0] @ embeddings[1].T).logsumexp(1).mean()


class Tokens(Own):
    def forward(self, features: Any, labels: Any = None) -> Tensor:
        return self.model(features[0])["token_embeddings"].square().mean()


class Augments(Own):
    def forward(self, features: Any, labels: Any = None) -> Tensor:
        return self.model({"input_ids": torch.ones(2, 3, dtype=torch.long)})["sentence_embedding"].sum()


def run(model: Any, loss: Any) -> Any:
    adapter, batch = EmbeddingLoss(columns_of), batch_of(model, 2, None)
    both = ModelAndLoss(model, loss)
    return mb.Accumulator(both, microbatch_size=4).gradient(batch, adapter.loss, encode=adapter.encode)


def test_a_loss_of_ones_own(folder: Path) -> None:
    model = model_of(folder)
    check_loss(loss := Own(model))
    expected = value_of(loss, batch_of(model, 2, None)).item()
    assert run(model, loss).loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "words"), [(Tokens, "token_embeddings"), (Augments, "tokens of its own")])
def test_a_loss_that_uses_more_than_embeddings_is_refused_by_name(kind: Any, words: str, folder: Path) -> None:
    model = model_of(folder)
    with pytest.raises(mb.errors.ConfigError, match=words):
        run(model, kind(model))
    assert "forward" not in vars(model)


def test_a_loss_without_the_method_is_refused() -> None:
    with pytest.raises(mb.errors.ConfigError, match="Linear has no method compute_loss_from_embeddings"):
        check_loss({"name": nn.Linear(1, 1)})
    wrapped = losses.MatryoshkaLoss.__new__(losses.MatryoshkaLoss)
    nn.Module.__init__(wrapped)
    wrapped.loss = losses.MegaBatchMarginLoss.__new__(losses.MegaBatchMarginLoss)
    with pytest.raises(mb.errors.ConfigError, match="encodes parts of the batch itself"):
        check_loss(wrapped)


# -- the trainer ------------------------------------------------------------------------------------------------------

EXACT = 1e-9


def dataset(columns: int, label: Any = None) -> Any:
    rows: dict[str, Any] = {f"column_{column}": texts(column) for column in range(columns)}
    return Dataset.from_dict(rows if label is None else {**rows, "label": label.tolist()})


def trained(
    kind: Any, folder: Path, out: Path, *, make: Any = None, data: Any = None, resume: Any = None, **options: Any
) -> Any:
    model = model_of(folder, dropout=options.pop("dropout", 0.0))
    own = {name: options.pop(name) for name in ("microbatch_size", "accumulator") if name in options}
    if options.pop("evaluation", False):
        own["eval_dataset"] = data or dataset(2)
    given: dict[str, Any] = {
        "per_device_train_batch_size": 5,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-2,
        "seed": 3,
    }
    args = SentenceTransformerTrainingArguments(str(out), **{**given, **options})
    torch.manual_seed(0)  # of a loss's own parameters
    loss = (make or of(MNRL))(model)
    trainer = kind(model=model, args=args, train_dataset=data or dataset(2), loss=loss, **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> Tensor:
    losses_ = trainer.loss.values() if isinstance(trainer.loss, dict) else [trainer.loss]
    modules = nn.ModuleList([trainer.model, *losses_])
    return torch.cat([each.detach().flatten() for each in modules.parameters()])


def history(trainer: Any) -> list[dict[str, float]]:
    kept = ("loss", "grad_norm", "learning_rate", "gor_mean", "gor_second_moment")
    return [{k: v for k, v in line.items() if k in kept} for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("together", [False, True])
def test_a_run_of_the_trainer_is_that_of_whole_batches(folder: Path, tmp_path: Path, *, together: bool) -> None:
    whole = trained(SentenceTransformerTrainer, folder, tmp_path)
    several: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}
    ours = trained(Ours, folder, tmp_path, microbatch_size=2, **(several if together else {}))
    theirs = trained(SentenceTransformerTrainer, folder, tmp_path, **several)
    assert distance(weights(ours), weights(whole)) < EXACT
    assert distance(weights(theirs), weights(whole)) > 1e-3
    assert len(history(ours)) == 4
    for one, other in zip(history(ours), history(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_parameters_and_terms_of_the_loss(folder: Path, tmp_path: Path) -> None:
    softmax = {"make": of("SoftmaxLoss", sentence_embedding_dimension=16, num_labels=3), "data": dataset(2, CLASSES)}
    for case in (softmax, {"make": of("GlobalOrthogonalRegularizationLoss")}):
        whole = trained(SentenceTransformerTrainer, folder, tmp_path, max_grad_norm=0.0, **case)
        ours = trained(Ours, folder, tmp_path, microbatch_size=2, max_grad_norm=0.0, **case)
        assert distance(weights(ours), weights(whole)) < 1e-6  # the projection is in float32
        for one, other in zip(history(ours), history(whole), strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_several_datasets_have_a_loss_each(folder: Path, tmp_path: Path) -> None:
    def both(model: Any) -> Any:
        return {"pairs": of(MNRL)(model), "scores": of("CoSENTLoss")(model)}

    data = {"pairs": dataset(2), "scores": dataset(2, SCORES)}
    case: dict[str, Any] = {"make": both, "data": data}
    whole = trained(SentenceTransformerTrainer, folder, tmp_path, **case)
    ours = trained(Ours, folder, tmp_path, microbatch_size=2, **case)
    assert distance(weights(ours), weights(whole)) < EXACT
    with pytest.raises(mb.errors.ConfigError, match="which have no loss together"):
        trained(Ours, folder, tmp_path, microbatch_size=2, gradient_accumulation_steps=4, **case)


def test_memory_that_ends_leaves_the_same_run(folder: Path, tmp_path: Path) -> None:
    full = RunsOut(9, 60)

    class Ends(Ours):
        def _encoded(self, model: Any, microbatch: Any) -> Any:
            full.armed = True
            return super()._encoded(model, microbatch)

    with full:
        ours = trained(Ends, folder, tmp_path, microbatch_size=5)
    assert len(full.refused) == 2
    assert distance(weights(ours), weights(trained(SentenceTransformerTrainer, folder, tmp_path))) < EXACT


def test_a_run_resumes_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    case: dict[str, Any] = {"microbatch_size": 2, "dropout": 0.2, "save_strategy": "steps", "save_steps": 1}
    through = trained(Ours, folder, tmp_path, **case)
    for step in (1, 2):
        again = trained(Ours, folder, tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), **case)
        assert torch.equal(weights(again), weights(through))


def test_losses_are_refused_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(mb.errors.ConfigError, match="use MultipleNegativesRankingLoss"):
        trained(Ours, folder, tmp_path, make=of("CachedMultipleNegativesRankingLoss"))


def on_two_ranks(rank: int, ranks: int) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(ranks)}
    folder, case = Path(os.environ["ENCODER"]), {"per_device_train_batch_size": 5}
    evaluates = {"eval_strategy": "steps", "eval_steps": 1}
    gathers = of(MNRL, gather_across_devices=True)
    with tempfile.TemporaryDirectory() as out:
        ours = trained(Ours, folder, Path(out), make=gathers, microbatch_size=2, evaluation=True, **case, **evaluates)
        theirs = trained(SentenceTransformerTrainer, folder, Path(out), **case)
    return weights(ours), weights(theirs), [line["loss"] for line in history(ours)]


def test_two_ranks_share_negatives(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCODER", str(folder))
    whole = trained(SentenceTransformerTrainer, folder, tmp_path, per_device_train_batch_size=10)
    expected = [line["loss"] for line in history(whole)]
    for ours, theirs, losses_ in run_ranks_(on_two_ranks, 2, tmp_path / "ranks", timeout=120):
        assert distance(ours, weights(whole)) < EXACT
        assert losses_ == pytest.approx(expected, rel=1e-6) or not losses_  # the first rank logs
        assert distance(theirs, weights(whole)) > 1e-3
