"""The jobs of the study `which_batch`: small enough that four batch sizes and three seeds take minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from microbatch.train.job import Job
from microbatch.train.jobs.corpus import Cut
from microbatch.train.jobs.images import images, images_batchnorm
from microbatch.train.jobs.language import next_token_loss, pad_pieces
from microbatch.train.jobs.pairs import pairs


@dataclass(frozen=True, kw_only=True)
class Study:
    """One sweep of the study.

    Attributes:
        job: Makes the job of a seed: other weights, the same data.
        question: What the sweep answers.
        sizes: Effective batches, in samples.
        samples: Samples that each run learns from.
        lr: How the learning rate is chosen.
        seeds: Runs of each batch size.
        options: Further arguments of `mb.sweep`.
    """

    job: Callable[[int], Job]
    question: str
    sizes: tuple[int, ...]
    samples: int
    lr: str = "rule"
    seeds: int = 3
    options: dict[str, Any] = field(default_factory=dict[str, Any])


def language_job(seed: int) -> Job:
    """Make the job `language` smaller: pieces of 64 tokens, a vocabulary of 1,024, two layers of 96 channels."""
    from microbatch.train.jobs.cache import load_corpus
    from microbatch.train.jobs.text import find_files
    from microbatch.train.jobs.transformer import Shape, Transformer

    cut = Cut(vocabulary_size=1_024, length=64, held_out=96)
    corpus = load_corpus(find_files(None), cut=cut, folder=None)
    generator = torch.Generator().manual_seed(0)
    # Whole pieces alone: the noise scale is of rows that weigh the same.
    train = _whole(corpus.train, cut.length, most=32_768, generator=generator)
    validation = _whole(corpus.validation, cut.length, most=192, generator=generator)
    torch.manual_seed(seed)
    model = Transformer(Shape(vocabulary=corpus.vocabulary_size, length=cut.length, layers=2, channels=96))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return Job(
        model=model,
        optimizer=optimizer,
        loss_fn=next_token_loss,
        data=train,
        collate=pad_pieces,
        batch_size=64,
        validation=validation,
        warmup_steps=20,
        max_grad_norm=1.0,
        unit="tokens",
    )


def _whole(pieces: Any, length: int, *, most: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    order = torch.randperm(len(pieces), generator=generator).tolist()
    found = (pieces[index] for index in order)
    whole = [piece for piece in found if len(piece["tokens"]) > length]
    return whole[:most]


def images_job(seed: int) -> Job:
    """Make the job `images`, with the held-out images of seed 0 whatever the seed."""
    return _same_data(images(seed=seed), images(seed=0))


def batchnorm_job(seed: int) -> Job:
    """Make the job `images-batchnorm`, likewise."""
    return _same_data(images_batchnorm(seed=seed), images_batchnorm(seed=0))


def pairs_job(seed: int) -> Job:
    """Make the job `pairs` from its own batch of 128."""
    return replace(pairs(seed=seed), batch_size=128)


def _same_data(job: Job, first: Job) -> Job:
    return replace(job, data=first.data, validation=first.validation)


STUDIES = {
    "language": Study(
        job=language_job, question="a language model, rates by the rule", sizes=(16, 64, 256, 512), samples=12_288
    ),
    "language-finder": Study(
        job=language_job, question="the same, rates by the finder", sizes=(16, 64, 256), samples=12_288, lr="auto"
    ),
    "images": Study(
        job=images_job, question="a residual network with group normalisation", sizes=(16, 64, 256, 512), samples=11_504
    ),
    "images-finder": Study(
        job=images_job, question="the same, rates by the finder", sizes=(16, 64, 256, 512), samples=11_504, lr="auto"
    ),
    "batchnorm-exact": Study(
        job=batchnorm_job,
        question="batch normalisation over the effective batch",
        sizes=(16, 64, 256, 512),
        samples=8_628,
        seeds=2,
    ),
    "batchnorm-microbatch": Study(
        job=batchnorm_job,
        question="batch normalisation over microbatches of 4, as accumulation usually has it",
        sizes=(16, 64, 256, 512),
        samples=8_628,
        seeds=2,
        options={"accumulation": "plain", "microbatch_size": 4},
    ),
    "pairs-coupled": Study(
        job=pairs_job,
        question="a contrastive loss over the effective batch",
        sizes=(32, 128, 256, 512),
        samples=16_384,
        seeds=2,
    ),
    "pairs-microbatch": Study(
        job=pairs_job,
        question="the contrastive loss within microbatches of 16, as accumulation usually has it",
        sizes=(32, 128, 256, 512),
        samples=16_384,
        seeds=2,
        options={"accumulation": "plain", "microbatch_size": 16},
    ),
}
