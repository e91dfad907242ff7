"""What a step costs in a framework: its own accumulation against the adapter's, at the same microbatch size.

``python -m benchmarks.adapters`` trains a small GPT in Transformers' Trainer and in Lightning. Each run is a process of
its own, and runs take turns. "unfused" is the adapter without fused products: it does the framework's own arithmetic.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import hardware, versions
from benchmarks.summary import order_of_round, summarize, summarize_ratio

OUT = Path(__file__).parent / "results" / "adapters.json"
FRAMEWORKS, WAYS = ("trainer", "lightning"), ("own", "adapter", "unfused")
BATCH, LENGTH, WORDS = 8, 128, 50_257
GOALS = {"unfused": 1.02, "adapter": 0.9}


def rows(number: int) -> Any:
    """Return rows of random words; shape ``(128,)`` each."""
    import torch

    generator = torch.Generator().manual_seed(0)
    words = torch.randint(WORDS, (number, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in words]


def network() -> Any:
    """Return a GPT of 54 million parameters: 6 blocks of 384 channels."""
    import torch

    tf: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, use_cache=False, **size)
    )


def options(way: str) -> dict[str, Any]:
    """Return the options of the accumulator."""
    import microbatch as mb

    return {"sums": mb.Sums(fuse=way != "unfused"), "memory_budget": "none"}


def trainer_seconds(way: str, *, size: int, steps: int) -> list[float]:
    """Train in Transformers' Trainer, and return the seconds of each step."""
    from microbatch.integrations.transformers import MicrobatchTrainer

    tf: Any = importlib.import_module("transformers")
    times: list[float] = []

    class Clock(tf.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    own = way == "own"
    with tempfile.TemporaryDirectory() as folder:
        arguments = tf.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size if own else BATCH,
            gradient_accumulation_steps=BATCH // size if own else 1,
            max_steps=steps,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        given = {} if own else {"microbatch_size": size, "accumulator": options(way)}
        kind: Any = tf.Trainer if own else MicrobatchTrainer
        kind(network(), arguments, train_dataset=rows(BATCH * steps), callbacks=[Clock()], **given).train()
    return [after - before for before, after in itertools.pairwise(times)]


def lightning_seconds(way: str, *, size: int, steps: int) -> list[float]:
    """Train in Lightning, and return the seconds of each step."""
    import torch

    from microbatch.integrations.lightning import Microbatch

    pl: Any = importlib.import_module("lightning.pytorch")
    times: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: Any, index: int) -> Any:
            del index
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class Clock(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > len(times):
                times.append(time.perf_counter())

    own = way == "own"
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[Clock()] if own else [Microbatch(microbatch_size=size, **options(way)), Clock()],
        accumulate_grad_batches=BATCH // size if own else 1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(rows(BATCH * steps), batch_size=size if own else BATCH))
    return [after - before for before, after in itertools.pairwise(times)]


def run(framework: str, way: str, *, size: int, steps: int) -> dict[str, float]:
    """Run one contender in a process of its own; the seconds of a step, and the peak resident bytes."""
    command = [sys.executable, "-m", "benchmarks.adapters", "--only", framework, way, "--size", str(size)]
    done = subprocess.run(  # noqa: S603 - this interpreter and this file
        [*command, "--steps", str(steps)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run; the first is not counted")
    parser.add_argument("--size", type=int, default=1, help="microbatch size")
    parser.add_argument("--only", nargs=2, metavar=("FRAMEWORK", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    flags = parser.parse_args(arguments)
    if flags.only:
        framework, way = flags.only
        seconds = {"trainer": trainer_seconds, "lightning": lightning_seconds}[framework]
        found = statistics.median(seconds(way, size=flags.size, steps=flags.steps))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": found, "peak": peak}))
        return 0
    result: dict[str, Any] = {"hardware": hardware("cpu"), "versions": versions(), "size": flags.size, "batch": BATCH}
    for framework in FRAMEWORKS:
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for index in range(flags.repeats):
            for way in order_of_round(WAYS, index):
                runs[way].append(run(framework, way, size=flags.size, steps=flags.steps))
        own = [each["seconds"] for each in runs["own"]]
        told: dict[str, Any] = {}
        for way, each in runs.items():
            seconds, peak = [one["seconds"] for one in each], statistics.median(one["peak"] for one in each)
            ratio = summarize_ratio(seconds, own)
            told[way] = {"seconds": asdict(summarize(seconds)), "over own": asdict(ratio), "peak": peak}
            goal = f", goal {GOALS[way]}" if way in GOALS else ""
            print(
                f"{framework:10s} {way:8s} {statistics.median(seconds):.3f} s a step, {ratio.median:.3f} of its own "
                f"(quartiles {ratio.lower:.3f} to {ratio.upper:.3f}{goal}), resident {peak / 2**20:.0f} MiB"
            )
        result[framework] = told
    flags.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
