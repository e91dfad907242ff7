"""The job `language`: a small transformer learns to write Python, or whatever text it is given."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from microbatch.batch.lengths import Lengths
from microbatch.loss.loss import Loss
from microbatch.train.job import Job
from microbatch.train.jobs.cache import load_corpus
from microbatch.train.jobs.corpus import Cut, unigram_loss
from microbatch.train.jobs.text import find_files
from microbatch.train.jobs.transformer import Shape, Transformer
from microbatch.train.jobs.vocabulary import BOUNDARY, open_tokenizer

IGNORED = -100
"""Label of a position whose next token is not to be predicted."""


def language(
    *,
    data: Path | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_size: int | None = None,
    cache: Path | None = None,
) -> Job:
    """Make a job that trains a small decoder-only transformer on real text.

    The text is the source of Python's own standard library, cut into functions and classes, or the user's files. Its
    documents have very different lengths, so the mean over tokens is not a mean of the microbatches' means.

    Args:
        data: A .txt, .md, .py or .jsonl file (field ``"text"``), or a folder of them; `None` for the standard library.
        seed: Draws the first weights and the sample shown at the end; PyTorch's own random state is left as it was.
        device: Where the model is trained.
        batch_size: Effective batch in documents; `None` for 64.
        cache: Folder that keeps the tokens for the next run; `None` for the user's cache folder.

    Returns:
        The job. Its fact ``"unigram entropy"`` is the loss, in nats per token, of knowing only how frequent each
        token is.

    Raises:
        DataError: The text cannot be read, or there is too little of it.
        MissingDependencyError: The ``tokenizers`` package is not installed.

    Cost:
        About 5 s the first time, for reading the library and training a vocabulary; under a second after that.
    """
    cut = Cut()
    files = find_files(data)
    corpus = load_corpus(files, cut=cut, folder=cache)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Transformer(Shape(vocabulary=corpus.vocabulary_size, length=cut.length)).to(device)
    prompt = "def " if all(path.suffix == ".py" for path in files) else ""
    return Job(
        model=model,
        optimizer=_optimizer(model),
        loss_fn=next_token_loss,
        data=corpus.train,
        batch_size=64 if batch_size is None else batch_size,
        collate=pad_pieces,
        lengths=Lengths(of=_predicted),
        microbatch_size=8,
        validation=corpus.validation,
        steps=80,
        warmup_steps=10,
        max_grad_norm=1.0,
        memory_budget="320 MiB",
        unit="tokens",
        facts={"unigram entropy": unigram_loss(corpus)},
        show=partial(write_text, vocabulary=corpus.vocabulary, prompt=prompt, seed=seed),
        files={"vocabulary.json": corpus.vocabulary},
    )


def pad_pieces(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack pieces of different lengths into one batch, padded on the right.

    Args:
        pieces: ``{"tokens": ...}`` each, 1-d int64.

    Returns:
        ``"tokens"`` to read and ``"labels"`` to predict, the same moved by one; both of shape ``(B, T)``, int64, with
        ``T`` one less than the longest piece. Padding has the label -100.

    Example:
        >>> pad_pieces([{"tokens": torch.tensor([0, 7])}, {"tokens": torch.tensor([0, 5, 6])}])["labels"].tolist()
        [[7, -100], [5, 6]]
    """
    rows = [piece["tokens"] for piece in pieces]
    return {
        "tokens": pad_sequence([row[:-1] for row in rows], batch_first=True, padding_value=BOUNDARY),
        "labels": pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORED),
    }


def next_token_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Loss:
    """Sum the cross-entropy of every next token.

    Args:
        model: Tokens ``(B, T)`` to logits ``(B, T, V)``.
        microbatch: Rows of a batch that `pad_pieces` made.

    Returns:
        The sum in nats, and the number of tokens that were to be predicted.
    """
    labels_BT = microbatch["labels"]
    logits_BTV = model(microbatch["tokens"])
    total = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return Loss(sum=total, count=(labels_BT != IGNORED).sum())


def write_text(model: nn.Module, *, vocabulary: str, prompt: str, seed: int, length: int = 120) -> str:
    """Let a model continue a prompt, one drawn token after another.

    Args:
        model: Tokens ``(1, T)`` to logits ``(1, T, V)``, in any mode, which it keeps.
        vocabulary: The tokenizer in JSON.
        prompt: Text to continue; may be empty.
        seed: Draws the tokens; PyTorch's own random state is left as it was.
        length: Most tokens to write, the prompt's included; at most what the model reads.

    Returns:
        The prompt and its continuation, up to the end that the model gave it.
    """
    tokenizer = open_tokenizer(vocabulary)
    tokens = [BOUNDARY, *tokenizer.encode(prompt).ids]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        while len(tokens) < length:
            logits_V = model(torch.tensor([tokens], device=device))[0, -1].float().cpu()
            drawn = int(torch.multinomial((logits_V / 0.8).softmax(dim=-1), 1, generator=generator))
            if drawn == BOUNDARY:
                break
            tokens.append(drawn)
    model.train(was_training)
    return tokenizer.decode(tokens[1:])


def _predicted(batch: dict[str, Tensor]) -> Tensor:
    """Tell which positions have a next token to predict; the others are padding."""
    return batch["labels"] != IGNORED


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Decay the matrices and leave the vectors alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=True)
