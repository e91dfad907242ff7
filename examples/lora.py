"""Fine-tune a language model with LoRA on padded rows, in a loop of one's own.

64 rows are one step, 8 go through the model at once, and every word of the batch weighs the same. `lora_trainer.py`,
`lora_sft.py`, `lora_lightning.py` and `lora_accelerate.py` do the same in these frameworks, with the same losses.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import microbatch as mb

BATCH, MICROBATCH, WORDS, RATE = 64, 8, 64, 1e-2


def language_model() -> nn.Module:
    """Return a small Llama with random weights, of which LoRA trains a part."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=64, pad_token_id=0, **size))
    return get_peft_model(llama, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"))


def rows(number: int = 512) -> list[dict[str, list[int]]]:
    """Return rows of 4 to 40 words, in which each word is the one before it plus the row's step."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(*span, (number,), generator=generator).tolist() for span in ((1, WORDS), (1, 4), (4, 41))]
    words = [[(first + step * i) % (WORDS - 1) + 1 for i in range(n)] for first, step, n in zip(*drawn, strict=True)]
    return [{"input_ids": row} for row in words]


def collate(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad rows to the longest: tensors of shape (rows, words), with labels of -100 where there is padding."""
    ids = [torch.tensor(sample["input_ids"]) for sample in samples]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    real = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    return {"input_ids": padded, "attention_mask": real, "labels": padded.masked_fill(real == 0, -100)}


def main() -> list[float]:
    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=MICROBATCH, max_grad_norm=1.0)
    loss_fn = mb.losses.from_model()  # finds out that this model's loss is a mean over words
    losses = []
    for batch in DataLoader(rows(), batch_size=BATCH, collate_fn=collate):
        step = accumulator.step(batch, loss_fn)
        losses.append(step.loss.item())
        print(f"step {step.index}  loss {step.loss:.4f}  {step.count} words in {step.microbatches} microbatches")
    return losses


if __name__ == "__main__":
    main()
