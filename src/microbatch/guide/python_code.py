"""The ten lines that reproduce a run of the playground."""

from __future__ import annotations

from microbatch.guide.playground_settings import Settings

_PRECISION = {
    "float32": "",
    "autocast": ", autocast=torch.bfloat16",
    "bfloat16": "",
    "bfloat16-sums": ", sums=mb.Sums(dtype=torch.bfloat16)",
}


def program(settings: Settings) -> str:
    """Write the program of a run.

    Args:
        settings: Of the run.

    Returns:
        Python that prints each step's number, loss and microbatches; the losses are those of the run.
    """
    norm = ', norm="batch"' if settings.norm != "group" else ""
    mode = {"group": "", "batch": ', batch_norm="microbatch"', "exact": ', batch_norm="exact"'}[settings.norm]
    rule = f', "rule": "{settings.rule}"' if settings.rule != "fixed" else ""
    size = f'"{settings.microbatch}"' if isinstance(settings.microbatch, str) else settings.microbatch
    budget = f", memory_budget={settings.budget}" if settings.budget is not None else ""
    right, coupled = settings.divide == "right", settings.coupling == "coupled"
    twice = ', coupled="twice"' if coupled else ""
    loss = "made.loss_fn, encode=made.encode" if coupled else "made.loss" if right else "wrong"
    lines = [
        *_faults(settings),
        "import torch",
        "import microbatch as mb",
        "from microbatch.guide.lessons import lesson",
        "from microbatch.guide.training import make_optimizer",
        *([] if right else ["from microbatch.guide.wrong import Divide"]),
        "",
        f'made = lesson("{settings.model}", batch_size={settings.batch}, seed={settings.seed}{norm})',
        *(["made.model.to(torch.bfloat16)"] if settings.precision.startswith("bfloat16") else []),
        f'rates = {{"lr": {settings.lr}, "batch_size": {settings.batch}{rule}}}',
        f'optimizer = make_optimizer(made.model, "{settings.optimizer}", **rates)',
        "accumulator = mb.Accumulator(",
        f"    made.model, optimizer, microbatch_size={size}{budget}{_PRECISION[settings.precision]}{mode}{twice}",
        ")",
        *([] if right else [f'wrong = Divide("{settings.divide}", made.loss, batch_size={settings.batch})']),
        f"torch.manual_seed({settings.seed})",
        f"for index in range({settings.steps}):",
        f"    step = accumulator.step(made.batch(index), {loss})",
        "    print(index + 1, float(step.loss), step.microbatches)",
    ]
    return "\n".join(lines) + "\n"


def _faults(settings: Settings) -> list[str]:
    """Return a comment that says why the gradient of a run differs from the whole batch's on purpose."""
    reasons = {
        "the loss is not divided": settings.divide == "none",
        "it takes a mean of means": settings.divide == "means",
        "BatchNorm sees one microbatch at a time": settings.norm == "batch",
        "gradients are added in bfloat16": settings.precision == "bfloat16-sums",
        "rows are compared within one microbatch only": settings.model == "pairs" and settings.coupling != "coupled",
    }
    said = [reason for reason, given in reasons.items() if given]
    if not said or settings.microbatch == settings.batch:
        return []
    return [f"# Wrong on purpose, not the whole batch's gradient: {', and '.join(said)}."]
