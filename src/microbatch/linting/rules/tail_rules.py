"""MB110 to MB114: what becomes of the last, short window of an epoch, and of a window that loses a microbatch."""

from microbatch.linting.rules.rule import OFF, Rule

__all__ = ["TAIL_RULES"]

# The loop that is right for every length: each window is divided by the number of microbatches that it has.
EVERY_WINDOW_WHOLE = """\
for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        size = min(N, len(loader) - i // N * N)  # of this window
        loss = criterion(model(x), y) / size
        loss.backward()
        if (i + 1) % N == 0 or i + 1 == len(loader):
            optimizer.step()
            optimizer.zero_grad()
"""

TAIL_LEAKS = Rule(
    code="MB110",
    name="tail-leaks",
    severity="warning",
    summary="The microbatches after an epoch's last whole window join the first step of the next epoch.",
    happens=(
        "If N does not divide the number of microbatches in an epoch, no step is taken for the rest. "
        "Nothing clears its gradients either, so they are added to the next epoch's first window. "
        "That step takes N + r microbatches with weight 1/N each, and r of them were computed with older weights. "
        "After the last epoch, the rest is never stepped."
    ),
    how_much=(OFF + "SGD 14 %; AdamW 10 %. With 26 microbatches an epoch, 60 steps are taken instead of 70."),
    fix=(
        "Step at the end of the epoch too, and divide the last window by the number of microbatches that it has. "
        "Or drop the rest on purpose, with a loop over `len(loader) // N * N` microbatches."
    ),
    wrong="""\
for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / N
        loss.backward()
        if (i + 1) % N == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    right=EVERY_WINDOW_WHOLE,
    certain="The number of microbatches in an epoch, as a constant. Otherwise it depends on that number.",
)

TAIL_DROPPED = Rule(
    code="MB111",
    name="tail-dropped",
    severity="warning",
    summary="The microbatches after an epoch's last whole window are cleared, or never stepped.",
    happens=(
        "If N does not divide the number of microbatches in an epoch, the gradients of the rest are computed and "
        "thrown "
        "away. If the loader does not shuffle, the same rows are never learnt from."
    ),
    how_much=(
        OFF + "SGD 27 %; AdamW 18 %. "
        "With 26 microbatches an epoch, 60 steps are taken instead of 70, and 2 of 26 microbatches are lost."
    ),
    fix=(
        "Step at the end of the epoch too, and divide the last window by the number of microbatches that it has. "
        "Or stop the loop before the rest, so that nothing is computed in vain."
    ),
    wrong="""\
for epoch in range(epochs):
    optimizer.zero_grad()
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / N
        loss.backward()
        if (i + 1) % N == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    right=EVERY_WINDOW_WHOLE,
    certain="The number of microbatches in an epoch, as a constant. Otherwise it depends on that number.",
)

TAIL_SCALE = Rule(
    code="MB112",
    name="tail-scale",
    severity="warning",
    summary="The short last window is stepped, but divided by N instead of by its own number of microbatches.",
    happens=(
        "If N does not divide the number of microbatches in an epoch, the last window has r of them, each with weight "
        "1/N. The gradient of that step is r/N of a mean. Adam and AdamW divide by the size of the gradient, but by "
        "one that is averaged over many steps, so they notice too."
    ),
    how_much=(
        OFF + "SGD 11 %; AdamW 7.1 %. "
        "With 26 microbatches an epoch, the gradient of every seventh step is 2/4 of the full batch's."
    ),
    fix="Divide by `min(N, len(loader) - i // N * N)`, which is the number of microbatches in this window.",
    wrong="""\
for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / N
        loss.backward()
        if (i + 1) % N == 0 or i + 1 == len(loader):
            optimizer.step()
            optimizer.zero_grad()
""",
    right=EVERY_WINDOW_WHOLE,
    certain="The number of microbatches in an epoch, as a constant. Otherwise it depends on that number.",
)

TAIL_STEP_DIFFERS = Rule(
    code="MB113",
    name="tail-step-differs",
    severity="warning",
    summary="The step after the loop lacks the clipping, unscaling or scheduler of the step inside it.",
    happens=(
        "The last window of an epoch is stepped in another place, and that place was not kept up to date. "
        "Without clipping, one step an epoch is as long as its gradient. "
        "Without `scaler.unscale_`, the clipping there sees scaled gradients; without `scheduler.step()`, the schedule "
        "is one step short in every epoch."
    ),
    how_much=(
        OFF + "SGD 45 %; AdamW 36 %. "
        "With 26 microbatches an epoch, a step without clipping at 0.1 of the first gradient's norm was 17 times "
        "too large."
    ),
    fix="Put the step into one function, or move the condition for the last microbatch into the loop.",
    wrong="""\
from torch.nn.utils import clip_grad_norm_

for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        size = min(N, len(loader) - i // N * N)  # of this window
        loss = criterion(model(x), y) / size
        loss.backward()
        if (i + 1) % N == 0:
            clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
    if len(loader) % N != 0:
        optimizer.step()
        optimizer.zero_grad()
""",
    right="""\
from torch.nn.utils import clip_grad_norm_

for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        size = min(N, len(loader) - i // N * N)  # of this window
        loss = criterion(model(x), y) / size
        loss.backward()
        if (i + 1) % N == 0 or i + 1 == len(loader):
            clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
""",
    certain="Both steps in one function, and the number of microbatches in an epoch as a constant.",
)

SKIP_IN_WINDOW = Rule(
    code="MB114",
    name="skip-in-window",
    severity="warning",
    summary="A microbatch can be skipped inside a window, and the others keep the weight 1/N.",
    happens=(
        "A `continue` or an `except` leaves the window with fewer microbatches than N, but each is divided by N. "
        "The gradient of that step is too small. If the handler calls `zero_grad`, the microbatches before are lost "
        "too. If memory ended in the middle of a backward, half of a gradient stays in the sum."
    ),
    how_much=(
        OFF + "SGD 6.4 %; AdamW 3.2 %. "
        "There, every second window skips one microbatch of four, and its gradient is 3/4 of the right one."
    ),
    fix="Count the microbatches that were used, and divide by that number before the step.",
    wrong="""\
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        if len(x) == 0:
            continue
        loss = criterion(model(x), y) / N
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right="""\
for step in range(steps):
    used = 0
    for k in range(N):
        x, y = next(batches)
        if len(x) == 0:
            continue
        loss = criterion(model(x), y)
        loss.backward()
        used += 1
    for p in model.parameters():
        p.grad /= used
    optimizer.step()
    optimizer.zero_grad()
""",
    certain="Never: it depends on how often a microbatch is skipped.",
)

TAIL_RULES = (TAIL_LEAKS, TAIL_DROPPED, TAIL_SCALE, TAIL_STEP_DIFFERS, SKIP_IN_WINDOW)
