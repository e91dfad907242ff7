"""Tiny models of Transformers with random weights, their batches, and runs of a trainer on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    logging,
)

logging.set_verbosity_error()

VOCABULARY, TOKENS = 61, 12
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEARING: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 20,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    **dict.fromkeys(
        ["hidden_dropout", "attention_dropout", "feat_proj_dropout", "activation_dropout", "final_dropout"], 0.0
    ),
}

GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def bert(kind: Any, **more: Any) -> nn.Module:
    return kind(BertConfig(**SIZES, **STILL, **more))


def llama(kind: Any = LlamaForCausalLM, **more: Any) -> nn.Module:
    return kind(LlamaConfig(**SIZES, num_key_value_heads=2, **more))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BERT classification": lambda: bert(BertForSequenceClassification, num_labels=3),
    "BERT regression": lambda: bert(BertForSequenceClassification, num_labels=1),
    "BERT token classification": lambda: bert(BertForTokenClassification, num_labels=5),
    "BERT masked LM": lambda: bert(BertForMaskedLM),
    "BERT multiple choice": lambda: bert(BertForMultipleChoice),
    "Llama classification": lambda: llama(LlamaForSequenceClassification, num_labels=3),
    "Llama regression": lambda: llama(LlamaForSequenceClassification, num_labels=1),
    "Llama LM": llama,
    "Qwen2 LM": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "GPT-2 LM": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "T5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "CTC": lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**HEARING, ctc_loss_reduction="mean")),
    "CTC added": lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**HEARING, ctc_loss_reduction="sum")),
    "Mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SIZES, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
        )
    ),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def rows_of(name: str, number: int = 8) -> list[dict[str, Tensor]]:
    """Return rows of different lengths, with labels as the model of this name takes them."""
    random = torch.Generator().manual_seed(1)
    draw: dict[str, Any] = {"generator": random}
    ids = torch.randint(5, VOCABULARY, (number, TOKENS), **draw)
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (number, 1), **draw)).long()
    batch: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    if name.startswith("CTC"):
        labels = torch.randint(1, 20, (number, 6), **draw)
        labels[torch.arange(6) >= torch.randint(2, 7, (number, 1), **draw)] = -100
        batch = {"input_values": torch.randn(number, 800, **draw), "labels": labels}
    elif "regression" in name:
        batch["labels"] = torch.randn(number, **draw)
    elif name == "BERT multiple choice":
        many = torch.randint(5, VOCABULARY, (number, 3, TOKENS), **draw)
        batch = {"input_ids": many, "attention_mask": torch.ones_like(many)}
        batch["labels"] = torch.randint(0, 3, (number,), **draw)
    elif name.endswith(" classification") and "token" not in name:
        batch["labels"] = torch.randint(0, 3, (number,), **draw)
    elif "token" in name:
        batch["labels"] = torch.randint(0, 5, (number, TOKENS), **draw).masked_fill(mask == 0, -100)
    elif "masked" in name:
        hidden = (torch.rand(ids.shape, **draw) < 0.4) & (mask == 1)
        hidden[:, 1] = True
        batch["labels"] = ids.masked_fill(~hidden, -100)
    else:
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    return [{key: value[row] for key, value in batch.items()} for row in range(number)]


def flat(tensors: Any) -> Tensor:
    whole = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in tensors if each is not None]
    return torch.cat([each.detach().flatten().clone() for each in whole])


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def full_batch_gradient(name: str) -> tuple[Tensor, float]:
    """Return the gradient and the loss of plain PyTorch on all rows at once."""
    model, rows = model_of(name), rows_of(name)
    loss = model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss
    loss.backward()
    return flat(each.grad for each in model.parameters()), loss.item()


class Watch(TrainerCallback):
    """Keep the gradient of every step, as the optimizer gets it, and what callbacks are told."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.told: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append(flat(each.grad for each in model.parameters()))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(f"step {state.global_step}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(f"evaluate {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append(f"save {state.global_step}")


class Run:
    """One run of a trainer.

    Attributes:
        trainer: The trainer, after its run.
        history: What it logged, without times.
        weights: The weights at the end.
    """

    def __init__(
        self,
        kind: Any,
        name: str,
        folder: Path,
        *,
        batch: int,
        steps: int = 1,
        rows: int = 8,
        together: int = 1,
        resume: str | None = None,
        change: Callable[[Any], None] | None = None,
        args: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        chosen: dict[str, Any] = {
            "gradient_accumulation_steps": together,
            "learning_rate": 0.5,
            "optim": "sgd",
            "logging_steps": 1,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **(args or {}),
        }
        self.watch = Watch()
        arguments = TrainingArguments(str(folder), per_device_train_batch_size=batch, max_steps=steps, **chosen)
        data = rows_of(name, rows)
        self.trainer: Any = kind(
            model=model_of(name), args=arguments, train_dataset=data, callbacks=[self.watch], **more
        )
        if change is not None:
            change(self.trainer)
        self.trainer.train(resume_from_checkpoint=resume)
        times = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime"}
        times |= {"eval_samples_per_second", "eval_steps_per_second", "train_tokens_per_second"}
        log = self.trainer.state.log_history
        self.history = [{key: value for key, value in line.items() if key not in times} for line in log]
        self.weights = flat(self.trainer.model.parameters())


def furthest(found: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    """Return the largest relative difference between two histories, which have the same lines."""
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    pairs = [(x[key], y[key]) for x, y in zip(found, expected, strict=True) for key in x]
    return max(abs(x - y) / max(abs(y), 1e-2) for x, y in pairs)
