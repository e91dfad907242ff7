"""Fine-tune with LoRA in TRL's SFTTrainer: `MicrobatchSFTTrainer` in its place.

See `lora.py` for model and data; the losses are the same.
"""

from datasets import Dataset
from lora import BATCH, MICROBATCH, RATE, WORDS, collate, language_model, rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from microbatch.integrations.trl import MicrobatchSFTTrainer


def main() -> list[float]:
    arguments = SFTConfig(
        output_dir="runs/lora_sft",
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    pad = "<pad>"
    words = {pad: 0, **{f"w{number}": number for number in range(1, WORDS)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token=pad)), pad_token=pad, eos_token=pad
    )
    trainer = MicrobatchSFTTrainer(
        language_model(),
        arguments,
        data_collator=collate,
        train_dataset=Dataset.from_list(rows()),  # rows of word numbers need no tokenizer of text
        processing_class=tokenizer,
        microbatch_size=MICROBATCH,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
