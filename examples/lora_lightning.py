"""Fine-tune with LoRA in Lightning: one callback.

See `lora.py` for model and data; the losses are the same.
"""

import lightning.pytorch as pl
import torch
from lora import BATCH, MICROBATCH, RATE, collate, language_model, rows
from torch import Tensor
from torch.utils.data import DataLoader

import microbatch as mb
from microbatch.integrations.lightning import Microbatch


class Tuned(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.loss_fn, self.losses = language_model(), mb.losses.from_model(), list[float]()

    def training_step(self, batch: dict[str, Tensor]) -> mb.Loss:
        return self.loss_fn(self.model, batch)  # a sum and its count, because words count and not rows

    def on_train_batch_end(self, outputs: dict[str, Tensor], *_: object) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.0)


def main() -> list[float]:
    module = Tuned()
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[Microbatch(microbatch_size=MICROBATCH)],  # the line that changes
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows(), batch_size=BATCH, collate_fn=collate))
    return module.losses


if __name__ == "__main__":
    print(main())
