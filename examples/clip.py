"""CLIP with exact batch normalisation: 256 pairs in microbatches of 16, and the gradient of all 256.

Both the contrastive loss and the batch normalisation look at the whole batch. The last lines compare the first gradient
with plain PyTorch on the whole batch at once.
"""

import copy

import torch
from torch import Tensor, nn

import microbatch as mb

PAIRS, MICROBATCH, STEPS = 256, 16, 30


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 64, 32),
        )
        self.text = nn.Sequential(nn.EmbeddingBag(100, 32), nn.Linear(32, 32), nn.BatchNorm1d(32))
        self.log_scale = nn.Parameter(torch.tensor(2.0))


def encode(model: Towers, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the representations of these rows, each of shape (rows, 32)."""
    image, text = model.image(microbatch["image"]), model.text(microbatch["text"])
    return nn.functional.normalize(image, dim=1), nn.functional.normalize(text, dim=1)


def loss_fn(model: Towers, found: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of the representations of all rows."""
    return mb.losses.clip(*found, scale=model.log_scale.exp())


def draw(generator: torch.Generator) -> dict[str, Tensor]:
    """Draw images of one of 10 colours, and texts whose words go with the colour."""
    kind = torch.randint(10, (PAIRS,), generator=generator)
    colours = torch.randn(10, 3, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(PAIRS, 3, 16, 16, generator=generator)
    words = kind[:, None] * 10 + torch.randint(10, (PAIRS, 6), generator=generator)
    return {"image": colours[kind][:, :, None, None] + 0.5 * noise, "text": words}


def main() -> float:
    torch.manual_seed(0)
    model, generator = Towers(), torch.Generator().manual_seed(1)
    whole = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=MICROBATCH, batch_norm="exact")

    first = draw(generator)
    accumulator.gradient(first, loss_fn, encode=encode)  # the finished gradient in .grad, and no step
    image, text = encode(whole, first)
    logits, own = whole.log_scale.exp() * image @ text.T, torch.arange(PAIRS)
    (nn.functional.cross_entropy(logits, own) / 2 + nn.functional.cross_entropy(logits.T, own) / 2).backward()
    pairs = list(zip(model.parameters(), whole.parameters(), strict=True))
    norm = torch.stack([theirs.grad.norm() for _, theirs in pairs]).norm()
    error = float(torch.stack([(ours.grad - theirs.grad).norm() for ours, theirs in pairs]).norm() / norm)
    print(f"gradient of {PAIRS} pairs in microbatches of {MICROBATCH}: {error:.1e} from the whole batch's")

    for _ in range(STEPS):
        step = accumulator.step(draw(generator), loss_fn, encode=encode)
        if step.index % 10 == 0 or step.index == STEPS:
            print(f"step {step.index:3}  loss {step.loss:.3f}  microbatches {step.microbatches}")
    return error


if __name__ == "__main__":
    main()
