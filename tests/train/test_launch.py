"""The group of all ranks: what is left of it."""

import subprocess
import sys

ENDED = """
import gc, weakref, torch, torch.distributed as dist
{first}
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)
torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
dist.destroy_process_group()
gc.collect()
print(group() is None)
"""


def ended(first: str) -> str:
    command = [sys.executable, "-c", ENDED.format(first=first)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.strip()


def test_a_destroyed_group_is_gone_although_an_optimizer_came_later() -> None:
    # A group that is kept has threads at Python's end, where a tensor that they drop aborts the process.
    assert ended("import microbatch.train.launch") == "True"
