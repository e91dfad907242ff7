"""Text as a model sees it: pieces of documents in tokens, some of them held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from microbatch.errors import DataError
from microbatch.train.jobs.vocabulary import BOUNDARY, open_tokenizer, train_vocabulary


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Say how text becomes tokens.

    Attributes:
        vocabulary_size: Most different tokens; at least 257.
        length: Most tokens that a model reads at once. A longer document becomes several pieces.
        held_out: Most documents set aside for validation; never more than one in twenty, never fewer than one.
    """

    vocabulary_size: int = 4_096
    length: int = 256
    held_out: int = 256


@dataclass(frozen=True, kw_only=True)
class Pieces(Dataset[dict[str, Tensor]]):
    """Documents in tokens, cut where they are longer than a model reads; a map-style data set.

    Attributes:
        tokens: The pieces one after another; shape ``(all tokens,)``, int32.
        ends: Where each piece ends in ``tokens``; shape ``(pieces,)``, int64, increasing.
    """

    tokens: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return self.ends.numel()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Take one piece.

        Args:
            index: From 0; negative numbers count from the end.

        Returns:
            ``{"tokens": ...}``, 1-d int64: at least two tokens, and at most one more than a model reads, because the
            last one is only predicted.

        Raises:
            IndexError: There is no such piece.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no piece {index} among {len(self)}")
        index %= len(self)
        start = int(self.ends[index - 1]) if index else 0
        return {"tokens": self.tokens[start : int(self.ends[index])].long()}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A vocabulary, and the text written in it.

    Attributes:
        vocabulary: The tokenizer in JSON.
        train: What is learnt from.
        validation: Held-out documents: those with the smallest hashes, so the same whatever the order of files.
    """

    vocabulary: str
    train: Pieces
    validation: Pieces

    @property
    def vocabulary_size(self) -> int:
        """Count the different tokens."""
        return len(json.loads(self.vocabulary)["model"]["vocab"])


def build_corpus(documents: Sequence[str], *, cut: Cut) -> Corpus:
    """Hold documents out, train a vocabulary on the others, and write all of them in it.

    Args:
        documents: Texts, none twice.
        cut: How text becomes tokens.

    Returns:
        The corpus; the same for the same documents.

    Raises:
        DataError: There are fewer than two documents, so none can be held out.
        MissingDependencyError: The ``tokenizers`` package is not installed.
    """
    if len(documents) < 2:
        raise DataError(f"{len(documents)} document found, and one must be held out; pass at least two")
    count = min(max(len(documents) // 20, 1), cut.held_out)
    held_out = set(sorted(documents, key=_hash)[:count])
    train = [document for document in documents if document not in held_out]
    validation = [document for document in documents if document in held_out]
    vocabulary = train_vocabulary(train, size=cut.vocabulary_size)
    return Corpus(
        vocabulary=vocabulary,
        train=_write(train, vocabulary, length=cut.length),
        validation=_write(validation, vocabulary, length=cut.length),
    )


def unigram_loss(corpus: Corpus) -> float:
    """Score the held-out tokens by how frequent each of them is in the training text.

    It is the loss of a model that knows frequencies and nothing else: ``-sum_v n_v log p_v / sum_v n_v`` with the
    held-out counts ``n`` and the training frequencies ``p``, one added to every training count so that no token is
    impossible. Whatever a model scores below it comes from context.

    Args:
        corpus: Tokens to count.

    Returns:
        Nats per predicted token.

    Example:
        >>> pieces = Pieces(tokens=torch.tensor([0, 1, 0, 1], dtype=torch.int32), ends=torch.tensor([4]))
        >>> vocabulary = '{"model": {"vocab": {"a": 0, "b": 1}}}'
        >>> corpus = Corpus(vocabulary=vocabulary, train=pieces, validation=pieces)
        >>> round(unigram_loss(corpus), 4)  # p = 2/5, 3/5 and n = 1, 2
        0.646
    """
    size = corpus.vocabulary_size
    frequency = _predicted(corpus.train, size=size) + 1.0
    found = _predicted(corpus.validation, size=size)
    return float(-(found * (frequency / frequency.sum()).log()).sum() / found.sum())


def _predicted(pieces: Pieces, *, size: int) -> Tensor:
    """Count each token where it is predicted: everywhere but at the start of a piece."""
    starts = torch.cat((torch.zeros(1, dtype=torch.long), pieces.ends[:-1]))
    everywhere = torch.bincount(pieces.tokens, minlength=size)
    return (everywhere - torch.bincount(pieces.tokens[starts], minlength=size)).double()


def _write(documents: Sequence[str], vocabulary: str, *, length: int) -> Pieces:
    """Turn documents into pieces; the last token of one begins the next, so that every token is predicted once."""
    tokens: list[int] = []
    ends: list[int] = []
    for encoding in open_tokenizer(vocabulary).encode_batch_fast(documents):
        document = [BOUNDARY, *encoding.ids, BOUNDARY]
        for start in range(0, len(document) - 1, length):
            tokens += document[start : start + length + 1]
            ends.append(len(tokens))
    return Pieces(tokens=torch.tensor(tokens, dtype=torch.int32), ends=torch.tensor(ends))


def _hash(document: str) -> bytes:
    """Order documents by content alone; lone surrogates can come out of JSON."""
    return hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
