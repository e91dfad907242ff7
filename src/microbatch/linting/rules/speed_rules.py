"""MB501 to MB503 and MB601 to MB603: reductions over ranks, and what costs time or memory alone."""

from microbatch.linting.rules.rule import PLAIN_LOOP, Rule

__all__ = ["SPEED_RULES"]

REDUCED_ONCE = """\
from contextlib import nullcontext

from torch.nn.parallel import DistributedDataParallel

model = DistributedDataParallel(model)
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        with model.no_sync() if k < N - 1 else nullcontext():
            loss = criterion(model(x), y) / N
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""

REDUCES_EVERY_MICROBATCH = Rule(
    code="MB501",
    name="reduces-every-microbatch",
    severity="speed",
    summary="Under DistributedDataParallel, gradients are reduced over the ranks after every microbatch.",
    happens=(
        "Every backward sends all gradients, although only the sum at the end of the window is needed. "
        "The gradients are right; the network carries N times as much."
    ),
    how_much=(
        "With N = 4 there are 4 reductions of the gradients in each step instead of 1. The gradients are right, "
        "with any optimizer."
    ),
    fix="Run forward and backward of every microbatch but the last of a window under `model.no_sync()`.",
    wrong="""\
from torch.nn.parallel import DistributedDataParallel

model = DistributedDataParallel(model)
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right=REDUCED_ONCE,
    certain="The DistributedDataParallel wrapper in this file, and no `no_sync` or `require_backward_grad_sync`.",
)

NO_SYNC_INEFFECTIVE = Rule(
    code="MB502",
    name="no-sync-ineffective",
    severity="speed",
    summary="`no_sync()` is around backward only, where it has no effect.",
    happens=(
        "DistributedDataParallel decides in the forward pass whether the backward of that pass reduces. "
        "A forward outside of `no_sync()` therefore reduces after every microbatch. The gradients are right."
    ),
    how_much=(
        "With N = 4 there are 4 reductions of the gradients in each step instead of 1. The gradients are right, "
        "with any optimizer."
    ),
    fix="Put the forward pass under `no_sync()` too. The forward pass is what counts.",
    wrong="""\
from contextlib import nullcontext

from torch.nn.parallel import DistributedDataParallel

model = DistributedDataParallel(model)
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        with model.no_sync() if k < N - 1 else nullcontext():
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right=REDUCED_ONCE,
    certain="The forward pass outside of the `no_sync()` that the backward is in.",
)

NEVER_REDUCES = Rule(
    code="MB503",
    name="never-reduces",
    severity="error",
    summary="The last microbatch of a window runs under `no_sync()` too, so gradients are never reduced.",
    happens=(
        "Each rank steps with the gradient of its own data. The ranks' weights differ from the first step on. "
        "A checkpoint that rank 0 saves is that of a run on its share of the data alone."
    ),
    how_much=(
        "There are 0 reductions of the gradients in each step instead of 1, so every rank trains a model of its own."
    ),
    fix="Leave the last microbatch of each window out of `no_sync()`.",
    wrong="""\
from torch.nn.parallel import DistributedDataParallel

model = DistributedDataParallel(model)
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        with model.no_sync():
            loss = criterion(model(x), y) / N
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right=REDUCED_ONCE,
    certain="A simulated window in which every forward and backward before the step is under `no_sync()`.",
)

HOST_SYNC = Rule(
    code="MB601",
    name="host-sync",
    severity="speed",
    summary="A number is read from the device in every microbatch.",
    happens=(
        "`.item()`, `float()`, `print` and `if` on a tensor wait until the device has finished everything before. "
        "Meanwhile no new work is queued, so the device is idle until Python has queued some again."
    ),
    how_much=(
        "With N = 4 there are 4 reads in each step instead of 1. What one costs depends on the device; the "
        "gradients are right."
    ),
    fix="Add up `loss.detach()` on the device, and read the sum once a window, or less often.",
    wrong="""\
for step in range(steps):
    total = 0.0
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    print("loss", total)
""",
    right="""\
for step in range(steps):
    total = 0.0
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    print("loss", total.item())
""",
    certain="A value that is known to be a tensor on the device, read without a condition.",
)

GRAPH_RETAINED = Rule(
    code="MB602",
    name="graph-retained",
    severity="speed",
    summary="The losses of the microbatches are added up, and backward runs once for the sum.",
    happens=(
        "The graphs of all N microbatches are alive at the same time, with all their activations. "
        "The gradient is right, but the memory is that of the full batch: accumulation saves nothing."
    ),
    how_much=(
        "With N = 4 there are 4 graphs at the same time instead of 1. The gradients are right, with any optimizer."
    ),
    fix="Run backward for each microbatch: gradients add up, and the graph is freed. Add `loss.detach()` up for logs.",
    wrong="""\
for step in range(steps):
    total = 0.0
    for k in range(N):
        x, y = next(batches)
        total = total + criterion(model(x), y) / N
    total.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right=PLAIN_LOOP,
    certain="A sum of losses with their graphs, and no backward that frees each of them first.",
)

EMPTY_CACHE = Rule(
    code="MB603",
    name="empty-cache",
    severity="speed",
    summary="The allocator's cache is emptied in every microbatch.",
    happens=(
        "`torch.cuda.empty_cache()` waits for the device and gives all free memory back to the driver. "
        "The next microbatch has to ask for it again, which is slow. It does not lower the peak of what is in use."
    ),
    how_much="With N = 4 there are 4 calls in each step instead of 0. The gradients are right, with any optimizer.",
    fix="Leave it out, or call it once after evaluation.",
    wrong="""\
import torch

for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
        torch.cuda.empty_cache()
    optimizer.step()
    optimizer.zero_grad()
""",
    right=PLAIN_LOOP,
    certain="A call without a condition, in the loop over microbatches.",
)

SPEED_RULES = (
    REDUCES_EVERY_MICROBATCH,
    NO_SYNC_INEFFECTIVE,
    NEVER_REDUCES,
    HOST_SYNC,
    GRAPH_RETAINED,
    EMPTY_CACHE,
)
