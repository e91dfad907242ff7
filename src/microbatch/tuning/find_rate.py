"""Find a learning rate for a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from microbatch.arguments import check_whole
from microbatch.errors import ConfigError
from microbatch.gradients.parameters import device_of
from microbatch.kind_words import kind_of
from microbatch.step.options import size_of
from microbatch.train.job import Job
from microbatch.tuning.learning_rate import LearningRate, RangeStep


def find_learning_rate(
    job: Job,
    *,
    batch_size: int | None = None,
    microbatch_size: int | str | None = None,
    low: float | None = None,
    high: float | None = None,
    steps: int = 100,
    seeds: int | Sequence[int] = 3,
    progress: Callable[[RangeStep], object] | None = None,
) -> LearningRate:
    """Find a learning rate for a job with a range test: a few steps while the rate grows, until the loss diverges.

    The steps are those of ``microbatch train``, at the effective batch, on the batches that a new run sees first.
    Afterwards everything is as before, to the bit: weights, buffers, optimizer, position in the data, random state and
    modes; also after an error or Ctrl-C.

    Args:
        job: The job. Its scheduler is not stepped, and a rate that a warm-up has lowered counts as before that.
        batch_size: Effective batch in samples; `None` for the job's.
        microbatch_size: Samples that go through the model at once, or ``"auto"``; `None` for the job's.
        low: The first rate; `None` for a ten-thousandth of the optimizer's, and lower where the curve asks for it.
        high: The last rate; `None` for ten thousand times the optimizer's, and higher where the curve asks for it.
        steps: Steps of one run, from the first rate to the last; at least 20.
        seeds: How many runs, or their seeds; each reads the data in another order. The first seed of a number is 0.
        progress: Called with a `RangeStep` after every step.

    Returns:
        The result; ``suggested`` is `None` where the curve says nothing, and ``words`` says why.

    Raises:
        ConfigError: A value cannot work, an optimizer has no learning rate, or the model is spread over processes.
        DataError: The data cannot be read.
        LossError: The loss is not finite before any step.
        MicrobatchError: A step failed.

    Cost:
        At most ``steps`` times the number of seeds optimizer steps, and that again for each wider range, and for the
        finer range around the first suggestion. There is no finer range if ``low`` or ``high`` is given. A copy of
        weights and optimizer state on the host.

    Source:
        Smith 2015 (arXiv:1506.01186), section 3.3; ``docs/learning-rate.md``.
    """
    # Imported here: a job and its result need torch alone.
    from microbatch.train.config import load_settings  # noqa: PLC0415
    from microbatch.train.resolve import resolve  # noqa: PLC0415
    from microbatch.tuning.rate_search import rate_for, seeds_of  # noqa: PLC0415

    if not isinstance(job, Job):
        raise ConfigError(f"job must be an mb.Job, not {kind_of(job)}")
    batch_size = None if batch_size is None else check_whole("batch_size", batch_size, least=1)
    microbatch_size = None if microbatch_size is None else size_of(microbatch_size)
    steps = check_whole("steps", steps, least=1)
    chosen = seeds_of(seeds)
    # The test has no warm-up: the rate grows by itself.
    flags = {"batch_size": batch_size, "microbatch_size": microbatch_size, "steps": steps, "warmup_steps": 0}
    config = resolve(load_settings(flags), job, device=device_of(job.model))
    return rate_for(job, config, low=low, high=high, seeds=chosen, progress=progress)
