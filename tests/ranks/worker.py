"""One rank's place: it imports torch once, then forks a process for each function; `run_ranks` starts it, not a test.

Lines on the standard input are jobs, one after the other; for each, two lines come back: the number of the process that
runs it, and its exit status. Every rank has a place of its own, so that two ranks differ in what a process begins with,
such as the order of a set of texts.
"""

import datetime as dt
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import microbatch as mb

# Longer than any case takes, and short enough that a rank which waits for nobody ends before its parent loses patience.
PATIENCE = dt.timedelta(seconds=25)
# What most ranks import besides, and what takes long.
IMPORTED = ("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp")


def run(file: str, name: str, rank: int, ranks: int, folder: Path) -> None:
    """Run a function of a file as one rank of several, and save in the folder what it returns."""
    # A file in a folder of their own: no port to collide on.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks, timeout=PATIENCE
    )
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    result: Any = getattr(module, name)(rank, ranks)
    torch.save(result, folder / f"result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def child(job: dict[str, Any]) -> None:
    """Run a job in the process that was forked for it, and end the process."""
    folder, rank = Path(job["folder"]), job["rank"]
    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, place in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(stream, place)
    os.chdir(job["directory"])
    os.environ.clear()
    os.environ.update(job["environment"])
    status = 1
    try:
        run(job["file"], job["function"], rank, job["ranks"], folder)
        status = 0
    except BaseException:  # noqa: BLE001 - it is written where the parent reads it
        traceback.print_exc()
    # Past Python's own end: in one of some thirty processes torch's threads are not done by then, and abort it
    # ("terminate called without an active exception"), also where nothing but all-reduces ran.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def tell(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main() -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[2]))  # what tests share
    for name in IMPORTED:
        importlib.import_module(name)
    for name in mb.__all__:  # each is imported when it is first asked for
        getattr(mb, name)
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if not process:
            child(job)
        tell(process)
        tell(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


if __name__ == "__main__":
    main()
