"""Several ranks with uneven shares: ``torchrun --standalone --nproc-per-node 2 examples/ranks.py``.

Rank 0 has twice the rows of the others, and the tokens are uneven as well. The accumulator divides once, by the tokens
of all ranks, so the weights are those of one process with the whole batch. DistributedDataParallel divides by the ranks
instead. Without torchrun, one process trains on all rows, with the same losses.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

import microbatch as mb

ROWS, LENGTH, WORDS, STEPS = 48, 12, 50, 20


def loss_fn(model: nn.Module, microbatch: dict[str, Tensor]) -> mb.Loss:
    logits, labels = model(microbatch["tokens"]), microbatch["labels"]
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return mb.Loss(sum=total, count=(labels != -100).sum())


def draw(generator: torch.Generator) -> dict[str, Tensor]:
    """Draw rows of shape (ROWS, LENGTH) whose next word is one more; rows end at different places."""
    first = torch.randint(WORDS, (ROWS, 1), generator=generator)
    words = (first + torch.arange(LENGTH + 1)) % WORDS
    lengths = torch.randint(2, LENGTH + 1, (ROWS, 1), generator=generator)
    labels = words[:, 1:].masked_fill(torch.arange(LENGTH) >= lengths, -100)
    return {"tokens": words[:, :-1], "labels": labels}


def main() -> list[float]:
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(nn.Embedding(WORDS, 32), nn.Linear(32, WORDS))
    # Before the process group: otherwise torch keeps the group to the end, where its threads may abort the process.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if ranks > 1:
        dist.init_process_group("gloo")
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=4)
    generator = torch.Generator().manual_seed(1)
    first = ROWS * (rank + bool(rank)) // (ranks + (ranks > 1))
    last = ROWS * (rank + 2) // (ranks + 1) if ranks > 1 else ROWS
    losses = []
    for _ in range(STEPS):
        batch = draw(generator)
        own = {name: value[first:last] for name, value in batch.items()}
        step = accumulator.step(own, loss_fn)
        losses.append(float(step.loss))
        if rank == 0 and step.index % 10 == 0:
            print(f"step {step.index}  loss {step.loss:.4f}  {step.count} tokens on {ranks} ranks")
    if ranks > 1:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
