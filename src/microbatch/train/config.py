"""Settings of a run: a TOML file, flags over it, the job's defaults under it."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from microbatch.errors import ConfigError, MicrobatchError
from microbatch.memory.budget import parse_bytes
from microbatch.train.best import Score

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Everything that can be set in a file or by a flag; what is left out is the job's to say.

    ``"none"`` switches off what a job would otherwise bring.

    Attributes:
        job: Built-in name or ``path/to/file.py:function``.
        data: File or folder for the job, instead of its own data.
        batch_size: Effective batch in samples, over all ranks.
        microbatch_size: Samples that go through the model at once, or ``"auto"`` to find the
            fastest that fits in the first steps; the job's default if left out, and ``"auto"`` if it has none.
        memory: Bytes that a step may use on the device, or a text such as ``"6 GiB"``.
        steps: Optimizer steps of the run.
        epochs: Passes over the data, instead of steps.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"xpu"``, or another one that PyTorch
        knows. seed: Seed of the initial weights, the order of the data and everything else that is random. autocast:
        Precision of the forward pass. learning_rate: Peak learning rate, instead of the one that the job's optimizer
        holds. schedule: What follows the warm-up. warmup_steps: Optimizer steps of linear warm-up. max_grad_norm: Clip
        the finished gradient to this norm. nonfinite: What to do with a window whose loss or gradient is not finite.
        accumulation: ``"plain"`` couples samples within each microbatch alone, as accumulation usually does, for
            comparison; ``"exact"`` over the whole batch.
        buffers: What happens to buffers that every microbatch moves, but for those of batch normalisation: ``"once"``
            or ``"mean"`` moves them once a step, ``"each"`` lets every microbatch move them; as for `Accumulator`.
        checkpoint: Which blocks of the model recompute their activations in backward: ``"all"``, ``"none"``, or with
            ``"auto"`` as few as the memory needs.
        validate_every: Optimizer steps between validations.
        checkpoint_every: Optimizer steps between checkpoints.
        keep_checkpoints: Newest checkpoints that are kept.
        best: Keep the checkpoint of the best validation, too: ``"min:NAME"`` or ``"max:NAME"`` of its scores.
        patience: Validations in a row without a better one after which the run ends early; without ``best``, the loss
            decides.
        compare: Whether the run ends with the comparison against the full batch.
        deterministic: Whether the run has the same bits on any number of ranks, dropout included.
        async_checkpoints: Whether training goes on while a checkpoint is written.
        rank_timeout: Seconds that a rank waits for the others before it says who is missing and ends.
        shard: What each of several ranks holds a share of: ``"zero2"`` of the gradients and the optimizer's state,
            ``"zero3"`` of the weights too; ``"none"`` of nothing that the job has not sharded itself.
        sync: When the gradients of a sharded model meet, as for `Accumulator`.
        tracker: Where the metrics of every step go as well; a resumed run continues there.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    job: Annotated[str, Field(min_length=1)] = "language"
    data: Annotated[str, Field(min_length=1)] | None = None
    batch_size: Count | None = None
    microbatch_size: Count | Literal["auto"] | None = None
    memory: Count | str | None = None
    steps: Count | None = None
    epochs: Positive | None = None
    device: Annotated[str, Field(min_length=1)] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    autocast: Literal["bf16", "fp16", "none"] | None = None
    learning_rate: Positive | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    max_grad_norm: Positive | Literal["none"] | None = None
    nonfinite: Literal["raise", "skip"] = "raise"
    accumulation: Literal["exact", "plain"] = "exact"
    buffers: Literal["once", "mean", "each"] | None = None
    checkpoint: Literal["auto", "all", "none"] = "none"
    validate_every: Count | None = None
    checkpoint_every: Count | None = None
    keep_checkpoints: Count = 3
    best: str | None = None
    patience: Count | None = None
    compare: bool = True
    deterministic: bool = False
    async_checkpoints: bool = False
    rank_timeout: Positive = 600.0
    shard: Literal["none", "zero2", "zero3"] = "none"
    sync: Literal["auto", "lean", "fast"] = "auto"
    tracker: Literal["wandb", "mlflow", "trackio", "tensorboard", "none"] = "none"

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


def read_toml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Args:
        path: A TOML file whose keys are those of `Settings`, without sections.

    Returns:
        Its keys and values, not yet validated.

    Raises:
        ConfigError: It does not exist, cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        nearby = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"; did you mean {path.with_name(nearby[0])}?" if nearby else "; check the path given to --config"
        raise ConfigError(f"there is no configuration file {path}{hint}") from None
    except OSError as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is not valid TOML: its arrays are too deep in one another") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def load_settings(flags: Mapping[str, Any], *, file: Path | None = None, base: Settings | None = None) -> Settings:
    """Merge flags over a file over a base, and validate the result.

    Args:
        flags: Keys of `Settings`; `None` means that the flag was not given.
        file: A TOML file, or `None`.
        base: Settings under both, such as those of a run that is being resumed.

    Returns:
        The settings, every value of a kind and range that can work.

    Raises:
        ConfigError: A key is unknown, a value cannot work, or both ``steps`` and ``epochs`` were asked for.

    Example:
        >>> load_settings({"steps": 5, "seed": None}).steps
        5
    """
    given = {key: value for key, value in flags.items() if value is not None}
    from_file = read_toml(file) if file is not None else {}
    sources = {key: str(file) for key in from_file} | {key: flag_name(key) for key in given}
    _ask_for_units(from_file.get("memory"), where=f"memory in {file}")
    if isinstance(given.get("memory"), str):  # a number is another run's, in bytes
        _ask_for_units(given["memory"], where="--memory")
    layers = (base.model_dump(exclude_none=True) if base is not None else {}, from_file, given)
    merged: dict[str, Any] = {}
    for layer in layers:
        if "steps" in layer and "epochs" in layer:
            where = sources.get("steps", "the settings")
            raise ConfigError(
                f"{where}: both steps and epochs are set, and each sets the end of the run; keep one of them"
            )
        # A later layer that says when to stop replaces the earlier one's answer, whichever of the two it used.
        if "steps" in layer or "epochs" in layer:
            merged.pop("steps", None)
            merged.pop("epochs", None)
        merged |= layer
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources)) from None


_LEAST_WITHOUT_UNIT = 1 << 20
"""Nobody means fewer bytes than this with a number alone: it is a number of gigabytes whose unit was forgotten."""


def _ask_for_units(amount: object, *, where: str) -> None:
    """Refuse a small number without a unit."""
    text = str(amount).strip()
    if isinstance(amount, int | str) and re.fullmatch(r"\d+(\.\d+)?", text) and 0 < float(text) < _LEAST_WITHOUT_UNIT:
        raise ConfigError(
            f'{where} is {text}: {text} what? Write "{text} GiB" or "{text} MiB", or "{text} B" for bytes'
        )


WITHOUT_FLAG = ("schedule", "nonfinite", "keep_checkpoints", "compare")
"""Keys that are set in a file alone; of the last, the flag ``--no-compare`` is the opposite."""


def flag_name(key: str) -> str:
    """Name the flag that sets a key.

    Args:
        key: A key of `Settings`.

    Returns:
        For example ``"--batch-size"``; for the job, which is an argument, its name in the usage; the key
        itself where no flag sets it.
    """
    if key in WITHOUT_FLAG:
        return key
    return "JOB" if key == "job" else "--" + {"learning_rate": "lr"}.get(key, key).replace("_", "-")


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    """Turn a validation error into one line for each key at fault."""
    by_key: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(str(detail["loc"][0]), []).append(detail)
    lines: list[str] = []
    for key, details in by_key.items():
        source = sources.get(key, "settings")
        if details[0]["type"] == "extra_forbidden":
            lines.append(_unknown(key, source))
            continue
        reasons = " or ".join(dict.fromkeys(_reason(detail) for detail in details))
        # A union reports the value once for each of its members; the value itself is the same.
        value = details[0]["input"]
        shown = json.dumps(value) if isinstance(value, str | int | float | bool) else repr(value)
        named = source if source == flag_name(key) else f"{key} in {source}"
        lines.append(
            f"{named} is {shown}: it must be {reasons}"
            if details[0]["type"] != "value_error"
            else f"{named}: {reasons}"
        )
    return "\n".join(lines)


def _unknown(key: str, source: str) -> str:
    known = list(Settings.model_fields)
    aliases = {"lr": "learning_rate", "memory_budget": "memory", "budget": "memory", "precision": "autocast"}
    near = (
        [aliases[key]] if key in aliases else difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
    )
    hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
    return f"unknown key {key!r} in {source}; {hint}"


def _reason(detail: Mapping[str, Any]) -> str:
    context: Mapping[str, Any] = detail.get("ctx", {})
    match detail["type"]:
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "greater_than":
            return f"more than {context['gt']:g}"
        case "less_than":
            return f"less than {context['lt']}"
        case "int_type" | "int_from_float" | "int_parsing":
            return "a whole number"
        case "float_type" | "float_parsing" | "finite_number":
            return "a finite number"
        case "bool_type":
            return "true or false"
        case "string_type" | "string_too_short":
            return "a text"
        case "literal_error":
            return str(context["expected"])
        case "value_error":
            return str(context["error"])
        case _:
            return str(detail["msg"]).lower()
