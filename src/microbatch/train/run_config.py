"""Hold the configuration of a run: every number that the training loop needs."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from microbatch.devices.backend import name_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Hold every number that the training loop needs.

    Attributes:
        job: Name of the job, as the user gave it.
        device: Device of the model.
        batch_size: Effective batch, in samples.
        microbatch_size: Samples that go through the model at once; at most ``batch_size``.
        memory_budget: Bytes that a step may use; `None` for all the memory there is.
        steps: Optimizer steps of the whole run.
        epochs: Passes over the data in these steps; 0 if the size of the data is not known.
        samples: Size of the training set; 0 for a stream that does not tell it.
        validation_samples: Size of the held-out set; 0 for none.
        seed: The run's seed.
        autocast: Dtype of the forward pass under autocast; `None` for no autocast.
        learning_rate: Peak learning rate of the first parameter group.
        schedule: ``"cosine"``, ``"constant"``, or ``"job"`` for the job's own scheduler.
        warmup_steps: Steps of linear warm-up; below ``steps``.
        max_grad_norm: Norm that the finished gradient is clipped to; `None` for no clipping.
        nonfinite: ``"raise"`` or ``"skip"``.
        plain: Whether the loss couples only the samples of one microbatch.
        batch_norm: Which statistics batch normalisation uses, as for `Accumulator`.
        buffers: What happens to other buffers that every microbatch moves, as for `Accumulator`.
        checkpoint: Blocks that recompute their activations, as for `Accumulator`.
        validate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: Number of newest checkpoints that are kept.
        best: Score that tells which checkpoint is the best, ``"min:NAME"`` or ``"max:NAME"``; `None` for the loss if
            ``patience`` is set, else for none.
        patience: Validations without a better one after which the run ends early; `None` for never.
        compare: Whether the run ends with a comparison against the full batch.
        parameters: Number of trainable elements of the model.
        unit: Unit of the throughput, in the plural, such as ``"tokens"``.
        auto: Whether the run searches for its microbatch size; ``microbatch_size`` is then the fallback.
        ragged: Whether microbatches are cut by the lengths of their rows, so that their number varies.
        ranks: World size: ranks that share each batch.
        pipelines: Number of pipelines, each with a share of the batch; `None` where each rank has a whole model.
        deterministic: Whether the run gives the same bits on any number of ranks.
        metered: Whether the memory of some steps is metered on the CPU, which makes these steps slower.
        async_checkpoints: Whether training continues while a checkpoint is written.
        rank_timeout: Seconds that a rank waits for the others.
        shard: Sharding of the model: ``"zero2"``, ``"zero3"``, ``"job"`` for a model that the job has sharded itself,
            or ``"none"``.
        sync: When the gradients of a sharded model are reduced.
        notices: Choices that were made for the user, one sentence each.
    """

    job: str
    device: torch.device
    batch_size: int
    microbatch_size: int
    memory_budget: int | None
    steps: int
    epochs: float
    samples: int
    validation_samples: int
    seed: int
    autocast: torch.dtype | None
    learning_rate: float
    schedule: str
    warmup_steps: int
    max_grad_norm: float | None
    nonfinite: str
    validate_every: int
    checkpoint_every: int
    keep_checkpoints: int
    compare: bool
    parameters: int
    unit: str
    plain: bool = False
    batch_norm: str | None = None
    buffers: str | None = None
    checkpoint: str | None = None
    auto: bool = False
    ragged: bool = False
    ranks: int = 1
    pipelines: int | None = None
    deterministic: bool = False
    metered: bool = True
    async_checkpoints: bool = False
    rank_timeout: float = 600.0
    shard: str = "none"
    sync: str = "auto"
    best: str | None = None
    patience: int | None = None
    notices: tuple[str, ...] = ()

    @property
    def microbatches(self) -> int:
        """Count the microbatches of a whole batch, on the rank that has most of them."""
        rows = -(-min(self.batch_size, self.samples or self.batch_size) // (self.pipelines or self.ranks))
        return -(-rows // self.microbatch_size)

    @property
    def precision(self) -> str:
        """Name the precision of the forward pass, for people."""
        return "fp32" if self.autocast is None else f"{str(self.autocast).removeprefix('torch.')} autocast"

    @property
    def device_name(self) -> str:
        """Name the device for people."""
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            return f"cpu ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
        name = name_of(self.device)
        return f"{self.device} ({name})" if name else str(self.device)
