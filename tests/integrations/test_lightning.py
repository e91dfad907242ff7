"""Lightning: whole runs in microbatches beside the run of whole batches, and beside Lightning's own accumulation."""

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.faults import RunsOut
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import microbatch as mb

pytest.importorskip("lightning")
pytest.importorskip("torchdata")
import lightning.pytorch as pl
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.wrappers import _FabricOptimizer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed.fsdp import fully_shard
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics.classification import MulticlassAccuracy

from microbatch.integrations.lightning import Microbatch
from microbatch.step.plain_optimizers import plain_optimizers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*ModelCheckpoint.*is not empty"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.set_vital. is deprecated"),  # of torchdata
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:You are using the .dataloader_iter. step flavor"),
    pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step"),  # after an overflow
]

_STRATEGY: Any = SingleDeviceStrategy()
ROWS = 34
TOKENS, WIDTH = 9, 6


def data(*, ragged: bool = True) -> TensorDataset:
    """Sequences with 1 to 9 tokens, so that no two microbatches have the same count; or one target a row."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    if not ragged:
        return TensorDataset(x, torch.randn(ROWS, 4, generator=generator, dtype=torch.float64))
    lengths = torch.randint(1, TOKENS + 1, (ROWS,), generator=generator)
    labels = torch.randint(4, (ROWS, TOKENS), generator=generator)
    return TensorDataset(x, labels.masked_fill(torch.arange(TOKENS) >= lengths[:, None], -100))


class Tagger(pl.LightningModule):
    """A mean over tokens, as everyone writes it; with ``counted`` as a sum with its count."""

    def __init__(self, *, counted: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.counted = counted
        self.net = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 8), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 4)
        ).double()
        self.accuracy = MulticlassAccuracy(4, average="micro", ignore_index=-100)
        self.history: list[dict[str, float]] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, labels = batch
        logits = self.net(x)
        self.accuracy(logits.flatten(0, 1), labels.flatten())
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("rows", float(len(x)), on_step=True, on_epoch=True, reduce_fx="sum")
        self.log("largest", logits.max(), False, None, True, True, "max")
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.log("loss", loss, on_step=True, on_epoch=True)
        if not self.counted:
            return loss
        return {"loss": mb.Loss(sum=loss * (n := (labels != -100).sum()), count=n), "rows": labels, "mean": loss}

    def on_after_backward(self) -> None:
        self.norms.append(
            float(torch.nn.utils.get_total_norm([each.grad for each in self.net.parameters() if each.grad is not None]))
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.history.append({name: value.item() for name, value in self.trainer.callback_metrics.items()})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Whole(Tagger):
    """The same without the callback: Lightning wants a tensor."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = super().training_step(batch, batch_idx)
        return output["loss"].mean if isinstance(output, dict) else output


class Rows(Tagger):
    def __init__(self) -> None:
        super().__init__(counted=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, labels = batch
        loss = (self.net(x).mean(1) - labels).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "rows": x[:, 0, 0], "mean": loss, "name": "text"}


def trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    given: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": 0.5,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**given, **options})


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([each.detach().double().flatten() for each in module.parameters()])


def fit(
    make: Callable[[], pl.LightningModule], *callbacks: Any, batch_size: int = 12, ckpt: Any = None, **options: Any
) -> Any:
    torch.manual_seed(0)
    module = make()
    run = trainer(*callbacks, **options)
    run.fit(module, StatefulDataLoader(data(ragged=not isinstance(module, Rows)), batch_size), ckpt_path=ckpt)
    return module


def distance(one: Any, other: Any) -> float:
    return float((weights(one) - weights(other)).norm() / weights(other).norm())


def apart(one: Any, other: Any) -> float:
    """The largest difference between two histories of logged values."""
    assert [each.keys() for each in one.history] == [each.keys() for each in other.history]
    pairs = zip(one.history, other.history, strict=True)
    return max(abs(a[name] - b[name]) for a, b in pairs for name in a)


@pytest.mark.parametrize("microbatch_size", [1, 5, "auto"])
def test_a_run_is_the_run_of_whole_batches(microbatch_size: int | str) -> None:
    whole, ours = fit(Whole), fit(Tagger, Microbatch(microbatch_size))
    assert distance(ours, whole) < 1e-12
    assert ours.norms == pytest.approx(whole.norms, rel=1e-10)
    assert len(ours.history) == 6


@pytest.mark.parametrize("microbatch_size", [5, "auto"])
def test_what_is_logged_is_the_windows(microbatch_size: int | str) -> None:
    assert apart(fit(Tagger, Microbatch(microbatch_size)), fit(Whole)) < 1e-6  # metrics are kept in float32


def test_several_batches_are_one_window() -> None:
    whole = fit(Whole)
    ours = fit(Tagger, Microbatch(5), batch_size=4, accumulate_grad_batches=3)
    theirs = fit(Whole, batch_size=4, accumulate_grad_batches=3)
    assert distance(ours, whole) < 1e-12
    assert distance(theirs, whole) > 1e-3
    steps = ours.history[2::3]  # 9 batches an epoch, in windows of 3
    assert [each["loss_step"] for each in steps] == pytest.approx([each["loss_step"] for each in whole.history])


def test_a_mean_over_rows_needs_no_count() -> None:
    whole, ours = fit(Rows), fit(Rows, Microbatch(5))
    assert distance(ours, whole) < 1e-12
    assert apart(ours, whole) < 1e-6
    # 34 rows in batches of 4, three at a time: the last window has 10 rows, and Lightning divides it by 3.
    joined, theirs = (fit(Rows, *each, batch_size=4, accumulate_grad_batches=3) for each in ([Microbatch(5)], []))
    assert distance(joined, whole) < 1e-12
    assert distance(theirs, whole) > 1e-4


@pytest.mark.parametrize("accumulated", [1, 3])
def test_hooks_are_called_as_often_and_backwards_once_a_step(accumulated: int) -> None:
    names = ["on_before_zero_grad", "optimizer_zero_grad", "on_train_batch_start", "on_before_optimizer_step"]
    names += ["on_train_batch_end", "on_before_backward", "on_after_backward"]

    class Counts(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.calls: dict[str, int] = dict.fromkeys(names, 0)
            self.seen: list[float] = []
            for name in names:
                setattr(self, name, partial(self._call, name, getattr(self, name)))

        def _call(self, name: str, function: Callable[..., None], *args: Any, **rest: Any) -> None:
            self.calls[name] += 1
            grad = next(self.net.parameters()).grad
            if name == "on_before_zero_grad" and grad is not None:
                self.seen.append(float(grad.norm()))
            function(*args, **rest)

    options: dict[str, Any] = {"batch_size": 12 // accumulated, "accumulate_grad_batches": accumulated}
    ours, theirs, whole = fit(Counts, Microbatch(5), **options), fit(Counts, **options), fit(Counts)
    assert [ours.calls[name] for name in names[:5]] == [theirs.calls[name] for name in names[:5]]
    assert [ours.calls[name] for name in names[5:]] == [6, 6]
    assert ours.seen == pytest.approx(whole.seen)  # the gradient of the last step
    assert len(ours.seen) == 5


class LogsItself(Rows):
    """A module with a `log` of its own, and arguments by position."""

    def log(self, name: str, value: Any, *args: Any, **rest: Any) -> None:
        super().log("own " + name, value, *args, **rest)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        self.log("total", output["loss"].detach() * len(batch[0]), False, None, True, True, "sum")
        self.log("shown", output["loss"], True)
        return output


def test_a_log_of_the_modules_own_gets_the_windows_values() -> None:
    ours, whole = fit(LogsItself, Microbatch(5)), fit(LogsItself)
    assert apart(ours, whole) < 1e-6
    assert "own shown" in ours.history[0]


def test_what_is_returned_beside_the_loss_is_joined() -> None:
    class Keeps(Rows):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.kept = outputs, batch

    kept = fit(Keeps, Microbatch(5)).kept
    assert torch.equal(kept[0]["rows"], kept[1][0][:, 0, 0])
    assert kept[0]["mean"].item() == pytest.approx(kept[0]["loss"].item())
    assert kept[0]["name"] == ["text"] * 2


@pytest.mark.parametrize("at", [(3,), (40,), (8, 30)])
def test_memory_that_ends_leaves_the_same_history(at: tuple[int, ...]) -> None:
    full = RunsOut(*at)

    class Ends(Tagger):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            full.armed = True
            return super().training_step(batch, batch_idx)

    with full:
        ours = fit(Ends, Microbatch(12))
    assert len(full.refused) == len(at)
    whole = fit(Whole)
    assert distance(ours, whole) < 1e-12
    assert apart(ours, whole) < 1e-6


def test_a_loss_that_is_missing_contributes_nothing() -> None:
    class Misses(Rows):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if bool(batch[0][0, 0, 0] < 0) else super().training_step(batch, batch_idx)

    by_row = fit(Misses, Microbatch(1))

    class Selects(Rows):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            kept = batch[0][:, 0, 0] >= 0
            return super().training_step([each[kept] for each in batch], batch_idx)

    assert distance(by_row, fit(Selects)) < 1e-12


@pytest.mark.filterwarnings("ignore:.*training_step.*returned .None")
def test_a_window_without_a_loss_takes_no_step() -> None:
    class Nothing(Rows):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx == 0 else None

    ours, theirs = fit(Nothing, Microbatch(5)), fit(Nothing)
    assert distance(ours, theirs) < 1e-12


def test_lbfgs_runs_a_window_for_every_closure() -> None:
    class Closures(Rows):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=4, lr=0.1)

    options: dict[str, Any] = {"max_epochs": 1, "gradient_clip_val": None}
    whole = fit(Closures, **options)
    ours = fit(Closures, Microbatch(5), batch_size=4, accumulate_grad_batches=3, **options)
    assert distance(ours, whole) < 1e-10


def test_exact_batch_norm_through_lightning() -> None:
    class Normed(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(TOKENS * WIDTH, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4)
            ).double()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

    whole = fit(Normed)
    ours = fit(Normed, Microbatch(5, batch_norm="exact"))
    cut = fit(Normed, Microbatch(5, batch_norm="microbatch"))
    assert distance(ours, whole) < 1e-9
    assert apart(ours, whole) < 1e-6
    assert distance(cut, whole) > 1e-3


class Averages(Rows):
    """With BatchNorm, whose statistics the callback of weight averaging renews in an epoch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(8)
        self.net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(TOKENS * WIDTH, 8), self.norm, torch.nn.Linear(8, 4)
        ).double()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class CountedAverages(Averages):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)["loss"]
        return {"loss": mb.Loss(sum=loss * len(batch[0]), count=len(batch[0]))}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
@pytest.mark.parametrize("make", [Averages, CountedAverages])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_averaged_weights_get_no_step_but_lightnings_own(make: type[Averages], accumulated: int) -> None:
    """In the epoch of the statistics, Lightning runs no backward, and ends with one step of the old gradient."""

    def run(make: type[Averages], *ours: Any, **options: Any) -> Averages:
        return fit(make, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1), *ours, max_epochs=3, **options)

    whole = run(Averages)
    callback = Microbatch(5, batch_norm="exact")
    ours = run(make, callback, batch_size=12 // accumulated, accumulate_grad_batches=accumulated)
    assert whole.trainer.current_epoch == 4
    assert distance(ours, whole) < 1e-9
    if accumulated == 1:  # else Lightning takes the statistics of smaller batches
        statistics = [torch.cat([each for each in one.norm.buffers() if each.ndim]) for one in (ours, whole)]
        assert (statistics[0] - statistics[1]).abs().max() < 1e-9
        assert apart(ours, whole) < 1e-6
    assert callback.last_step is not None
    assert callback.last_step.index == 8  # three steps in each of three epochs, and none in the fourth


def single(make: type[Tagger]) -> pl.LightningModule:
    return make().float()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_narrow_precision_is_no_worse_than_the_whole_batch(precision: Any) -> None:
    class Narrow(Rows):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, labels = batch
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16-mixed")
            return (self.net(x.to(self.dtype)).mean(1).float() - labels).square().mean()

    class Wide(Narrow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.net(batch[0]).mean(1) - batch[1]).square().mean()

    exact, options = fit(Wide, max_epochs=1), {"precision": precision, "max_epochs": 1}
    whole = fit(partial(single, Narrow), **options)
    ours = fit(partial(single, Narrow), Microbatch(5), **options)
    unit = 2.0**-8 if precision == "bf16-true" else 1e-6
    assert distance(ours, exact) <= 1.2 * distance(whole, exact) + unit
    assert not torch.is_autocast_enabled("cpu")


def test_the_scaler_of_lightning_scales_every_microbatch() -> None:
    def scaled() -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=2)
        return [MixedPrecision("16-mixed", "cpu", scaler)], scaler

    class Half(Rows):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 1e4 * super().training_step([batch[0].float(), batch[1].float()], batch_idx)["loss"]

    plugins, scaler = scaled()
    whole = fit(partial(single, Half), plugins=plugins)
    plugins_of_ours, ours_scaler = scaled()
    ours = fit(partial(single, Half), Microbatch(5), plugins=plugins_of_ours)
    assert ours_scaler.get_scale() == scaler.get_scale() < 2.0**120
    assert distance(ours, whole) < 2e-3
    assert "unscale_" not in vars(ours_scaler)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    make = partial(Tagger, dropout=0.3)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2)
    whole = Microbatch(5, dropout="by_row")
    through = fit(make, whole, keep, enable_checkpointing=True)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 3
    for file in checkpoints:
        callback = Microbatch(5, dropout="by_row")
        again = fit(make, callback, ckpt=file)
        assert torch.equal(weights(again), weights(through)), file
        assert callback.state_dict() == whole.state_dict()
    assert whole.state_dict()["windows"] == 6


def test_the_checkpoint_holds_the_size(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_last=True)
    full = RunsOut(3)

    class Ends(Tagger):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            full.armed = True
            return super().training_step(batch, batch_idx)

    with full:
        fit(Ends, Microbatch(12), keep, enable_checkpointing=True, max_epochs=1)
    callback = Microbatch(12)
    sizes: list[Any] = []

    class Looks(Tagger):
        def on_train_start(self) -> None:
            assert callback.accumulator is not None
            sizes.append(callback.accumulator.microbatch_size)

    fit(Looks, callback, ckpt=tmp_path / "last.ckpt")
    assert sizes == [6]


# -- nothing left -----------------------------------------------------------------------------------------------------


def left(fails: type[Exception] | None, *callbacks: Any) -> Any:
    """The attributes of what a callback may touch, after a fit."""

    class Fails(Rows):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if fails is not None and batch_idx == 1:
                raise fails
            return super().training_step(batch, batch_idx)

    module, run = Fails(), trainer(*callbacks, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    with suppress(RuntimeError, ValueError):
        run.fit(module, DataLoader(data(ragged=False), 12))
    loop, plugin = run.fit_loop.epoch_loop.automatic_optimization, run.precision_plugin
    assert isinstance(plugin, MixedPrecision)
    return [sorted(vars(each)) for each in (module, run, run.strategy, loop, plugin.scaler)]


@pytest.mark.parametrize("fails", [None, RuntimeError, ValueError])
def test_nothing_is_left_behind(fails: type[Exception] | None) -> None:
    callback = Microbatch(5)
    assert left(fails, callback) == left(fails)
    assert callback.accumulator is None


# -- refusals ---------------------------------------------------------------------------------------------------------


class Manual(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnBackward(Tagger):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class Iterates(Tagger):
    def training_step(self, dataloader_iter: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AssertionError


class HandlesAccumulation(SingleDeviceStrategy):
    @property
    def handles_gradient_accumulation(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (Manual, {"gradient_clip_val": None}, "use mb.Accumulator in its training_step"),
        (OwnBackward, {}, "backward.. of its own"),
        (Iterates, {}, r"training_step\(self, batch, batch_idx\)"),
        (Tagger, {"strategy": HandlesAccumulation("cpu")}, "HandlesAccumulation.*use one device or DDPStrategy"),
    ],
)
def test_what_does_not_go_is_refused_before_the_first_step(make: Any, options: Any, words: str) -> None:
    before = weights(torch.manual_seed(0) and make())
    with pytest.raises(mb.errors.ConfigError, match=words):
        fit(make, Microbatch(5), **options)
    assert torch.equal(weights(torch.manual_seed(0) and make()), before)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("DeepSpeedStrategy", "mb.DeepSpeed with a loop"),
        ("FSDPStrategy", "ModelParallelStrategy, with fully_shard"),
        ("XLAStrategy", "one device or DDPStrategy"),
        ("DDPStrategy", "leave ddp_comm_hook="),
    ],
)
def test_strategies_that_cannot_be_made_here_are_refused_by_name(name: str, words: str) -> None:
    kind = type(name, (), {"handles_gradient_accumulation": name == "DeepSpeedStrategy", "_ddp_comm_hook": print})
    run = SimpleNamespace(strategy=kind(), precision_plugin=None)
    with pytest.raises(mb.errors.ConfigError, match=words):
        Microbatch(5).on_fit_start(run, Tagger())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": 1.0}, "gradient_clip_val"),
        ({"autocast": torch.bfloat16}, "precision="),
        ({"grad_scaler": torch.amp.GradScaler("cpu")}, "16-mixed"),
    ],
)
def test_options_of_lightnings_are_refused(options: Any, words: str) -> None:
    with pytest.raises(mb.errors.ConfigError, match=words):
        Microbatch(5, **options)


def test_an_unknown_option_is_refused_before_the_first_step() -> None:
    with pytest.raises(mb.errors.ConfigError, match="has no option 'size'"):
        fit(Tagger, Microbatch(5, size=3))


# -- ranks ------------------------------------------------------------------------------------------------------------


class UnevenRows(torch.utils.data.Sampler[list[int]]):
    """Batches of 12 rows, of which the first rank gets 8 and the second 4; of the last batch's 10, 8 and 2."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Any:
        for start in range(0, ROWS, 12):
            middle = start + 8
            yield list(range(start, middle) if self.rank == 0 else range(middle, min(start + 12, ROWS)))

    def __len__(self) -> int:
        return 3


def fit_on_rank(rank: int, make: Any, *callbacks: Any, strategy: Any = None, **options: Any) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    torch.manual_seed(0)
    module = make()
    run = trainer(
        *callbacks,
        strategy=strategy or DDPStrategy(process_group_backend="gloo"),
        plugins=[TorchElasticEnvironment()],
        devices=2,
        use_distributed_sampler=False,
        **options,
    )
    run.fit(module, DataLoader(data(), batch_sampler=UnevenRows(rank)))
    return module


class Sharded(Tagger):
    """The weights are spread over the ranks."""

    is_sharded = False

    def configure_model(self) -> None:
        if not self.is_sharded:
            mesh: Any = self.device_mesh
            mesh = mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)
            self.is_sharded = True

    def on_after_backward(self) -> None:
        """Do nothing: the gradients are not needed."""


def on_two_ranks(rank: int, ranks: int) -> Any:
    ours, theirs = fit_on_rank(rank, Tagger, Microbatch(3)), fit_on_rank(rank, Whole)
    strategy: Any = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    sharded = fit_on_rank(rank, Sharded, Microbatch(3), strategy=strategy, gradient_clip_val=None)
    shards: list[Any] = list(sharded.parameters())
    full = RunsOut(15)

    class Ends(Tagger):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            full.armed = True
            return super().training_step(batch, batch_idx)

    with full if rank == 1 else nullcontext():
        again = fit_on_rank(rank, Ends, Microbatch(12))
    assert len(full.refused) == rank
    gathered = torch.cat([each.full_tensor().detach().flatten() for each in shards])
    return weights(ours), ours.norms, weights(theirs), gathered, weights(again)


def test_two_ranks_with_uneven_rows(run_ranks: Any, tmp_path: Path) -> None:
    whole = fit(Whole)
    reference = weights(whole)
    unclipped = weights(fit(Whole, gradient_clip_val=None))
    for ours, norms, theirs, sharded, again in run_ranks(on_two_ranks, 2, tmp_path):
        assert float((ours - reference).norm() / reference.norm()) < 1e-12
        assert float((again - reference).norm() / reference.norm()) < 1e-12  # memory had ended on the second rank
        assert norms == pytest.approx(whole.norms, rel=1e-10)
        assert float((theirs - reference).norm() / reference.norm()) > 1e-3
        assert float((sharded - unclipped).norm() / unclipped.norm()) < 1e-12


@pytest.mark.parametrize("wrap", [LightningOptimizer, lambda inner: _FabricOptimizer(inner, _STRATEGY)])
def test_the_wrappers_around_optimizers_are_unwrapped(wrap: Callable[[Any], Any]) -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    assert plain_optimizers(wrap(optimizer)) == [optimizer]
