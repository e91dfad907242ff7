"""The command ``plan`` for hardware that is not there: what is read, what is printed, with which exit code it ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_leaves

from microbatch.cli.error_report import report_error
from microbatch.errors import ConfigError, MicrobatchError
from microbatch.kind_words import kind_of
from microbatch.memory.budget import format_bytes
from microbatch.planning.cluster_plan import Simulation
from microbatch.planning.cluster_report import ClusterPlan
from microbatch.planning.communication import Assumed
from microbatch.planning.hardware import find_device, is_hardware
from microbatch.planning.model_shapes import Case, case_from_config
from microbatch.planning.sharding import PRECISIONS, Setup
from microbatch.train.config import flag_name
from microbatch.train.find_job import call_job, find_job

_LOOKED_AT = 1000  # samples
OK, DOES_NOT_FIT, BAD_INPUT = 0, 1, 2


def is_for_a_cluster(job: str, device: str | None) -> bool:
    """Tell whether a plan is for hardware, rather than for the device at hand.

    Args:
        job: What is to be planned.
        device: What ``--device`` was given, or `None`.

    Returns:
        Whether `run_cluster_plan` is to answer.

    Example:
        >>> is_for_a_cluster("language", "cuda:0"), is_for_a_cluster("language", "h100")
        (False, True)
        >>> is_for_a_cluster("config.json", None)
        True
    """
    return job.endswith(".json") or (device is not None and is_hardware(device))


def run_cluster_plan(job: str, flags: Mapping[str, Any], *, as_json: bool) -> int:
    """Plan, and print the plan.

    Args:
        job: A Transformers configuration (``.json``), or a job as for ``train``.
        flags: ``device``, ``ranks`` (``"8"``, or ``"1,2,4,8"`` to compare), ``strategy``, ``checkpointing``,
            ``offload``, ``precision``, ``reduce``, ``sequence_length``, ``batch_size``, ``microbatch_size``,
            ``bandwidth``, ``latency``, ``utilisation``, ``microbatch_seconds``; `None` or left out for what was not
            given.
        as_json: Whether to print one JSON object a plan.

    Returns:
        The exit code: 0 it fits, 1 it does not (on any number of ranks), 2 bad input.
    """
    try:
        plans = _plans(job, {name: value for name, value in flags.items() if value is not None})
    except MicrobatchError as error:
        report_error(error, Console(stderr=True, highlight=False, soft_wrap=True), as_json=as_json)
        return BAD_INPUT
    if as_json:
        for plan in plans:
            sys.stdout.write(json.dumps({"event": "cluster plan", **plan.as_dict()}) + "\n")
    else:
        sys.stdout.write((plans[0].table() if len(plans) == 1 else _comparison(plans)) + "\n")
    return OK if any(plan.fits for plan in plans) else DOES_NOT_FIT


def _plans(job: str, flags: Mapping[str, Any]) -> list[ClusterPlan]:
    if "device" not in flags:
        raise ConfigError('pass the hardware: --device a100-40gb, or --device "24 GiB"')
    for name in ("batch_size", "microbatch_size", "sequence_length", "utilisation"):
        if isinstance(flags.get(name), str):
            kind = "number" if name == "utilisation" else "whole number"
            raise ConfigError(f"{flag_name(name)} is {json.dumps(flags[name])}: it must be a {kind}")
    case, rows = _case(job, flags)
    batch_size = flags.get("batch_size", rows)
    if batch_size is None:
        raise ConfigError("pass the effective batch: --batch-size 512")
    offload = flags.get("offload", "none")
    kept = {name: flags[name] for name in ("strategy", "checkpointing", "reduce") if name in flags}
    told = ("bandwidth", "latency", "utilisation", "microbatch_seconds")
    assumed = Assumed(**{name: flags[name] for name in told if name in flags})
    simulation = Simulation(case)
    return [
        simulation.plan(
            Setup(
                device=find_device(flags["device"]),
                ranks=ranks,
                offload=None if offload == "none" else offload,
                precision=_precision(flags.get("precision", "mixed")),
                **kept,
            ),
            batch_size=batch_size,
            microbatch_size=flags.get("microbatch_size"),
            assumed=assumed,
        )
        for ranks in _ranks(str(flags.get("ranks", 1)))
    ]


def _case(job: str, flags: Mapping[str, Any]) -> tuple[Case, int | None]:
    """Build what is to be planned, and say which effective batch it asks for itself."""
    if job.endswith(".json"):
        try:
            config = json.loads(Path(job).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{job} cannot be read as JSON ({error})") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{job} holds {kind_of(config)}, not a model's configuration")
        name = Path(job).stem
        return case_from_config(config, sequence_length=flags.get("sequence_length"), name=name), None
    if "sequence_length" in flags:
        raise ConfigError("--sequence-length goes with a configuration; a job's data have their own length")
    made = call_job(find_job(job), {"device": "cpu", "data": None, "seed": 0, "batch_size": None}, name=job)
    data: Any = made.data
    # Of ragged rows the longest: they are what may not fit.
    longest = max((data[index] for index in range(min(_LOOKED_AT, len(data)))), key=_elements)
    return Case(name=job, model=made.model, batch=made.collate([longest]), loss_fn=made.batch_loss), made.batch_size


def _elements(sample: object) -> int:
    return sum(each.numel() for each in tree_leaves(sample) if isinstance(each, Tensor))


def _ranks(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--ranks must be a number, or several such as 1,2,4,8, not {text!r}") from error


def _precision(name: str) -> Any:
    if name not in PRECISIONS:
        raise ConfigError(f"--precision must be one of {', '.join(PRECISIONS)}, not {name!r}")
    return PRECISIONS[name]


def _comparison(plans: Sequence[ClusterPlan]) -> str:
    """Write several plans below one another."""
    first = plans[0]
    lines = [
        f"{first.name}, {first.parameters:,} parameters, batch of {first.division.batch_size}, {_but_ranks(first)}"
    ]
    for plan in plans:
        cut = plan.division
        fits = f"fits, up to {plan.largest} at once" if plan.fits else "does not fit"
        lines.append(
            f"  {plan.setup.ranks:>4} x {cut.microbatches:>4} x {cut.microbatch_size:<4} rows"
            f"  {format_bytes(plan.peak_bytes):>9} on each  {fits}{_communicates(plan)}"
        )
    lines += [f"! {each}" for each in first.warnings]  # of the fewest ranks, which have the most microbatches
    return "\n".join(lines)


def _communicates(plan: ClusterPlan) -> str:
    """Say what the step communicates, in the way that the setup's memory is of."""
    found = plan.communication
    if found is None:
        return ""
    way = found.ways[plan.setup.shares_gradients and plan.setup.reduce == "window"]
    return f", {way.words} communicated ({way.name})"


def _but_ranks(plan: ClusterPlan) -> str:
    return plan.setup.words.removeprefix(f"{plan.setup.ranks} x ")
