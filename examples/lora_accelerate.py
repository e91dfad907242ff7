"""Fine-tune with LoRA in Accelerate: the accumulator takes what `prepare` returned, and replaces `accumulate()`.

See `lora.py` for model and data; the losses are the same.
"""

import torch
from accelerate import Accelerator
from lora import BATCH, MICROBATCH, RATE, collate, language_model, rows
from torch.utils.data import DataLoader

import microbatch as mb


def main() -> list[float]:
    accelerator = Accelerator(cpu=True)
    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    loader = DataLoader(rows(), batch_size=BATCH, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    accumulator = mb.Accumulator(model, optimizer, microbatch_size=MICROBATCH, max_grad_norm=1.0)
    loss_fn = mb.losses.from_model()
    losses = []
    for batch in loader:
        step = accumulator.step(batch, loss_fn)
        losses.append(step.loss.item())
        accelerator.print(f"step {step.index}  loss {step.loss:.4f}")
    return losses


if __name__ == "__main__":
    main()
