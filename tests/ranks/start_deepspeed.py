"""Start DeepSpeed in a rank whose process group is there already; not a test."""

import gc
import importlib
import importlib.util
import os
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

IS_THERE = importlib.util.find_spec("deepspeed") is not None


def start_deepspeed() -> Any:
    """Start DeepSpeed with the process group of this rank, and return the module."""
    names = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    os.environ.update({name: str(number) for name, number in names.items()})
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=os.environ["WORLD_SIZE"], MASTER_ADDR="127.0.0.1")
    # Not by name, for the type checker of those who have not installed it.
    deepspeed, operators = importlib.import_module("deepspeed"), importlib.import_module("deepspeed.ops")
    # Gloo as it is, and nothing compiled: DeepSpeed would build an all-reduce of its own, for a minute.
    operators.__dict__["__compatible_ops__"] = {}
    deepspeed.init_distributed(dist_backend="gloo")
    gc.freeze()  # it collects garbage whenever it makes an engine, and what has been imported is none
    return deepspeed


def make_engine(model: nn.Module, optimizer: Optimizer, *, stage: int, **config: Any) -> Any:
    """Return an engine of a ZeRO stage."""
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **config.pop("zero", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = start_deepspeed().initialize(model=model, optimizer=optimizer, config=made | config)
    return engine
