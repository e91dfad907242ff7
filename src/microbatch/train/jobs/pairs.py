"""The job `pairs`: a dual encoder learns to find the function that a docstring describes, or pairs of the user's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from microbatch.loss.loss import Loss
from microbatch.loss.losses import clip
from microbatch.train.job import Job
from microbatch.train.jobs.dual import DualEncoder
from microbatch.train.jobs.functions import FIELDS, Pair, read_pairs
from microbatch.train.jobs.vocabulary import BOUNDARY, open_tokenizer, train_vocabulary

LENGTHS = {"anchor": 48, "positive": 128}
"""Tokens of each text that are read; what is beyond them is left out."""

HELD_OUT = 500
"""Most pairs set aside for validation; never more than one in ten."""


@dataclass(frozen=True, kw_only=True)
class TokenPairs(Dataset[dict[str, Tensor]]):
    """Pairs of texts in tokens; a map-style data set.

    Attributes:
        rows: ``{"anchor": ..., "positive": ...}`` each, 1-d int64, at least one token.
    """

    rows: Sequence[dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def pairs(
    *,
    data: Path | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_size: int | None = None,
) -> Job:
    """Make a job that learns which texts belong together.

    The pairs are the docstrings of Python's own standard library and the functions under them, or the user's. The loss
    is CLIP's: every text is to find its own partner among all of the batch, and the other way round, so how much is
    learnt from a batch grows with its size, and no part of the batch knows its gradient alone.

    Args:
        data: A ``.jsonl`` or ``.csv`` file with ``"anchor"`` and ``"positive"``, a ``.py`` file, or a folder of Python
            files; `None` for the standard library.
        seed: Draws the first weights; PyTorch's own random state is left as it was.
        device: Where the model is trained.
        batch_size: Effective batch in pairs; `None` for 512.

    Returns:
        The job. Validation reports which part of the held-out texts find their partner first of all held-out ones
        (``"recall@1"``), and among the first ten (``"recall@10"``).

    Raises:
        DataError: The pairs cannot be read, or there are too few.
        MissingDependencyError: The ``tokenizers`` package is not installed.

    Cost:
        About 10 s for reading the library and training a vocabulary.
    """
    found = sorted(read_pairs(data), key=_hash)
    count = max(1, min(HELD_OUT, len(found) // 10))
    held_out, learnt = found[:count], found[count:]
    vocabulary = train_vocabulary([text for pair in learnt for text in (pair.anchor, pair.positive)], size=4_096)
    train, validation = (_in_tokens(part, vocabulary) for part in (learnt, held_out))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = DualEncoder(vocabulary=open_tokenizer(vocabulary).get_vocab_size()).to(device)
    return Job(
        model=model,
        optimizer=_optimizer(model),
        encode=encode,
        loss_fn=pairs_loss,
        data=train,
        batch_size=512 if batch_size is None else batch_size,
        collate=pad_pairs,
        microbatch_size=16,
        validation=validation,
        evaluate=pairs_scores,
        epochs=10,
        warmup_steps=10,
        max_grad_norm=1.0,
        unit="pairs",
        facts={"recall@1 by chance": 1 / count, "recall@10 by chance": min(1.0, 10 / count)},
        files={"vocabulary.json": vocabulary},
    )


def pad_pairs(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack texts of different lengths into one batch, padded on the right.

    Args:
        rows: What `TokenPairs` holds.

    Returns:
        ``"anchor"`` and ``"positive"``, each of shape ``(B, T)`` with its own ``T``, int64.

    Example:
        >>> rows = [{"anchor": torch.tensor([n] * n), "positive": torch.tensor([n])} for n in (1, 2)]
        >>> pad_pairs(rows)["anchor"].tolist()
        [[1, 0], [2, 2]]
    """
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=BOUNDARY) for name in FIELDS
    }


def encode(model: nn.Module, microbatch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Represent both texts of every pair.

    Args:
        model: A `DualEncoder`.
        microbatch: Rows of a batch that `pad_pairs` made.

    Returns:
        ``"anchor"`` and ``"positive"``, each of shape ``(B, D)``, of length 1.
    """
    # One call of the model itself, as sharded ones need it.
    return dict(zip(FIELDS, model(*(microbatch[name] for name in FIELDS)), strict=True))


def pairs_loss(model: nn.Module, found: dict[str, Tensor]) -> Loss:
    """Sum CLIP's loss over the pairs of a batch.

    Args:
        model: A `DualEncoder`.
        found: Representations of the whole batch.

    Returns:
        The sum in nats, and the number of pairs.
    """
    return clip(found["anchor"], found["positive"], scale=model.get_parameter("log_scale").exp())


def pairs_scores(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Loss]:
    """Count the texts that find their partner.

    Args:
        model: A `DualEncoder`.
        found: Representations of all held-out pairs.

    Returns:
        ``"loss"`` in nats, ``"recall@1"`` and ``"recall@10"``, each over the number of pairs. Where others are as near
        as the partner, they count as nearer.
    """
    near_NN = found["anchor"] @ found["positive"].T
    rows = len(near_NN)
    before_N = (near_NN >= near_NN.diagonal().unsqueeze(1)).sum(dim=1) - 1
    recall = {f"recall@{k}": Loss(sum=(before_N < k).sum(dtype=torch.float32), count=rows) for k in (1, 10)}
    return {"loss": pairs_loss(model, found), **recall}


def _in_tokens(found: Sequence[Pair], vocabulary: str) -> TokenPairs:
    """Write pairs in a vocabulary."""
    tokenizer = open_tokenizer(vocabulary)
    columns = [
        [
            torch.tensor(each.ids[: LENGTHS[name]])
            for each in tokenizer.encode_batch_fast([getattr(pair, name) for pair in found])
        ]
        for name in FIELDS
    ]
    return TokenPairs(rows=[dict(zip(FIELDS, row, strict=True)) for row in zip(*columns, strict=True)])


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Decay the matrices and leave the vectors and the scale alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98), fused=True)


def _hash(pair: Pair) -> bytes:
    """Order pairs by content alone, so that the same ones are held out whatever the order of files."""
    return hashlib.sha256(pair.anchor.encode("utf-8", "surrogatepass")).digest()
