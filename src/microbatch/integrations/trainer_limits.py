"""What an exact window cannot be combined with in Transformers' Trainer, each with what to do instead."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import Any

from microbatch.errors import ConfigError

# Libraries whose trainers have an adapter of their own, and its module.
_ADAPTERS = {
    "trl": "microbatch.integrations.trl",
    "sentence_transformers": "microbatch.integrations.sentence_transformers",
}


def check_trainer(trainer: Any, mixin: type, *, known: Collection[str] = ()) -> None:
    """Refuse a trainer whose gradient would not be the whole batch's.

    Args:
        trainer: The trainer, after its ``__init__``.
        mixin: The class that replaces `training_step`.
        known: Names of classes behind ``mixin`` whose `training_step` adds nothing to the gradient.

    Raises:
        ConfigError: Something does not go with a window; the message tells what, and what to do.
    """
    for problem in (*_classes(trainer, mixin, known), *_devices(trainer)):
        raise ConfigError(problem)


def has_own_loss(trainer: Any) -> bool:
    """Return whether a trainer computes its loss by code of the user.

    Args:
        trainer: The trainer.

    Returns:
        Whether it has a ``compute_loss_func``, or a ``compute_loss`` that is not of Transformers or TRL.
    """
    kind: Any = inspect.unwrap(type(trainer).compute_loss)
    theirs = ("transformers.", "trl.", "microbatch.", "sentence_transformers.")
    return trainer.compute_loss_func is not None or not str(kind.__module__).startswith(theirs)


def check_arguments(args: Any) -> None:
    """Refuse arguments of a trainer that do not go with a window.

    Args:
        args: The `TrainingArguments`.

    Raises:
        ConfigError: One of them does not; the message tells what to set instead.
    """
    for problem in _arguments(args):
        raise ConfigError(problem)


def _classes(trainer: Any, mixin: type, known: Collection[str]) -> Iterator[str]:
    kinds = type(trainer).__mro__
    for kind in kinds[: kinds.index(mixin)]:
        own: Any = None if kind.__module__.startswith("microbatch.") else vars(kind).get("training_step")
        code = getattr(inspect.unwrap(own), "__code__", None) if own is not None else None
        if own is not None and (code is None or "training_step" not in code.co_names):
            yield (
                f"{kind.__name__} overrides training_step and does not call super().training_step(), which is the "
                "window: override compute_loss instead, or call super().training_step(model, inputs)"
            )
    behind = [each for each in kinds[kinds.index(mixin) + 1 :] if not each.__module__.startswith("transformers.")]
    for kind in behind:
        adapter = _ADAPTERS.get(kind.__module__.partition(".")[0])
        if adapter is not None and not known and kind.__name__.endswith("Trainer"):
            yield f"{kind.__name__} has metrics and batches of its own: use the classes of {adapter}"
    for kind in behind:
        if "training_step" in vars(kind) and kind.__name__ not in known:
            yield (
                f"{kind.__name__} overrides training_step, which the window replaces: override compute_loss instead, "
                f"or put {mixin.__name__} behind it in the list of base classes, so that its super().training_step() "
                "is the window"
            )


def _arguments(args: Any) -> Iterator[str]:
    optimizer = str(getattr(args.optim, "value", args.optim))
    if args.auto_find_batch_size:
        yield (
            "auto_find_batch_size=True makes the batch smaller when memory ends: set it to False. The window keeps the "
            "batch, and runs it in smaller microbatches"
        )
    if args.torch_compile:
        yield 'torch_compile=True wraps the model: set it to False, and pass accumulator={"compile": True}'
    if "lomo" in optimizer or "layerwise" in optimizer:
        yield (
            f"optim={optimizer!r} steps inside backward, so weights would change within a batch: choose an optimizer "
            'that steps once, such as "adamw_torch" or "galore_adamw"'
        )
    if getattr(args, "activation_offloading", False):
        yield 'activation_offloading=True: set it to False, and pass accumulator={"offload": "activations"}'


def _devices(trainer: Any) -> Iterator[str]:
    args, accelerator = trainer.args, trainer.accelerator
    if args.n_gpu > 1:
        yield (
            f"Trainer would use nn.DataParallel on {args.n_gpu} devices in one process: start one process a device "
            "(torchrun --nproc-per-node, or accelerate launch), or show it one device by CUDA_VISIBLE_DEVICES"
        )
    if trainer.is_deepspeed_enabled:
        yield (
            "DeepSpeed under Trainer adds up and reduces gradients itself: use fsdp or DDP here, or "
            "mb.DeepSpeed(engine) in a loop of your own"
        )
    if accelerator.mixed_precision == "fp8":
        yield "fp8 keeps scales that every microbatch would change: set mixed_precision to bf16"
    for name in ("tensor", "context", "sequence"):
        size = getattr(trainer, f"get_{name[0]}p_size", _one)()  # which not every release has
        if size > 1:
            yield f"{name} parallelism over {size} ranks splits rows that a window counts: use DDP or fsdp"
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        yield "a model that from_pretrained has sharded is not supported: load it whole, and set fsdp in the arguments"
    if trainer.is_fsdp_enabled and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        yield "FSDP version 1 flattens parameters and averages gradients itself: set fsdp_config={'version': 2}"
    if trainer.is_model_parallel:
        yield "a model spread over devices by device_map is not supported: load it on one device, or set fsdp"
    if accelerator.distributed_type.value in {"XLA", "MEGATRON_LM"}:
        yield f"{accelerator.distributed_type.value} adds up gradients itself: use DDP or fsdp"


def _one() -> int:
    return 1
