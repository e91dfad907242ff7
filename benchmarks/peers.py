"""The contenders that need another library, each used as its documentation says, with the same arithmetic."""

from __future__ import annotations

import tempfile
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from benchmarks.cases import loss_sum
from benchmarks.contenders import Subject, Window


def accelerate(subject: Subject) -> Window:
    """Use `Accelerator.accumulate`.

    `backward` divides by the number of microbatches, so the loss is multiplied by it before, as Accelerate's guide to
    accumulating losses over tokens does.
    """
    from accelerate import Accelerator

    microbatches = subject.rows // subject.microbatch_size
    accelerator = Accelerator(gradient_accumulation_steps=microbatches, cpu=subject.device.type == "cpu")
    model: Any
    optimizer: Any
    model, optimizer = accelerator.prepare(subject.model, subject.optimizer)

    def window(around: AbstractContextManager[object]) -> None:
        with around:
            for piece in subject.pieces():
                with accelerator.accumulate(model):
                    loss = loss_sum(model, subject.send(piece)) * microbatches / subject.count
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()

    return window


def fabric(subject: Subject) -> Window:
    """Use Lightning Fabric's `no_backward_sync` in a loop of one's own."""
    from lightning_fabric import Fabric

    runner = Fabric(accelerator=subject.device.type, devices=1)
    model: Any
    optimizer: Any
    model, optimizer = runner.setup(subject.model, subject.optimizer)

    def window(around: AbstractContextManager[object]) -> None:
        with around:
            pieces = subject.pieces()
            for index, piece in enumerate(pieces):
                with runner.no_backward_sync(model, enabled=index < len(pieces) - 1):
                    loss = loss_sum(model, subject.send(piece)) / subject.count
                    runner.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    return window


class _Rows(Dataset[dict[str, Tensor]]):
    """The rows of one batch, again and again."""

    def __init__(self, batch: dict[str, Tensor], windows: int) -> None:
        self._batch, self._rows, self._windows = batch, len(batch["labels"]), windows

    def __len__(self) -> int:
        return self._rows * self._windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: each[index % self._rows] for name, each in self._batch.items()}


class _WithLoss(nn.Module):
    """The model as the Trainer wants it: returning its loss, divided by what the Trainer counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, num_items_in_batch: Tensor | None = None, **piece: Tensor) -> dict[str, Tensor]:
        """Return the microbatch's share of the window's mean loss."""
        loss = loss_sum(self.model, piece)
        return {"loss": loss if num_items_in_batch is None else loss / num_items_in_batch}


class _Gate:
    """Let a loop that cannot be called step by step run one window at a time, on a thread of its own."""

    def __init__(self) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._around: AbstractContextManager[object] = nullcontext()
        self._inside = False
        self._failure: BaseException | None = None

    def start(self, run: Any) -> None:
        """Start the thread; it waits at `next_window` until the first window is asked for."""

        def body() -> None:
            try:
                run()
                self._failure = RuntimeError("the Trainer came to its end")
            except BaseException as failure:  # noqa: BLE001 - it is raised again in the thread that waits
                self._failure = failure
            self._done.release()

        threading.Thread(target=body, daemon=True).start()

    def window(self, around: AbstractContextManager[object]) -> None:
        """Run one window; called by the thread that measures."""
        self._around = around
        self._go.release()
        self._done.acquire()
        if self._failure is not None:
            raise self._failure

    def next_window(self) -> None:
        """End the window before this one, if any, and wait for the next; called by the loop itself."""
        if self._inside:
            self._around.__exit__(None, None, None)
            self._done.release()
        self._go.acquire()
        self._inside = True
        self._around.__enter__()


def trainer(subject: Subject) -> Window:
    """Use the Transformers `Trainer`, as cheap as its arguments make it: no clipping, logging, saving or NaN filter."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    gate = _Gate()

    class Doorkeeper(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            gate.next_window()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.next_window()

    windows = 100_000  # more than anyone measures; the process ends before
    folder = tempfile.mkdtemp(prefix="trainer-")
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=subject.microbatch_size,
        gradient_accumulation_steps=subject.rows // subject.microbatch_size,
        max_steps=windows,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=subject.device.type == "cpu",
        dataloader_pin_memory=subject.device.type == "cuda",
    )
    schedule = LambdaLR(subject.optimizer, lambda _: 1.0)
    runner = Trainer(
        model=_WithLoss(subject.model),
        args=arguments,
        train_dataset=_Rows(subject.batch, windows),
        optimizers=(subject.optimizer, schedule),
        callbacks=[Doorkeeper()],
    )
    gate.start(runner.train)
    return gate.window
