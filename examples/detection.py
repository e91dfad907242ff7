"""Detection targets: images of one size, and a list of boxes for each image, from none to many.

Two terms have different denominators: every cell of the grid counts for the first, every box for the second. counts=
tells both for the whole batch before the first backward, so the terms keep their weights however the batch is cut.
"""

import torch
from torch import nn

import microbatch as mb

IMAGES, MICROBATCH, STEPS, SIZE, GRID = 64, 8, 41, 32, 8


def detector() -> nn.Module:
    """Return a network whose output has shape (images, 3, GRID, GRID): a logit, and the offset of the box's middle."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 3, 1),
    )


def loss_fn(model: nn.Module, microbatch: dict[str, object]) -> dict[str, mb.Loss | None]:
    images, boxes = microbatch["images"], microbatch["boxes"]
    found = model(images)
    there = torch.zeros(len(images), GRID, GRID)
    offsets = [torch.zeros(0, 2)]
    wanted = [torch.zeros(0, 2)]
    for index, middles in enumerate(boxes):
        cells = (middles * GRID).long().clamp(max=GRID - 1)
        there[index, cells[:, 1], cells[:, 0]] = 1.0
        offsets.append(found[index, 1:, cells[:, 1], cells[:, 0]].T)
        wanted.append(middles * GRID - cells)
    heat = nn.functional.binary_cross_entropy_with_logits(found[:, 0], there, reduction="sum")
    offset = nn.functional.l1_loss(torch.cat(offsets), torch.cat(wanted), reduction="sum")
    rows = sum(map(len, boxes))
    return {
        "heat": mb.Loss(sum=heat, count=there.numel()),
        "offset": mb.Loss(sum=offset, count=rows) if rows else None,  # a microbatch without a box adds nothing
    }


def counts(batch: dict[str, object]) -> dict[str, float]:
    boxes = batch["boxes"].value  # the list inside mb.Rows
    return {"heat": len(boxes) * GRID**2, "offset": sum(map(len, boxes))}


def draw(generator: torch.Generator) -> dict[str, object]:
    """Draw images of shape (IMAGES, 1, SIZE, SIZE) with 0 to 3 bright squares, and the squares' middles in [0, 1)."""
    images = 0.1 * torch.randn(IMAGES, 1, SIZE, SIZE, generator=generator)
    boxes = []
    for image in images:
        corners = torch.randint(
            0, SIZE - 4, (int(torch.randint(0, 4, (), generator=generator)), 2), generator=generator
        )
        for x, y in corners.tolist():
            image[0, y : y + 4, x : x + 4] += 1.0
        boxes.append((corners + 2) / SIZE)
    return {"images": images, "boxes": mb.Rows(boxes)}


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(1), detector()
    accumulator = mb.Accumulator(model, torch.optim.AdamW(model.parameters(), lr=5e-3), microbatch_size=MICROBATCH)
    for _ in range(STEPS):
        step = accumulator.step(draw(generator), loss_fn, counts=counts)
        if step.index % 20 == 0:
            print(f"step {step.index}  " + "  ".join(f"{name} {value:.3f}" for name, value in step.terms.items()))
    return float(step.terms["heat"]), float(step.terms["offset"])


if __name__ == "__main__":
    main()
