"""Run items one after the other in this process, and write down what became of each; started by `run`."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.gpu.here import Here
from benchmarks.gpu.outcome import FAILED, NOT_HERE, PASSED, Log, NotHeldError, NotHereError
from benchmarks.gpu.schedule import Item, function_of
from benchmarks.gpu.variables import ITEM, LOG

ENOUGH = 0.75  # of an item's time: what has several rows begins no other one after it


def run_item(item: Item, here: Here, log: Log) -> bool:
    """Run one item.

    Args:
        item: The item.
        here: Where.
        log: What is written to.

    Returns:
        Whether this process can run another one: not after an error, which the device may remember.
    """
    log.write(event="begin", item=item.name)
    os.environ[ITEM] = item.name
    started, numbers, note, good = time.perf_counter(), None, "", True
    try:
        numbers, status = function_of(item)(here, partial(log.write, event="row", item=item.name)), PASSED
        here.wait()  # an error on the device may show only here
    except NotHereError as error:
        status, note = NOT_HERE, str(error)
    except NotHeldError as error:
        status, note = FAILED, str(error)
    except Exception as error:  # noqa: BLE001 - whatever it was, the other items run
        where, good = traceback.extract_tb(error.__traceback__)[-1], False
        told = f"{type(error).__name__}: {str(error)[:1500]}"
        status, note = FAILED, f"{told} ({Path(where.filename).name}:{where.lineno})"
        traceback.print_exc()
    seconds = round(time.perf_counter() - started, 2)
    log.write(event="end", item=item.name, status=status, seconds=seconds, note=note, numbers=numbers)
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the items, up to the first error.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0, or 1 after an error.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child", description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--schedule", required=True, help="module with the items")
    parser.add_argument("names", nargs="+")
    flags = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # of a library that knows this device less well than the CPU
    log = Log(flags.log)
    os.environ[LOG] = str(flags.log.absolute())  # for the tests' own processes
    if flags.device == "cpu":
        torch.set_num_threads(1)
    device = torch.device("cuda:0" if flags.device == "cuda" else flags.device)  # some of torch's calls want an index
    by_name: dict[str, Item] = {each.name: each for each in import_module(flags.schedule).ITEMS}
    for name in flags.names:
        item = by_name[name]
        here = Here(device, tiny=flags.tiny, until=time.monotonic() + ENOUGH * item.seconds)
        torch.manual_seed(0)
        if not run_item(item, here, log):
            return 1
        here.clean()
    return 0


if __name__ == "__main__":
    sys.exit(main())
