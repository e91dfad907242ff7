"""One rank: run a function of a file in a process of its own; a script that `run_ranks` starts, not a test.

Arguments: file, function, rank, ranks, folder. What the function returns is saved in the folder.
"""

import datetime as dt
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Longer than any case takes, and short enough that a rank which waits for nobody ends before its parent loses patience.
PATIENCE = dt.timedelta(seconds=25)


def main(file: str, name: str, rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[2]))  # what tests share
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
    # Past Python's own end: in one of some thirty processes torch's threads are not done by then, and abort it
    # ("terminate called without an active exception"), also where nothing but all-reduces ran.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
