"""TRL's trainers with exact windows: the gradient and every metric are those of a run with the whole batch."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import trl as installed
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tests.faults import FULL
from tests.integrations.tiny_models import Watch, flat, furthest, off
from tests.ranks.conftest import run_ranks_
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from microbatch.errors import ConfigError
from microbatch.integrations.transformers import MicrobatchMixin as TrainerMixin
from microbatch.integrations.trl import (
    MicrobatchDPOTrainer,
    MicrobatchMixin,
    MicrobatchRewardTrainer,
    MicrobatchSFTTrainer,
)
from microbatch.warned import MicrobatchWarning

disable_progress_bars()
trl: Any = installed  # which exports its names lazily, where type checkers see none

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")

EXACT = 2e-6
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "far", "home", "and", "slept"]
STEPS = 3


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - a word, not a password
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def text(random: torch.Generator, least: int, most: int) -> str:
    number = int(torch.randint(least, most + 1, (1,), generator=random))
    return " ".join(WORDS[each] for each in torch.randint(0, len(WORDS), (number,), generator=random).tolist())


def texts(number: int, *, pairs: bool) -> Dataset:
    random = torch.Generator().manual_seed(3)
    rows: list[dict[str, Any]] = []
    for _ in range(number):
        row = {"prompt": text(random, 1, 5) + " "}
        names = ("chosen", "rejected") if pairs else ("completion",)
        rows.append(row | {name: text(random, 1, 9) for name in names})
    return Dataset.from_list(rows)


def model(kind: Any = LlamaForCausalLM, *, seed: int = 0, **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 13}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0}
    made = kind(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=1, **more))
    for parameter in made.parameters():
        parameter.data *= 3 if parameter.ndim > 1 else 1  # so that rows have different losses
    return made


KINDS: dict[str, Any] = {
    "SFT": (trl.SFTTrainer, MicrobatchSFTTrainer, trl.SFTConfig),
    "DPO": (trl.DPOTrainer, MicrobatchDPOTrainer, trl.DPOConfig),
    "reward": (trl.RewardTrainer, MicrobatchRewardTrainer, trl.RewardConfig),
}
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


class Run:
    """One run of a trainer of TRL."""

    def __init__(
        self, name: str, folder: Path, *, ours: bool, batch: int, together: int = 1, lora: bool = False, **more: Any
    ) -> None:
        kind = KINDS[name][1 if ours else 0]
        kind = more.pop("kind", kind)
        arguments = KINDS[name][2](
            str(folder),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=together,
            max_steps=STEPS,
            logging_steps=1,
            learning_rate=0.05,
            optim="sgd",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
            activation_checkpointing=False,
            max_grad_norm=0.5,
            **more.pop("args", {}),
        )
        self.watch = Watch()
        if lora:
            more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        elif name == "DPO":
            more["ref_model"] = model(seed=1)
        classifier = {"num_labels": 1} if name == "reward" else {}
        torch.manual_seed(5)
        self.trainer = kind(
            model=model(LlamaForSequenceClassification if classifier else LlamaForCausalLM, **classifier),
            args=arguments,
            train_dataset=more.pop("data", None) or texts(24, pairs=name != "SFT"),
            processing_class=tokenizer(),
            callbacks=[self.watch],
            **more,
        )
        self.trainer.train()
        log = self.trainer.state.log_history
        self.history = [{key: line[key] for key in line if key not in TIMES} for line in log]
        self.weights = flat(each for each in self.trainer.model.parameters() if each.requires_grad)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("SFT", {}),
        ("SFT", {"lora": True}),
        ("SFT", {"args": {"loss_type": "dft"}}),
        ("DPO", {}),
        ("DPO", {"lora": True}),
        ("DPO", {"args": {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.5}}),
        ("DPO", {"args": {"precompute_ref_log_probs": True}}),
        ("reward", {}),
        ("reward", {"args": {"center_rewards_coefficient": 0.1}}),
    ],
)
def test_gradients_and_every_metric_are_the_whole_batchs(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    whole = Run(name, tmp_path, ours=False, batch=8, **more)
    found = Run(name, tmp_path, ours=True, batch=4, together=2, microbatch_size=3, **more)
    assert max(map(off, found.watch.gradients, whole.watch.gradients)) < EXACT
    assert off(found.weights, whole.weights) < EXACT
    assert furthest(found.history, whole.history) < 10 * EXACT
    assert len(whole.history[0]) >= 8  # the metrics are there


@pytest.mark.parametrize("name", KINDS)
def test_what_the_trainer_averages_itself_is_another_number(name: str, tmp_path: Path) -> None:
    whole = Run(name, tmp_path, ours=False, batch=8)
    own = Run(name, tmp_path, ours=False, batch=2, together=4)
    assert furthest(own.history, whole.history) > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_memory_that_ends_changes_no_metric(name: str, tmp_path: Path) -> None:
    class Forgets(KINDS[name][1]):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.calls += torch.is_grad_enabled()  # not where the count is asked for
            if torch.is_grad_enabled() and self.calls in {
                2,
                9,
            }:  # after the trainer has noted this microbatch's metrics
                raise copy.copy(FULL)
            return loss

    count: Any = "auto" if name == "SFT" else lambda batch: len(batch["input_ids"]) // 2
    found = Run(name, tmp_path, ours=True, batch=8, microbatch_size=4, kind=Forgets, count=count)
    small = Run(name, tmp_path, ours=True, batch=8, microbatch_size=2)
    whole = Run(name, tmp_path, ours=False, batch=8)
    assert torch.equal(found.watch.gradients[0], small.watch.gradients[0])
    assert furthest(found.history, whole.history) < 10 * EXACT


def on_two_ranks(rank: int, ranks: int) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(ranks)}
    folder = Path(tempfile.mkdtemp())
    found = {name: Run(name, folder, ours=True, batch=4, microbatch_size=[3, 1][rank]) for name in KINDS}
    return {name: {"weights": run.weights, "history": run.history} for name, run in found.items()}


def test_two_ranks_log_what_one_does(tmp_path: Path) -> None:
    alone = {name: Run(name, tmp_path, ours=False, batch=8) for name in KINDS}
    for found in run_ranks_(on_two_ranks, 2, tmp_path / "ranks", timeout=180):
        for name, whole in alone.items():
            assert off(found[name]["weights"], whole.weights) < EXACT
            assert furthest(found[name]["history"], whole.history) < 10 * EXACT


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sft"])
def test_losses_that_are_no_mean_over_pairs_are_refused(loss: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"loss_type='{loss}' is no mean over pairs"):
        Run("DPO", tmp_path, ours=True, batch=8, args={"loss_type": [loss]})


@pytest.mark.parametrize("theirs", [trl.GRPOTrainer, trl.RLOOTrainer])
def test_trainers_that_generate_are_refused(theirs: Any) -> None:
    class Ours(MicrobatchMixin, theirs):
        pass

    with pytest.raises(ConfigError, match=f"{theirs.__name__} is not supported.*SFTTrainer, DPOTrainer"):
        Ours(model(), args=trl.GRPOConfig("unused", use_cpu=True, bf16=False))


def test_a_trainer_that_extends_a_known_one_with_another_loss_is_refused() -> None:
    class OtherTrainer(trl.DPOTrainer):
        __module__ = "trl.experimental.other"

    class Ours(MicrobatchMixin, OtherTrainer):
        pass

    with pytest.raises(ConfigError, match="OtherTrainer is not supported"):
        Ours(model())


def test_the_adapter_of_transformers_names_this_one(tmp_path: Path) -> None:
    class Ours(TrainerMixin, trl.SFTTrainer):
        pass

    with pytest.raises(ConfigError, match=r"SFTTrainer.*microbatch\.integrations\.trl"):
        Run("SFT", tmp_path, ours=True, batch=8, kind=Ours)


def test_a_loss_of_ones_own_is_asked_about(tmp_path: Path) -> None:
    class ByRow(trl.SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = None, **_: Any) -> Any:
            labels = inputs["labels"][:, 1:]
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
            return (each / (labels != -100).sum(1)).mean()

    class Ours(MicrobatchMixin, ByRow):
        pass

    expected = Run("SFT", tmp_path, ours=False, batch=8, kind=ByRow).watch.gradients[0]
    run = Run("SFT", tmp_path, ours=True, batch=8, kind=Ours, microbatch_size=3)
    assert off(run.watch.gradients[0], expected) < 1e-5

    class Pairs(KINDS["DPO"][1]):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(ConfigError, match=r"Pairs has a compute_loss of its own.*// 2"):
        Run("DPO", tmp_path, ours=True, batch=8, kind=Pairs)
    Run("DPO", tmp_path, ours=True, batch=8, kind=Pairs, count=lambda batch: len(batch["input_ids"]) // 2)


def test_activations_are_offloaded_by_the_accumulator(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'"offload": "activations"'):
        Run("SFT", tmp_path, ours=True, batch=8, args={"activation_offloading": True})


def test_rows_that_are_joined_are_said_to_be_one(tmp_path: Path) -> None:
    with pytest.warns(MicrobatchWarning, match="joins the rows of a batch to one row"):
        Run("SFT", tmp_path, ours=True, batch=2, together=4, args={"padding_free": True, "max_length": None})
