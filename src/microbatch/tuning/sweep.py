"""Train one job at several effective batches, and find what each takes to the same loss."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch

from microbatch.arguments import check_whole, listed_of, whole
from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of
from microbatch.planning.hyperparameters import is_number
from microbatch.ranks.process_group import RankGroup
from microbatch.step.options import size_of
from microbatch.train.atomic_files import write_text
from microbatch.train.job import Job
from microbatch.train.run_lock import Claim
from microbatch.train.rundir import jsonable
from microbatch.tuning.sweep_records import SweepProgress
from microbatch.tuning.sweep_result import Sweep

GRID = (1 / 3, 3**-0.5, 1.0, 3**0.5, 3.0)
"""Factors around the rule's learning rate that ``lr="grid"`` tries."""

RESULT = "result.json"
"""File of a sweep's folder that holds `Sweep.as_dict`."""


def sweep(  # noqa: PLR0913 - each of them is one choice of the user's
    job: Job | Callable[..., Job],
    *,
    batch_sizes: Sequence[int],
    lr: str = "rule",
    grid: Sequence[float] = GRID,
    samples: int | None = None,
    target_loss: float | None = None,
    seeds: int = 3,
    points: int = 16,
    microbatch_size: int | str = "auto",
    accumulation: str = "exact",
    drop: bool = True,
    folder: str | Path | None = None,
    progress: Callable[[SweepProgress], object] | None = None,
) -> Sweep:
    """Train one job at several effective batches, and find what each takes to the same loss.

    Every batch size runs at its own learning rate, at the microbatch size that suits it, with the same seeds. The runs
    take turns, a slice of samples each, so that a busy moment of the machine falls on all of them. After the warm-up
    the learning rate is constant: with a decay, the length of the run would decide when the target is reached.

    Each run learns from the same number of samples, or until the target. A worse learning rate ends early (successive
    halving). A batch size never does, because the fit needs its curve.

    Args:
        job: The job; it is put back afterwards. Or a function that returns one, with a parameter ``seed`` if its
            weights are to differ from seed to seed. Of a job, only the order of the data and the dropout differ.
        batch_sizes: Effective batches in samples, rising; each at least 1 and at most the number of samples.
        lr: ``"rule"`` scales the job's own rate from the job's own batch (`scale_hyperparameters`). ``"auto"`` lets
            the learning-rate finder choose for each batch size. ``"grid"`` tries factors around the rule.
        grid: The factors of ``"grid"``, each above 0.
        samples: Samples that each run learns from; by default what the job itself would.
        target_loss: Loss at which a run ends and to which steps and samples are counted; by default the worst of the
            runs' best losses.
        seeds: Runs at each batch size and rate; at least 1. Fewer than two give no uncertainty.
        points: Points of a curve; at least 2. At each the job is validated and the run's state is stored.
        microbatch_size: ``"auto"`` finds it once for each batch size, or a number for all of them.
        accumulation: ``"plain"`` couples samples within each microbatch alone, for comparison.
        drop: Whether a worse learning rate ends early.
        folder: Where runs are kept. The same call goes on where a killed one stood. `None` keeps nothing.
        progress: Called after every slice.

    Returns:
        The result: print it for a table and what follows.

    Raises:
        ConfigError: An argument cannot work, the job cannot be swept, or the folder holds another sweep.
        KeyboardInterrupt: A signal asked to stop; the folder knows where the sweep stands.

    Cost:
        The runs, and at each point of each run a checkpoint, which is read again before the next slice.

    Source:
        McCandlish et al. 2018 (arXiv:1812.06162); successive halving: Jamieson and Talwalkar 2016 (arXiv:1502.07943).
    """
    if not isinstance(job, Job) and not callable(job):
        raise ConfigError(f"job must be an mb.Job, or a function that returns one, not {kind_of(job)}")
    microbatch_size = size_of(microbatch_size)
    batch_sizes, grid = _sizes(batch_sizes), listed_of(grid) or []
    samples = None if samples is None else check_whole("samples", samples, least=1)
    seeds, points = check_whole("seeds", seeds, least=1), check_whole("points", points, least=2)
    _check(lr=lr, grid=grid, target=target_loss)
    if accumulation == "plain" and microbatch_size == "auto":
        raise ConfigError(
            'with accumulation="plain" the result depends on the microbatch size, so pass a number instead of "auto"'
        )
    if RankGroup.find(torch.device("cpu")) is not None:
        raise ConfigError("a sweep runs in one process: start it without torchrun")
    # The runs need pydantic and safetensors, which importing the package does not load.
    from microbatch.tuning.sweep_rounds import Rounds  # noqa: PLC0415
    from microbatch.tuning.sweep_runs import Jobs  # noqa: PLC0415

    jobs, where = Jobs(job), None if folder is None else Path(folder)
    asked = {
        "batch_sizes": batch_sizes,
        "lr": lr,
        "grid": grid if lr == "grid" else None,
        "samples": samples,
        "target_loss": target_loss,
        "seeds": seeds,
        "points": points,
        "microbatch_size": microbatch_size,
        "accumulation": accumulation,
        "drop": drop,
    }
    with _opened(where) as at, jobs.put_back():
        result = Rounds(jobs, at, asked, progress=progress).run()
    if where is not None:
        write_text(where / RESULT, json.dumps(jsonable(result.as_dict()), indent=1) + "\n")
    return result


@contextmanager
def _opened(folder: Path | None) -> Generator[Path]:
    """Make the folder, and hold it, so that no other process writes to it; without one, a temporary folder."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="microbatch-sweep-") as made:
            yield Path(made)
        return
    claim = Claim()
    claim.take(folder)
    try:
        yield folder
    finally:
        claim.release()


def _sizes(given: object) -> list[int]:
    listed = listed_of(given) or []
    sizes = [number for each in listed if (number := whole(each, least=1)) is not None]
    if not sizes or len(sizes) < len(listed):
        raise ConfigError(f"batch_sizes must be whole numbers of at least 1, not {given!r}")
    if any(later <= size for size, later in pairwise(sizes)):
        raise ConfigError(f"batch_sizes must rise, each one once; {sizes!r} do not")
    return sizes


def _check(*, lr: str, grid: Sequence[float], target: float | None) -> None:
    if lr not in {"rule", "auto", "grid"}:
        raise ConfigError(f'lr must be "rule", "auto" or "grid", not {lr!r}')
    if not grid or not all(is_number(factor) and factor > 0 for factor in grid) or len(set(grid)) < len(grid):
        raise ConfigError(f"grid must be positive factors, each one once, not {grid!r}")
    if target is not None and not is_number(target):
        raise ConfigError(f"target_loss must be a finite number, not {target!r}")
