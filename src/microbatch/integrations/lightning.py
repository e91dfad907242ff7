"""Lightning: one callback makes every optimizer step exact, in the memory there is.

``Trainer(callbacks=[Microbatch()])``. The loader's batch is the effective batch; with ``accumulate_grad_batches=N`` it
is N of them. Automatic optimization, clipping, schedulers, precision, loggers and checkpoints stay Lightning's.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from microbatch.batch.batches import Batches
from microbatch.errors import ConfigError, EmptyWindowError, MissingDependencyError
from microbatch.integrations.lightning_logs import WindowLogs, WindowMetrics
from microbatch.loss.loss import Loss
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import Event, MicrobatchDone, Retry
from microbatch.step.options import listeners_of
from microbatch.step.record import Step
from microbatch.warned import warn


def _callback() -> Any:
    """Return Lightning's `Callback`, from whichever of its two packages there is."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        with suppress(ImportError):
            return importlib.import_module(name).Callback
    raise MissingDependencyError(
        "microbatch.integrations.lightning needs Lightning: pip install 'microbatch[lightning]'"
    )


_OPTIONS = {
    "max_grad_norm": "pass Trainer(gradient_clip_val=...), which clips the finished gradient once",
    "autocast": 'pass Trainer(precision="bf16-mixed") or "16-mixed"',
    "grad_scaler": 'pass Trainer(precision="16-mixed"), whose scaler is used',
}
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")


class Microbatch(_callback()):
    """Train with exact gradients of any batch size: the callback runs each batch in microbatches that fit.

    `training_step` is called for each microbatch instead of the whole batch. It returns a mean over the rows, a `Loss`
    with its count, a dict with one of them as ``"loss"``, or `None`. What it logs with ``self.log`` is reported once,
    with the value of the whole window. Lightning calls its hooks as often as without the callback, except that those
    around backward run once a step, also with ``accumulate_grad_batches=N``.

    Args:
        microbatch_size: As for `Accumulator`.
        counts: As for `Accumulator.step`, for a dict of several terms as the loss.
        options: Other options of `Accumulator`, such as ``batch_norm="exact"``. Clipping and precision are Lightning's.

    Attributes:
        last_step: The record of the last window; `None` before the first.

    Raises:
        ConfigError: An option is Lightning's to choose.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Microbatch(microbatch_size=16)], logger=False, accelerator="cpu")
    """

    def __init__(
        self, microbatch_size: int | str = "auto", *, counts: Callable[..., Any] | None = None, **options: Any
    ) -> None:
        super().__init__()
        for name, instead in _OPTIONS.items():
            if options.get(name) is not None:
                raise ConfigError(f"Microbatch({name}=...) is Lightning's to choose: {instead}")
        self._options = {"microbatch_size": microbatch_size, **options}
        self._counts = counts
        self._fit: _Fit | None = None
        self._state: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}
        self.last_step: Step | None = None

    @property
    def accumulator(self) -> Accumulator | None:
        """The accumulator of the running fit; `None` outside of `Trainer.fit`."""
        return None if self._fit is None else self._fit.accumulator

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the trainer and the module, and put the window where Lightning runs a batch.

        Raises:
            ConfigError: Something of them does not go with a window.
        """
        _check(trainer, pl_module)
        self._fit = _Fit(self, trainer, pl_module, self._options, self._counts)
        if self._loaded:
            self._fit.accumulator.load_state_dict(self._loaded)
            self._loaded = {}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Drop batches that an epoch left without a step."""
        if self._fit is not None and self._fit.held:
            warn(
                f"{len(self._fit.held)} batches of the last epoch were dropped, because the epoch was skipped in the "
                "middle of a window (on_train_batch_start returned -1)"
            )
            self._fit.held = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hold the batch until its window is complete."""
        if self._fit is not None:
            self._fit.hold(batch)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the trainer and the module as they were."""
        self._leave()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the trainer and the module as they were."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Return the accumulator's state, for Lightning's checkpoint.

        Returns:
            As `Accumulator.state_dict`.
        """
        return self._state if self._fit is None else self._fit.accumulator.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint for the next fit."""
        self._loaded = dict(state_dict)

    def _leave(self) -> None:
        if self._fit is not None:
            self._state = self._fit.accumulator.state_dict()
            self._fit.close()
            self._fit = None


class _Fit:
    """One run of `Trainer.fit`: what is put on the trainer's objects, and taken off again.

    Attributes:
        accumulator: The accumulator.
        held: Batches of the window so far.
    """

    def __init__(
        self, callback: Microbatch, trainer: Any, module: Any, options: Mapping[str, Any], counts: Any
    ) -> None:
        self._callback, self._trainer, self._module, self._counts = callback, trainer, module, counts
        self.held: list[Any] = []
        self._stack = ExitStack()
        self._logs, self._metrics = WindowLogs(module), WindowMetrics(module)
        strategy, scaler = trainer.strategy, getattr(trainer.precision_plugin, "scaler", None)
        self._zero_grad: Callable[[], None] | None = None
        given: dict[str, Any] = {**options, "grad_scaler": scaler}
        given["listeners"] = [*listeners_of(options.get("listeners", ())), self._heard]
        wrapped = isinstance(strategy.model, DistributedDataParallel)
        self.accumulator = Accumulator(strategy.model if wrapped else module, _optimizer_of(trainer), **given)
        self._loop = trainer.fit_loop.epoch_loop.automatic_optimization
        self._run_batch, self._make_zero_grad = self._loop.run, self._loop._make_zero_grad_fn
        self._run_whole = strategy.training_step
        self._put(self._loop, "run", self._run)
        self._put(self._loop, "_make_zero_grad_fn", _nothing)
        self._put(strategy, "training_step", self._training_step)
        self._put(module, "log", _plain_function(self._logs.log))
        self._put(module, "backward", _nothing)
        if scaler is not None:
            self._put(scaler, "unscale_", _unscale_once(scaler))

    def close(self) -> None:
        """Take everything off again."""
        self.held = []
        self._stack.close()

    def _put(self, owner: Any, name: str, value: Any) -> None:
        before = vars(owner).get(name)
        setattr(owner, name, value)
        self._stack.callback(lambda: delattr(owner, name) if before is None else setattr(owner, name, before))

    def _heard(self, event: Event) -> None:
        if isinstance(event, MicrobatchDone):
            self._logs.done(event.rows)
        elif isinstance(event, Retry):
            self._logs.begin()
            self._metrics.again()

    def hold(self, batch: Any) -> None:
        """Hold the batch until its window is complete.

        Args:
            batch: The batch that has just run.
        """
        waits = self._trainer.fit_loop._should_accumulate() and not self._loop._skip_backward
        self.held = [*self.held, batch] if waits else []

    def _run(self, optimizer: Any, batch_idx: int, kwargs: Any) -> Any:
        """Stand where Lightning runs a batch: only hold it, if later batches belong to the same window."""
        self._zero_grad = self._make_zero_grad(batch_idx, optimizer)
        if self._loop._skip_backward or not self._trainer.fit_loop._should_accumulate():
            return self._run_batch(optimizer, batch_idx, kwargs)
        if self._zero_grad is not None:
            self._zero_grad()
        return {"loss": torch.zeros((), device=self._module.device)}

    def _training_step(self, batch: Any, *rest: Any) -> Any:
        """Stand where the strategy's `training_step` stands: run the window that this batch completes."""
        trainer = self._trainer
        if self._loop._skip_backward:
            return self._only_forward(batch, *rest)
        batches = [*self.held, batch]
        if self._zero_grad is not None:
            self._zero_grad()
        self._logs.begin()
        self._metrics.begin()

        def loss_fn(model: Any, microbatch: Any) -> Any:
            return self._loss(model, microbatch, rest)

        try:
            step = self.accumulator.gradient(
                batches[0] if len(batches) == 1 else Batches(batches), loss_fn, counts=self._counts
            )
        except EmptyWindowError:
            self._metrics.drop()
            if self._logs.returned or trainer.world_size > 1:
                raise
            return None  # as without the callback: the gradients are zeroed, and Lightning says it once
        except BaseException:
            self._metrics.drop()
            raise
        self._callback.last_step = step
        self._metrics.finish()
        self._logs.send(self._metrics.by_id())
        # Lightning divides by the number of batches, so that the losses of a window's batches add up to its mean.
        loss, extra = step.loss.detach() * trainer.accumulate_grad_batches, self._logs.extra()
        return {"loss": loss, **extra} if extra else loss

    def _only_forward(self, *args: Any) -> Any:
        """Run a whole batch without backward, where `StochasticWeightAveraging` renews the statistics of BatchNorm."""
        with torch.no_grad():
            output = self._run_whole(*args)
        if isinstance(output, Mapping):
            return {**output, "loss": _mean_of(output["loss"])} if output.get("loss") is not None else output
        return output if output is None else _mean_of(output)

    def _loss(self, model: Any, microbatch: Any, rest: tuple[Any, ...]) -> Any:
        """Run the user's `training_step` on one microbatch, or on a copy of the module in a dry run."""
        module = self._module
        function, copied = module.training_step, model._trainer is None
        if model is not module and hasattr(function, "__func__"):
            function = types.MethodType(function.__func__, model)
        if copied:
            model._trainer = self._trainer
        try:
            with self._trainer.precision_plugin.train_step_context(), self._logs.record(keep=not copied) as record:
                return record.loss_of(function(microbatch, *rest))
        finally:
            if copied:
                model._trainer = None


def _plain_function(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap a method, because a dry run copies the module, and with a bound method the object that it is bound to."""

    def function(*args: Any, **rest: Any) -> None:
        method(*args, **rest)

    return function


def _nothing(*_: Any, **__: Any) -> None:
    """Stand where Lightning runs backward or zeroes gradients, which is done already."""


def _mean_of(loss: Any) -> Any:
    if isinstance(loss, Mapping):
        return sum(_mean_of(each) for each in loss.values() if each is not None)
    return loss.mean if isinstance(loss, Loss) else loss


def _unscale_once(scaler: torch.amp.GradScaler) -> Callable[[Optimizer], None]:
    """Return a function for Lightning, which unscales gradients that the window has unscaled already."""
    unscale = scaler.unscale_

    def unscale_(optimizer: Optimizer) -> None:
        states: Any = getattr(scaler, "_per_optimizer_states", {})  # private by name
        if id(optimizer) not in states or states[id(optimizer)]["stage"].name == "READY":
            unscale(optimizer)

    return unscale_


def _optimizer_of(trainer: Any) -> Optimizer | None:
    """Return the trainer's optimizer; `None` where the accumulator can know no optimizer."""
    optimizers = [each for each in trainer.optimizers if isinstance(each, Optimizer) and each.param_groups]
    return optimizers[0] if len(optimizers) == 1 and not isinstance(optimizers[0], LBFGS) else None


def _check(trainer: Any, module: Any) -> None:
    """Refuse what does not go with a window, before the first step."""
    strategy, kinds = trainer.strategy, [each.__name__ for each in type(trainer.strategy).__mro__]
    if not module.automatic_optimization:
        raise ConfigError(
            "Microbatch() is for automatic optimization, and this module sets automatic_optimization = False: use "
            "mb.Accumulator in its training_step, or leave the callback out"
        )
    if strategy.handles_gradient_accumulation or not set(kinds) & set(_STRATEGIES):
        instead = {
            "FSDPStrategy": "use ModelParallelStrategy, with fully_shard in configure_model",
            "DeepSpeedStrategy": "use DDPStrategy, or mb.DeepSpeed with a loop of your own",
        }
        raise ConfigError(
            f"Microbatch() cannot run a window under {kinds[0]}, which runs backward or reduces gradients by itself: "
            f"{next((instead[kind] for kind in kinds if kind in instead), 'use one device or DDPStrategy')}"
        )
    if getattr(strategy, "_ddp_comm_hook", None) or getattr(strategy, "_model_averaging_period", None):
        raise ConfigError(
            "DDPStrategy has a communication hook or averages models, and the window reduces gradients itself, once: "
            "leave ddp_comm_hook= and model_averaging_period= out"
        )
    if "TransformerEnginePrecision" in [each.__name__ for each in type(trainer.precision_plugin).__mro__]:
        raise ConfigError(
            "Microbatch() does not go with TransformerEnginePrecision: fp8 scales move with every microbatch; use "
            'precision="bf16-mixed"'
        )
    if "backward" in vars(module) or not _is_of_lightning(module.backward):
        raise ConfigError(
            f"{type(module).__name__} has a backward() of its own, and the window runs backward itself: move what it "
            "does to the loss into training_step, and what it does to gradients into on_before_optimizer_step"
        )
    parameters = list(_parameters(module.training_step))
    if "dataloader_iter" in parameters:
        raise ConfigError(
            "training_step(dataloader_iter) fetches its batches itself, so there is no batch to cut: write "
            "training_step(self, batch, batch_idx)"
        )


def _parameters(function: Any) -> tuple[str, ...]:
    code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _is_of_lightning(method: Any) -> bool:
    return getattr(method, "__module__", "").startswith(("lightning.", "pytorch_lightning."))
