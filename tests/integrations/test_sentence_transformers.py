"""sentence-transformers: every supported loss in microbatches beside the loss of the whole batch."""

import copy
import os
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
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel
from transformers.models.bert.tokenization_bert import BertTokenizer

from microbatch.integrations.embedding_losses import EmbeddingLoss, ModelAndLoss, check_loss

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
        elif name not in tested:
            with pytest.raises(mb.errors.ConfigError):
                check_loss(kind.__new__(kind))


def type_of(make: Any) -> str:
    inner = [each.cell_contents for each in make.__closure__ or () if isinstance(each.cell_contents, str)]
    return inner[0] if inner else "MatryoshkaLoss"


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
    wrapped.loss = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)
    with pytest.raises(mb.errors.ConfigError, match="guide model"):
        check_loss(wrapped)
