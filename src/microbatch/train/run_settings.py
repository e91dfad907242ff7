"""Settings of a run: what each may be, its default, and the flag that sets it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from microbatch.errors import MicrobatchError
from microbatch.memory.byte_amounts import parse_bytes
from microbatch.train.best import Score

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


BATCH, LENGTH, MACHINE, FILES, OUTPUT = "The batch", "How long", "The machine", "Files", "Output"
"""Groups of flags, as ``--help`` shows them."""

_FEW_LETTERS = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """Describe the flag of a setting. Its values and its default are those of the setting, where none are given here.

    Attributes:
        help: What the setting is for.
        group: Group of flags that it belongs to.
        values: What is written behind the flag.
        default: What holds without it, in words; empty where that needs no words.
        name: The flag; `None` for the setting's name with ``-`` for ``_``.
    """

    help: str
    group: str
    values: str | None = None
    default: str | None = None
    name: str | None = None


class Settings(BaseModel):
    """Everything that can be set in a file or by a flag; what is left out is the job's to say.

    A setting with a `Flag` has one on the command line. ``"none"`` switches off what a job would otherwise bring.

    Attributes:
        schedule: What follows the warm-up.
        nonfinite: What to do with a window whose loss or gradient is not finite.
        keep_checkpoints: Newest checkpoints that are kept.
        compare: Whether the run ends with the comparison against the full batch.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    job: Annotated[str, Field(min_length=1)] = "language"
    batch_size: Annotated[Count | None, Flag(group=BATCH, help="Effective batch, in samples, over all ranks.")] = None
    microbatch_size: Annotated[
        Count | Literal["auto"] | None,
        Flag(group=BATCH, help="Samples that go through the model at once.", default="the job's, or auto"),
    ] = None
    memory: Annotated[
        Count | str | None,
        Flag(group=BATCH, values="BYTES", help='Memory limit of a step, such as "6 GiB"; none for all there is.'),
    ] = None
    max_grad_norm: Annotated[
        Positive | Literal["none"] | None, Flag(group=BATCH, help="Clip the finished gradient to this norm.")
    ] = None
    learning_rate: Annotated[Positive | None, Flag(group=BATCH, name="--lr", help="Peak learning rate.")] = None
    accumulation: Annotated[
        Literal["exact", "plain"],
        Flag(group=BATCH, help="exact, or plain to compare: a contrastive loss within each microbatch only."),
    ] = "exact"
    buffers: Annotated[
        Literal["once", "mean", "each"] | None,
        Flag(
            group=BATCH,
            help="How forward passes update buffers other than those of batch normalisation: once a step, by the "
            "mean, or in each microbatch.",
        ),
    ] = None
    steps: Annotated[Count | None, Flag(group=LENGTH, help="Optimizer steps.")] = None
    epochs: Annotated[Positive | None, Flag(group=LENGTH, help="Passes over the data, instead of steps.")] = None
    warmup_steps: Annotated[Annotated[int, Field(ge=0)] | None, Flag(group=LENGTH, help="Steps of linear warm-up.")] = (
        None
    )
    validate_every: Annotated[
        Count | None, Flag(group=LENGTH, help="Steps between validations.", default="a tenth of the run")
    ] = None
    checkpoint_every: Annotated[
        Count | None, Flag(group=LENGTH, help="Steps between checkpoints.", default="a tenth of the run")
    ] = None
    best: Annotated[
        str | None,
        Flag(
            group=LENGTH,
            values="min:NAME|max:NAME",
            help="Keep the checkpoint of the best validation too, by this score.",
            default="none",
        ),
    ] = None
    patience: Annotated[
        Count | None,
        Flag(group=LENGTH, help="End early after N validations in a row without a better one.", default="never"),
    ] = None
    device: Annotated[
        Annotated[str, Field(min_length=1)],
        Flag(group=MACHINE, values="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu, npu or hpu."),
    ] = "auto"
    autocast: Annotated[
        Literal["bf16", "fp16", "none"] | None, Flag(group=MACHINE, help="Precision of the forward pass.")
    ] = None
    checkpoint: Annotated[
        Literal["auto", "all", "none"],
        Flag(
            group=MACHINE,
            help="Recompute activations in backward: of as few blocks as memory requires, of all, or of none.",
        ),
    ] = "none"
    seed: Annotated[
        Annotated[int, Field(ge=0, lt=2**63)], Flag(group=MACHINE, help="Seed of everything that is random.")
    ] = 0
    deterministic: Annotated[
        bool, Flag(group=MACHINE, help="Compute the same bits on any number of ranks, dropout included.")
    ] = False
    async_checkpoints: Annotated[bool, Flag(group=MACHINE, help="Continue training while a checkpoint is written.")] = (
        False
    )
    rank_timeout: Annotated[
        Positive,
        Flag(
            group=MACHINE,
            values="SECONDS",
            help="How long a rank waits for the others before an error names the missing rank.",
        ),
    ] = 600.0
    shard: Annotated[
        Literal["none", "zero2", "zero3"],
        Flag(
            group=MACHINE,
            help="Shard over the ranks: gradients and optimizer state (zero2), or weights too (zero3).",
        ),
    ] = "none"
    sync: Annotated[
        Literal["auto", "lean", "fast"],
        Flag(
            group=MACHINE,
            help="When gradients of a sharded model are reduced: after every microbatch, or once a step.",
        ),
    ] = "auto"
    data: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        Flag(group=FILES, values="PATH", help="Your own file or folder of data.", default=""),
    ] = None
    tracker: Annotated[
        Literal["wandb", "mlflow", "trackio", "tensorboard", "none"],
        Flag(group=OUTPUT, help="Send every step's metrics to this tracker too; a resumed run continues there."),
    ] = "none"
    schedule: Literal["cosine", "constant"] = "cosine"
    nonfinite: Literal["raise", "skip"] = "raise"
    keep_checkpoints: Count = 3
    compare: bool = True

    @field_validator("memory")
    @classmethod
    def _memory_is_readable(cls, value: int | str | None) -> int | str | None:
        if value is not None and value != "none":
            try:
                parse_bytes(value)
            except MicrobatchError as error:
                raise ValueError(str(error)) from None
        return value

    @field_validator("best")
    @classmethod
    def _best_is_readable(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                Score.parse(value)
            except MicrobatchError as error:
                raise ValueError(str(error)) from None
        return value

    def toml(self) -> str:
        """Write the settings as a file that ``--config`` reads back to the same settings.

        Returns:
            TOML text, one key a line; keys that are not set are left out.

        Example:
            >>> print(Settings(job="images", steps=3).toml().splitlines()[0])
            job = "images"
        """
        values = self.model_dump(exclude_none=True)
        # A JSON string, number or boolean is the same thing in TOML, except for the control character DEL.
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
        return "".join(line.replace("\x7f", "\\u007f") + "\n" for line in lines)


FLAGS = {key: flag for key, field in Settings.model_fields.items() for flag in field.metadata if isinstance(flag, Flag)}
"""The flag of each setting that has one; the job is an argument."""


def flag_name(key: str) -> str:
    """Name the flag that sets a key.

    Args:
        key: A key of `Settings`, or the name of another flag.

    Returns:
        For example ``"--batch-size"``; for the job, which is an argument, its name in the usage; the key
        itself where no flag sets it.
    """
    if key == "job":
        return "JOB"
    if key in Settings.model_fields and key not in FLAGS:
        return key
    return (key in FLAGS and FLAGS[key].name) or "--" + key.replace("_", "-")


def described(key: str) -> Flag:
    """Describe the flag of a setting, with everything that follows from the setting.

    Args:
        key: A key of `Settings` that has a flag.

    Returns:
        The flag, its values and its default in words.

    Example:
        >>> described("microbatch_size").values, described("sync").values, described("seed").default
        ('N|auto', 'auto|lean|fast', '0')
    """
    flag, field = FLAGS[key], Settings.model_fields[key]
    kinds = _members(field.annotation)
    words = [kind for kind in kinds if isinstance(kind, str)]
    numbers = [name for kind, name in ((int, "N"), (float, "X")) if kind in kinds]
    values, text = "|".join((*numbers, *words)), flag.help
    if len(values) > _FEW_LETTERS:
        values, text = "NAME", f"{text.removesuffix('.')}: {', '.join(words)}."
    return replace(
        flag,
        help=text,
        values=values if flag.values is None else flag.values,
        default=_in_words(field.default) if flag.default is None else flag.default,
        name=flag_name(key),
    )


def kind_of_flag(key: str) -> type:
    """Return what the text behind a flag is read as: ``int``, ``float``, ``bool`` or ``str``."""
    kinds = _members(Settings.model_fields[key].annotation)
    return next((kind for kind in (int, float, bool) if kind in kinds and FLAGS[key].values != "BYTES"), str)


def _in_words(default: Any) -> str:
    if default is None:
        return "the job's"
    if isinstance(default, bool):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _members(annotation: Any) -> list[Any]:
    """List the types and words that a setting may be."""
    parts = get_args(annotation)
    return [each for part in parts for each in _members(part)] if parts else [annotation]
