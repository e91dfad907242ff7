"""A timm model in a loop of one's own: timm's optimizer and scheduler, and exact batch normalisation.

timm needs torchvision. 64 images are one step, 8 go through the network at once, and the statistics of its batch
normalisation are those of all 64. Mixup pairs images of the whole batch, so it comes before the cut.
"""

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import microbatch as mb

BATCH, MICROBATCH, STEPS, CLASSES = 64, 8, 8, 4


def draw(generator: torch.Generator) -> dict[str, Tensor]:
    """Draw images of shape (BATCH, 3, 32, 32) whose colour tells their class, and the classes, of shape (BATCH,)."""
    kind = torch.randint(CLASSES, (BATCH,), generator=generator)
    colours = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(BATCH, 3, 32, 32, generator=generator)
    return {"image": colours[kind][:, :, None, None] + 0.3 * noise, "label": kind}


def loss_fn(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    return SoftTargetCrossEntropy()(model(rows["image"]), rows["target"])


def main() -> float:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=STEPS, t_in_epochs=False)
    mixup = Mixup(mixup_alpha=0.2, num_classes=CLASSES)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=MICROBATCH, batch_norm="exact", max_grad_norm=1.0)
    generator, loss = torch.Generator().manual_seed(1), float("nan")
    for index in range(STEPS):
        batch = draw(generator)
        image, target = mixup(batch["image"], batch["label"])
        step = accumulator.step({"image": image, "target": target}, loss_fn)
        scheduler.step_update(index + 1)
        loss = float(step.loss)
        print(f"step {index}  loss {loss:.3f}  norm {step.grad_norm:.2f}  {step.microbatches} microbatches")
    return loss


if __name__ == "__main__":
    main()
