"""Transformers' Trainer with exact windows: every head, whole runs, ranks, memory that ends, and what is refused."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.faults import FULL, FullInBackward
from tests.integrations.tiny_models import (
    Run,
    Watch,
    flat,
    full_batch_gradient,
    furthest,
    model_of,
    off,
    rows_of,
)
from tests.ranks.conftest import run_ranks_
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from microbatch.errors import ConfigError, LossError, MicrobatchError
from microbatch.integrations.transformers import MicrobatchMixin, MicrobatchTrainer

EXACT = 1e-6
HEADS = [
    *["BERT classification", "BERT regression", "BERT token classification", "BERT masked LM", "BERT multiple choice"],
    *["Llama classification", "Llama regression", "Llama LM", "Qwen2 LM", "GPT-2 LM", "T5", "CTC"],
]
RIGHT_ALREADY = {"Llama LM", "Qwen2 LM"}
NAME, ROWS, STEPS = "BERT masked LM", 36, 6
LONG: dict[str, Any] = {"steps": STEPS, "rows": ROWS, "args": {"max_grad_norm": 0.5}}


# -- every head, one step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_every_head_has_the_full_batchs_gradient(name: str, tmp_path: Path) -> None:
    expected, loss = full_batch_gradient(name)
    run = Run(MicrobatchTrainer, name, tmp_path, batch=4, together=2, microbatch_size=3)  # as 3, 1, 3 and 1 rows
    assert off(run.watch.gradients[0], expected) < EXACT
    assert run.history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert run.history[0]["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-5)
    assert run.trainer.last_step.microbatches == 4
    own = Run(Trainer, name, tmp_path, batch=2, together=4)
    assert (off(own.watch.gradients[0], expected) < EXACT) == (name in RIGHT_ALREADY)


def test_the_router_of_experts_needs_shared_statistics(tmp_path: Path) -> None:
    expected, loss = full_batch_gradient("Mixtral")
    exact: dict[str, Any] = {"microbatch_size": 3, "accumulator": {"batch_norm": "exact"}}
    run = Run(MicrobatchTrainer, "Mixtral", tmp_path, batch=8, **exact)
    assert off(run.watch.gradients[0], expected) < EXACT
    assert run.history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    with pytest.raises(LossError, match=r'MixtralForCausalLM contains its router.*batch_norm="exact"'):
        Run(MicrobatchTrainer, "Mixtral", tmp_path, batch=8, microbatch_size=3)


def test_label_smoothing_and_losses_of_ones_own(tmp_path: Path) -> None:
    def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    ways: list[dict[str, Any]] = [{"args": {"label_smoothing_factor": 0.1}}, {"compute_loss_func": own_loss}]
    for way in ways:
        whole = Run(Trainer, NAME, tmp_path, batch=8, **way)
        cut = Run(MicrobatchTrainer, NAME, tmp_path, batch=8, microbatch_size=3, **way)
        assert off(cut.watch.gradients[0], whole.watch.gradients[0]) < EXACT


def test_a_count_may_be_given(tmp_path: Path) -> None:
    expected, _ = full_batch_gradient(NAME)
    run = Run(MicrobatchTrainer, NAME, tmp_path, batch=8, microbatch_size=3, count="labels")
    assert off(run.watch.gradients[0], expected) < EXACT
    wrong = Run(MicrobatchTrainer, NAME, tmp_path, batch=8, microbatch_size=3, count="rows")
    assert off(wrong.watch.gradients[0], expected) > 1e-2


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the plain trainer on whole batches."""
    return Run(Trainer, NAME, tmp_path_factory.mktemp("whole"), batch=12, **LONG)


@pytest.mark.parametrize(("batch", "together", "size"), [(12, 1, 5), (12, 1, "auto"), (4, 3, 3), (4, 3, "auto")])
def test_a_run_is_that_of_the_whole_batch(whole: Run, tmp_path: Path, batch: int, together: int, size: Any) -> None:
    run = Run(MicrobatchTrainer, NAME, tmp_path, batch=batch, together=together, microbatch_size=size, **LONG)
    steps = [{key: line[key] for key in line if key != "total_flos"} for line in run.history]
    assert furthest(steps, [{k: line[k] for k in line if k != "total_flos"} for line in whole.history]) < EXACT
    assert off(run.weights, whole.weights) < EXACT
    assert run.watch.told == whole.watch.told


def test_a_run_that_the_trainer_accumulates_itself_is_another(whole: Run, tmp_path: Path) -> None:
    own = Run(Trainer, NAME, tmp_path, batch=4, together=3, **LONG)
    assert off(own.weights, whole.weights) > 1e-4


def test_evaluations_and_schedules_are_the_whole_runs(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        **LONG,
        "eval_dataset": rows_of(NAME, 10),
        "args": {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "include_num_input_tokens_seen": "non_padding",
            "save_strategy": "steps",
            "save_steps": 3,
        },
    }
    plain = Run(Trainer, NAME, tmp_path / "plain", batch=12, **more)
    run = Run(MicrobatchTrainer, NAME, tmp_path / "ours", batch=12, microbatch_size=5, **more)
    assert furthest(run.history, plain.history) < 2e-6
    assert run.watch.told == plain.watch.told
    assert run.trainer.state.num_input_tokens_seen == plain.trainer.state.num_input_tokens_seen
    names = [
        {each.name for each in (path / "checkpoint-3").iterdir()} for path in (tmp_path / "ours", tmp_path / "plain")
    ]
    assert names[0] - names[1] == {"microbatch_0.json"}


class Forgets(MicrobatchTrainer):
    """Memory ends at the calls of these numbers, in training."""

    at: tuple[int, ...] = ()
    where = "forward"
    calls = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        number, self.calls = self.calls, self.calls + 1
        if number in self.at and self.where == "forward":
            raise copy.copy(FULL)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return FullInBackward.apply(loss) if number in self.at else loss


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_that_ends_changes_nothing_but_the_size(whole: Run, tmp_path: Path, where: str) -> None:
    def forget(trainer: Any) -> None:
        trainer.at, trainer.where = (1,), where

    run = Run(Forgets, NAME, tmp_path, batch=12, microbatch_size=6, change=forget, **LONG)
    small = Run(MicrobatchTrainer, NAME, tmp_path, batch=12, microbatch_size=3, **LONG)
    assert run.trainer.accumulator.microbatch_size == 3
    assert torch.equal(run.weights, small.weights)
    assert run.history == small.history
    assert off(run.weights, whole.weights) < EXACT


def test_every_checkpoint_resumes_to_the_same_bits_with_the_size_that_was_found(tmp_path: Path) -> None:
    def forget(trainer: Any) -> None:
        trainer.at = (3,)

    more: dict[str, Any] = {**LONG, "args": {"save_strategy": "steps", "save_steps": 1, "max_grad_norm": 0.5}}
    run = Run(Forgets, NAME, tmp_path, batch=12, microbatch_size=6, change=forget, **more)
    for step in range(1, STEPS):
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        again = Run(MicrobatchTrainer, NAME, tmp_path / "again", batch=12, microbatch_size=6, resume=checkpoint, **more)
        assert again.trainer.accumulator.microbatch_size == (
            6 if step < 2 and not again.trainer.last_step.retries else 3
        )
        if step >= 2:
            assert torch.equal(again.weights, run.weights)
            assert again.history[:STEPS] == run.history[:STEPS]
    Path(tmp_path / "checkpoint-4" / "microbatch_0.json").unlink()  # of a trainer without microbatches
    checkpoint = str(tmp_path / "checkpoint-4")
    again = Run(MicrobatchTrainer, NAME, tmp_path / "again", batch=12, microbatch_size=6, resume=checkpoint, **more)
    assert not torch.equal(again.weights, run.weights)  # other sizes round differently
    assert off(again.weights, run.weights) < EXACT


class Endless(IterableDataset[Any]):
    """Data without a length, whose last step is short."""

    def __iter__(self) -> Iterator[Any]:
        return iter(rows_of(NAME, 10))


def test_the_short_last_step_of_data_without_a_length_is_taken_whole(tmp_path: Path) -> None:
    def stream(trainer: Any) -> None:
        trainer.train_dataset = Endless()

    run = Run(MicrobatchTrainer, NAME, tmp_path, batch=4, together=2, steps=2, change=stream)
    model, rows = model_of(NAME), rows_of(NAME, 10)
    for step, part in enumerate((rows[:8], rows[8:])):
        model.zero_grad()
        model(**{key: torch.stack([row[key] for row in part]) for key in part[0]}).loss.backward()
        assert off(run.watch.gradients[step], flat(each.grad for each in model.parameters())) < 2e-6
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=(0.5, 0.25)[step])


def test_bf16_is_the_whole_batchs_in_that_precision(tmp_path: Path) -> None:
    more: dict[str, Any] = {"args": {"bf16": True}}
    expected, _ = full_batch_gradient(NAME)
    own = Run(Trainer, NAME, tmp_path, batch=8, **more)
    run = Run(MicrobatchTrainer, NAME, tmp_path, batch=8, microbatch_size=3, **more)
    assert off(run.watch.gradients[0], expected) <= 1.5 * off(own.watch.gradients[0], expected) + 2**-9
    wrong = Run(Trainer, NAME, tmp_path, batch=2, together=4, **more)
    assert off(wrong.watch.gradients[0], expected) > 0.5


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_a_loss_scale_is_used_and_skips_steps_that_overflow(tmp_path: Path, max_grad_norm: float) -> None:
    scalers: list[Any] = []

    def scaled(trainer: Any) -> None:  # what Accelerate does on a GPU with fp16=True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124, growth_interval=2)
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
        scalers.append(trainer.accelerator.scaler)

    more: dict[str, Any] = {**LONG, "args": {"max_grad_norm": max_grad_norm}, "change": scaled}
    plain = Run(Trainer, NAME, tmp_path, batch=12, **more)
    run = Run(MicrobatchTrainer, NAME, tmp_path, batch=12, microbatch_size=5, **more)
    assert off(run.weights, plain.weights) < EXACT
    assert [line.get("learning_rate") for line in run.history] == [line.get("learning_rate") for line in plain.history]
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert scalers[0].get_scale() != 2.0**124


# -- ranks -------------------------------------------------------------------------------------------------------------


def every_case(rank: int, ranks: int) -> dict[str, Any]:
    """Train on rows of different numbers of labels, in microbatches of different sizes, in every way."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(ranks)}
    folder, size = Path(tempfile.mkdtemp()), [3, 2][rank]
    shared, saving = Path(sys.argv[-1]) / "run", {"max_grad_norm": 0.5, "save_strategy": "steps", "save_steps": 4}
    kept: dict[str, Any] = {**LONG, "args": saving, "batch": 6, "microbatch_size": size}

    def told(run: Run) -> dict[str, Any]:
        steps = [line for line in run.history if "loss" in line]
        return {"weights": run.weights, "steps": steps, "wrapped": type(run.trainer.model_wrapped).__name__}

    def forget(trainer: Any) -> None:
        trainer.at, trainer.where = ((2,) if rank else ()), "backward"

    found = {
        "plain": Run(Trainer, NAME, folder, batch=6, **LONG),
        "cut": Run(MicrobatchTrainer, NAME, folder, batch=6, microbatch_size=size, **LONG),
        "joined": Run(MicrobatchTrainer, NAME, folder, batch=3, together=2, **LONG),
        "forgetting": Run(Forgets, NAME, folder, batch=6, microbatch_size=size, change=forget, **LONG),
        "saved": Run(MicrobatchTrainer, NAME, shared, **kept),
        "resumed": Run(MicrobatchTrainer, NAME, folder, resume=str(shared / "checkpoint-4"), **kept),
        "sharded": Run(MicrobatchTrainer, "Llama LM", folder, batch=6, microbatch_size=size, change=shard, **LONG),
    }
    return {name: told(run) for name, run in found.items()}


def shard(trainer: Any) -> None:
    """Do what Accelerate does with ``fsdp=`` on GPUs; on CPUs it ignores the argument."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
    state._shared_state["fsdp_plugin"] = state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    trainer.is_fsdp_enabled = True


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case of `every_case` on two ranks."""
    return run_ranks_(every_case, 2, tmp_path_factory.mktemp("ranks"), timeout=180)


@pytest.mark.parametrize("case", ["cut", "joined", "forgetting"])
def test_two_ranks_with_uneven_tokens_are_one_batch(case: str, on_ranks: list[Any], whole: Run) -> None:
    for found in on_ranks:
        assert found[case]["wrapped"] == "DistributedDataParallel"
        assert off(found[case]["weights"], whole.weights) < EXACT
        assert furthest(found[case]["steps"], [line for line in whole.history if "loss" in line]) < EXACT
        assert off(found["plain"]["weights"], whole.weights) > 1e-4


def test_two_ranks_resume_to_the_same_bits(on_ranks: list[Any]) -> None:
    for found in on_ranks:
        assert torch.equal(found["resumed"]["weights"], found["saved"]["weights"])


def test_a_fully_sharded_model_is_exact(on_ranks: list[Any], tmp_path: Path) -> None:
    plain = Run(Trainer, "Llama LM", tmp_path, batch=12, **LONG)
    for found in on_ranks:
        assert found["sharded"]["wrapped"].startswith("FSDP")
        assert off(found["sharded"]["weights"], plain.weights) < EXACT


# -- what is refused, before the first step ----------------------------------------------------------------------------


def refused(match: str, tmp_path: Path, *, kind: Any = MicrobatchTrainer, name: str = NAME, **more: Any) -> None:
    changed = more.pop("args", {})
    seen: list[Any] = []

    class Seen(kind):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(self)
            return super().create_optimizer(*args, **kwargs)

    with pytest.raises(MicrobatchError, match=match):
        Run(Seen, name, tmp_path, batch=8, args=changed, **more)
    assert all(trainer.state.global_step == 0 for trainer in seen)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"auto_find_batch_size": True}, r"auto_find_batch_size=True.*False"),
        ({"torch_compile": True}, r'accumulator=\{"compile": True\}'),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"}, "steps inside backward"),
    ],
)
def test_arguments_that_do_not_go_with_a_window(args: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(match, tmp_path, args=args)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"args._n_gpu": 2}, "nn.DataParallel on 2 devices.*torchrun"),
        ({"is_deepspeed_enabled": True}, r"mb\.DeepSpeed\(engine\)"),
        ({"is_distributed_loading_by_transformers": True}, "load it whole"),
        ({"is_model_parallel": True}, "device_map"),
        ({"accelerator.state._mixed_precision": "fp8"}, "fp8.*bf16"),
    ],
)
def test_devices_that_do_not_go_with_a_window(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    from microbatch.integrations.trainer_limits import check_trainer

    trainer = MicrobatchTrainer(model_of(NAME), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    for path, value in change.items():
        *parents, last = path.split(".")
        owner: Any = trainer
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, value)
    with pytest.raises(ConfigError, match=match):
        check_trainer(trainer, MicrobatchMixin)


def test_losses_that_are_no_mean_are_refused(tmp_path: Path) -> None:
    refused("ctc_loss_reduction", tmp_path, name="CTC added", microbatch_size=3)
    refused(r"must not be 'tokens'", tmp_path, count="tokens")


def test_a_training_step_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    class Theirs(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return super().training_step(*args, **kwargs)

    class Lost(MicrobatchMixin, Theirs):
        pass

    class Kept(MicrobatchMixin, Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return super().training_step(*args, **kwargs)

    refused("Theirs overrides training_step", tmp_path, kind=Lost)
    expected, _ = full_batch_gradient(NAME)
    assert off(Run(Kept, NAME, tmp_path, batch=8, microbatch_size=3).watch.gradients[0], expected) < EXACT


def test_a_training_step_without_a_window_is_refused(tmp_path: Path) -> None:
    class Own(MicrobatchTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    refused(r"Own overrides training_step.*super\(\)\.training_step", tmp_path, kind=Own)


class Divides(Trainer):
    """A loss of one's own that always divides by the number of items."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: Any = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        labels, outputs = inputs.pop("labels"), model(**inputs)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
        if not return_outputs and model.training:
            logs: dict[str, Any] = {"mine": loss.item(), "note": "same"}
            self.log(logs)
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_divides_by_the_items_gets_them_and_logs_once_a_step(tmp_path: Path) -> None:
    class Ours(MicrobatchMixin, Divides):
        pass

    expected, loss = full_batch_gradient("Llama LM")
    run = Run(Ours, "Llama LM", tmp_path, batch=4, together=2, microbatch_size=3)
    assert off(run.watch.gradients[0], expected) < EXACT
    (mine,) = [line for line in run.history if "mine" in line]
    assert mine["mine"] == pytest.approx(loss, rel=1e-5)
    assert mine["note"] == "same"
    rows: Any = rows_of("Llama LM")
    plain = Run(Divides, "Llama LM", tmp_path, batch=8)
    assert run.trainer.evaluate(rows)["eval_loss"] == pytest.approx(plain.trainer.evaluate(rows)["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["BERT classification", "BERT regression"])
def test_rows_of_all_batches_of_a_step_are_asked_about(name: str, tmp_path: Path) -> None:
    expected, _ = full_batch_gradient(name)
    run = Run(MicrobatchTrainer, name, tmp_path, batch=1, together=8)
    assert off(run.watch.gradients[0], expected) < EXACT


class Packed(nn.Module):
    """A model with images of all rows in one tensor."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.language = model_of("Llama LM")

    def forward(self, pixels: Tensor, image: Tensor, **given: Any) -> Any:
        outputs = self.language(**given)
        outputs.loss = outputs.loss * (1 + 0 * pixels.sum() * image.sum())
        return outputs


def packed(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "pixels": torch.ones(3 * len(rows) + 1, 5), "image": torch.ones(len(rows))}


def test_a_batch_that_cannot_be_cut_is_a_microbatch_or_refused(tmp_path: Path) -> None:
    def run(batch: int, together: int) -> Watch:
        args = TrainingArguments(
            str(tmp_path / str(batch)),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=together,
            max_steps=1,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
        )
        watch, rows = Watch(), rows_of("Llama LM")
        MicrobatchTrainer(Packed(), args, packed, rows, callbacks=[watch]).train()
        return watch

    expected, _ = full_batch_gradient("Llama LM")
    assert off(run(2, 4).gradients[0], expected) < EXACT
    with pytest.raises(ConfigError, match=r"pixels: 25.*gradient_accumulation_steps=N"):
        run(8, 1)


def test_errors_name_the_trainers_arguments(tmp_path: Path) -> None:
    class Broken(MicrobatchTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * torch.inf

    with pytest.raises(MicrobatchError, match=r'accumulator=\{"nonfinite": "skip"\}'):
        Run(Broken, NAME, tmp_path, batch=8, microbatch_size=3, count="labels")


def test_options_that_the_trainer_sets_are_refused(tmp_path: Path) -> None:
    refused("accumulator= does not take 'max_grad_norm'", tmp_path, accumulator={"max_grad_norm": 1.0})
    refused("no option 'micro_batch_size'", tmp_path, accumulator={"micro_batch_size": 1})
