"""Fine-tune with LoRA in Transformers' Trainer: `MicrobatchTrainer` in the place of `Trainer`.

`per_device_train_batch_size` is the batch. See `lora.py` for model and data; the losses are the same.
"""

from lora import BATCH, MICROBATCH, RATE, collate, language_model, rows
from transformers import TrainingArguments

from microbatch.integrations.transformers import MicrobatchTrainer


def main() -> list[float]:
    arguments = TrainingArguments(
        output_dir="runs/lora_trainer",
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        train_sampling_strategy="sequential",  # as the other examples read it
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = MicrobatchTrainer(
        language_model(),
        arguments,
        data_collator=collate,
        train_dataset=rows(),
        microbatch_size=MICROBATCH,  # "auto", the default, finds the fastest that fits
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
