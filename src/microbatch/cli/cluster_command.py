"""The command ``plan`` for hardware that is not there: what is read, what is printed, with which exit code it ends."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text
from torch import Tensor
from torch.utils._pytree import tree_leaves

from microbatch.cli.cost_flags import CostFlags, cost_as_dict, read_cost_flags
from microbatch.cli.error_report import report_error
from microbatch.cli.reported import refuse_word
from microbatch.cli.waiting import Waiting, output_console
from microbatch.errors import ConfigError, MicrobatchError
from microbatch.kind_words import kind_of
from microbatch.memory.budget import format_bytes
from microbatch.planning.cluster_plan import Simulation
from microbatch.planning.cluster_report import ClusterPlan
from microbatch.planning.communication import Assumed
from microbatch.planning.hardware import find_device, is_hardware
from microbatch.planning.model_shapes import Case, case_from_config
from microbatch.planning.run_costs import RunCost, cheapest, costs_table, deadline_words
from microbatch.planning.sharding import PRECISIONS, Setup
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
    return job.endswith(".json") or (device is not None and all(map(is_hardware, device.split(","))))


def run_cluster_plan(job: str, flags: Mapping[str, Any], *, as_json: bool, line: Waiting | None = None) -> int:
    """Plan, and print the plan.

    Args:
        job: A Transformers configuration (``.json``), or a job as for ``train``.
        flags: ``device`` and ``ranks`` (``"8"``, or ``"1,2,4,8"`` to compare), ``strategy``, ``checkpointing``,
            ``offload``, ``precision``, ``reduce``, ``sequence_length``, ``batch_size``, ``microbatch_size``,
            ``bandwidth``, ``latency``, ``utilisation``, ``microbatch_seconds``, and those of `read_cost_flags`; `None`
            or left out for what was not given.
        as_json: Whether to print one JSON object a plan.
        line: Where a terminal shows that something is done; `None` for a line of its own.

    Returns:
        The exit code: 0 it fits, 1 it does not (on any of the devices) or misses the deadline, 2 bad input.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    line = line or Waiting(as_json=as_json, color=True)
    try:
        with line:
            line(f"planning {job}")
            asked = read_cost_flags(given)
            plans, job_steps = _plans(job, given)
            names = list(dict.fromkeys(plan.setup.device.name for plan in plans))
            prices = asked.price_of(names, lambda name: find_device(name).name)
            length = asked.length(job_steps)
            costs = [plan.cost(prices[plan.setup.device.name], **length) for plan in plans]
    except MicrobatchError as error:
        report_error(error, line.console, as_json=as_json)
        return BAD_INPUT
    if as_json:
        best = cheapest(costs, deadline=asked.deadline)
        for plan, cost in zip(plans, costs, strict=True):
            told = {"event": "cluster plan", **plan.as_dict()}
            if asked.any:
                told["cost"] = {**cost_as_dict(cost, asked), "cheapest": cost is best}
            sys.stdout.write(json.dumps(told) + "\n")
    else:
        console = output_console(color=False)
        shown = plans[0].table() if len(plans) == 1 else _comparison(plans, costs, asked, width=console.width)
        said = "\n".join(_cost_words(plans, costs, asked))
        for text in "\n\n".join(part for part in (shown, said) if part).splitlines():
            console.print(Text(text))
    met = asked.deadline is None or any(cost.meets(asked.deadline) for cost in costs)
    return OK if met and any(plan.fits for plan in plans) else DOES_NOT_FIT


def _plans(job: str, flags: Mapping[str, Any]) -> tuple[list[ClusterPlan], int | None]:
    """Plan each device with each number of ranks; return the plans, and the steps of the job's own run."""
    if "device" not in flags:
        raise ConfigError('pass the hardware: --device a100-40gb, or --device "24 GiB"')
    for name in ("batch_size", "microbatch_size", "sequence_length", "utilisation"):
        refuse_word(name, flags.get(name), "a number" if name == "utilisation" else "a whole number")
    devices = [find_device(name) for name in flags["device"].split(",")]
    if len(devices) > 1 and "microbatch_seconds" in flags:
        raise ConfigError("--microbatch-seconds is a time on one device, and --device names several")
    case, rows, steps_of = _case(job, flags)
    batch_size = flags.get("batch_size", rows)
    if batch_size is None:
        raise ConfigError("pass the effective batch: --batch-size 512")
    offload = flags.get("offload", "none")
    kept = {name: flags[name] for name in ("strategy", "checkpointing", "reduce") if name in flags}
    told = ("bandwidth", "latency", "utilisation", "microbatch_seconds")
    assumed = Assumed(**{name: flags[name] for name in told if name in flags})
    simulation = Simulation(case)
    plans = [
        simulation.plan(
            Setup(
                device=device,
                ranks=ranks,
                offload=None if offload == "none" else offload,
                precision=_precision(flags.get("precision", "mixed")),
                **kept,
            ),
            batch_size=batch_size,
            microbatch_size=flags.get("microbatch_size"),
            assumed=assumed,
        )
        for device in devices
        for ranks in _ranks(str(flags.get("ranks", 1)))
    ]
    return plans, steps_of(batch_size)


def _case(job: str, flags: Mapping[str, Any]) -> tuple[Case, int | None, Callable[[int], int | None]]:
    """Build what is to be planned; return its own effective batch, and a function from the batch to the steps."""
    if job.endswith(".json"):
        try:
            config = json.loads(Path(job).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{job} cannot be read as JSON ({error})") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{job} holds {kind_of(config)}, not a model's configuration")
        name = Path(job).stem
        return case_from_config(config, sequence_length=flags.get("sequence_length"), name=name), None, lambda _: None
    if "sequence_length" in flags:
        raise ConfigError("--sequence-length goes with a configuration; a job's data have their own length")
    made = call_job(find_job(job), {"device": "cpu", "data": None, "seed": 0, "batch_size": None}, name=job)
    data: Any = made.data
    # Of ragged rows the longest: they are what may not fit.
    longest = max((data[index] for index in range(min(_LOOKED_AT, len(data)))), key=_elements)
    case = Case(name=job, model=made.model, batch=made.collate([longest]), loss_fn=made.batch_loss)

    def steps_of(batch_size: int) -> int | None:
        if made.steps is not None or made.epochs is None:
            return made.steps
        return max(1, math.ceil(made.epochs * -(-len(data) // batch_size)))

    return case, made.batch_size, steps_of


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


def _comparison(plans: Sequence[ClusterPlan], costs: Sequence[RunCost], asked: CostFlags, *, width: int) -> str:
    """Write several plans below one another."""
    first = plans[0]
    devices = {plan.setup.device.name for plan in plans}
    setup = _but_ranks(first) if len(devices) == 1 else _but_device(first)
    lines = [f"{first.name}, {first.parameters:,} parameters, batch of {first.division.batch_size}, {setup}"]
    if asked.any or len(devices) > 1:
        lines += ["", costs_table(costs, best=cheapest(costs, deadline=asked.deadline), width=width)]
    else:
        lines += map(_line, plans)
    lines += [f"! {each}" for each in first.warnings]  # of the fewest ranks, which have the most microbatches
    return "\n".join(lines)


def _line(plan: ClusterPlan) -> str:
    cut = plan.division
    fits = f"fits, up to {plan.largest} at once" if plan.fits else "does not fit"
    said = f"{plan.setup.ranks:>4} x {cut.microbatches:>4} x {cut.microbatch_size:<4} rows"
    communicates = "" if plan.way is None else f", {plan.way.words} communicated ({plan.way.name})"
    return f"  {said}  {format_bytes(plan.peak_bytes):>9} on each  {fits}{communicates}"


def _cost_words(plans: Sequence[ClusterPlan], costs: Sequence[RunCost], asked: CostFlags) -> Iterator[str]:
    """Write what a run costs, and what that rests on."""
    if not asked.any and len({plan.setup.device for plan in plans}) == 1:
        return
    if len(plans) == 1:
        yield costs[0].words()
    elif asked.price is not None and (best := cheapest(costs)) is not None:
        yield f"cheapest: {best.where}. {best.words()}"
    if asked.deadline is not None:
        yield deadline_words(costs, asked.deadline)
    if any(cost.step_seconds is None for cost in costs):
        yield 'where a time is missing, --bandwidth "25 GB/s" or --microbatch-seconds "0.25 s" gives it'
    yield "predicted, nothing was run: arithmetic at the same --utilisation on each device, then communication, in turn"
    yield "not in the time: the optimizer's own step, moves to the host, waiting for data, starting and failing"
    for plan in {plan.setup.device.name: plan for plan in reversed(plans)}.values():
        rows = plan.division.microbatch_size
        yield f"a microbatch of {rows} on {plan.setup.device.name}: {plan.arithmetic_source}"


def _but_ranks(plan: ClusterPlan) -> str:
    return plan.setup.words.removeprefix(f"{plan.setup.ranks} x ")


def _but_device(plan: ClusterPlan) -> str:
    return _but_ranks(plan).removeprefix(f"{plan.setup.device.words}, ")
