"""MB101 to MB107: the microbatches of a window do not have the weights that the full batch gives them."""

from microbatch.linting.rules.rule import OFF, PLAIN_LOOP, Rule

__all__ = ["WEIGHT_RULES"]

LOSS_NOT_DIVIDED = Rule(
    code="MB101",
    name="loss-not-divided",
    severity="error",
    summary="The mean losses of N microbatches are added up, and nothing divides by N.",
    happens=(
        "Every microbatch enters the step with weight 1 instead of 1/N, so the gradient is N times that of the full "
        "batch. Clipping then cuts it by another amount, and SGD takes steps that are N times too long. "
        "Adam and AdamW divide by the size of the gradient, so without clipping they hardly notice."
    ),
    how_much=(
        OFF + "SGD 92 %; SGD with clipping at 1.0 34 %; AdamW with clipping at 1.0 15 %; AdamW nothing that can be "
        "seen (3e-7). "
        "The gradient is 4 times too large."
    ),
    fix="Divide the loss by N before `backward`. SGD then takes steps N times smaller. If your learning rate was "
    "chosen with the undivided loss, multiply it by N.",
    wrong="""\
import torch.nn.functional as F

for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = F.mse_loss(model(x), y)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right="""\
import torch.nn.functional as F

for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = F.mse_loss(model(x), y) / N
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    certain=(
        "Every line between the loss and `backward`, a loss that is known to be a mean, and no later division of the "
        "gradients."
    ),
)

LOSS_DIVIDED_TWICE = Rule(
    code="MB102",
    name="loss-divided-twice",
    severity="error",
    summary="The loss is divided by N twice: by the script and by the framework, or twice by the script.",
    happens=(
        "Accelerate, DeepSpeed and `mb.Accumulator` divide by themselves. With a division in the script, every "
        "microbatch has the weight 1/N² instead of 1/N, so the gradient is N times too small. "
        "SGD takes steps that are N times too short, and a clipping threshold is reached later. "
        "Adam and AdamW hardly notice."
    ),
    how_much=(OFF + "SGD 41 %; AdamW nothing that can be seen (1e-6). The gradient is a quarter of the full batch's."),
    fix="Leave the division to the framework: pass the loss as it is.",
    wrong="""\
from accelerate import Accelerator

accelerator = Accelerator(gradient_accumulation_steps=N)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(epochs):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = criterion(model(x), y) / N
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
""",
    right="""\
from accelerate import Accelerator

accelerator = Accelerator(gradient_accumulation_steps=N)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(epochs):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = criterion(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
""",
    certain="The framework's number of microbatches in this file, and the division in the script.",
)

ZERO_GRAD_IN_WINDOW = Rule(
    code="MB103",
    name="zero-grad-in-window",
    severity="error",
    summary="Gradients are cleared between two backward passes of one window.",
    happens=(
        "Only the microbatches after the last clearing enter the step; the others are computed and thrown away. "
        "If the loss is divided by N, what is left also has the weight 1/N."
    ),
    how_much=(OFF + "SGD 44 %; AdamW 46 %. The gradient is that of one microbatch of four, times 1/4."),
    fix="Clear the gradients once a window: after `optimizer.step()`, or before the window's first backward.",
    wrong="""\
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        optimizer.zero_grad()
        loss = criterion(model(x), y) / N
        loss.backward()
    optimizer.step()
""",
    right="""\
for step in range(steps):
    optimizer.zero_grad()
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
    optimizer.step()
""",
    certain="A simulated window in which cleared gradients were not stepped, and an optimizer that no framework wraps.",
)

STEP_EVERY_MICROBATCH = Rule(
    code="MB104",
    name="step-every-microbatch",
    severity="error",
    summary="The loss is divided by N, but the optimizer steps after every microbatch.",
    happens=(
        "Nothing is accumulated: each step is taken with one microbatch, whose weight is 1/N. "
        "There are N times as many steps as planned. A schedule that counts steps ends N times too early."
    ),
    how_much=(OFF + "SGD 3.7 %; AdamW 61 %. There are 240 steps instead of 60."),
    fix="Call `optimizer.step()` and `optimizer.zero_grad()` once for N microbatches.",
    wrong="""\
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
""",
    right=PLAIN_LOOP,
    certain="A division by N, and a step without a condition, on the same path through the file.",
)

WINDOW_PHASE = Rule(
    code="MB105",
    name="window-phase",
    severity="error",
    summary="The first window, or every so many windows, has another number of microbatches than N.",
    happens=(
        "The counter that is tested is off by one, or is reset in the middle of a window. With `i % N == 0` and a "
        "counter that begins at 0, the first step takes one microbatch with weight 1/N. If the counter begins at 0 "
        "in every epoch, this happens once an epoch. The last microbatches of the epoch then wait for the next one."
    ),
    how_much=(
        OFF + "SGD 5 %; AdamW 13 %. "
        "The first step takes one microbatch of four, times 1/4; later windows are shifted by one microbatch."
    ),
    fix="Test `(i + 1) % N == 0` where the counter begins at 0, and `i % N == 0` where it begins at 1.",
    wrong="""\
i = 0
for epoch in range(epochs):
    for x, y in loader:
        loss = criterion(model(x), y) / N
        loss.backward()
        if i % N == 0:
            optimizer.step()
            optimizer.zero_grad()
        i += 1
""",
    right="""\
i = 0
for epoch in range(epochs):
    for x, y in loader:
        loss = criterion(model(x), y) / N
        loss.backward()
        if (i + 1) % N == 0:
            optimizer.step()
            optimizer.zero_grad()
        i += 1
""",
    certain="A simulation in which the counter's first value, and everything that changes it, is known.",
)

BACKWARD_ONLY_AT_BOUNDARY = Rule(
    code="MB106",
    name="backward-only-at-boundary",
    severity="error",
    summary="`backward` runs for the last microbatch of a window only.",
    happens=(
        "The losses of the other microbatches are computed and thrown away, so they never enter a step. "
        "The effective batch is one microbatch. If its loss is divided by N, the gradient is too small as well."
    ),
    how_much=(OFF + "SGD 44 %; AdamW 46 %. The gradient is that of one microbatch of four, times 1/4."),
    fix="Call `backward` for every microbatch, and keep only the step and `zero_grad` behind the condition.",
    wrong="""\
for i in range(steps * N):
    x, y = next(batches)
    loss = criterion(model(x), y) / N
    if (i + 1) % N == 0:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
""",
    right="""\
for i in range(steps * N):
    x, y = next(batches)
    loss = criterion(model(x), y) / N
    loss.backward()
    if (i + 1) % N == 0:
        optimizer.step()
        optimizer.zero_grad()
""",
    certain="No path through the loop on which another microbatch's loss reaches a backward.",
)

ZERO_GRAD_MISSING = Rule(
    code="MB107",
    name="zero-grad-missing",
    severity="error",
    summary="Gradients are not cleared between two steps, so each step takes those of all earlier steps again.",
    happens=(
        "`backward` adds to what `.grad` holds. Without `zero_grad` after the step, the gradients of all earlier "
        "windows stay there and are taken again in every step, although they belong to older weights. "
        "The gradient grows from step to step."
    ),
    how_much=(
        OFF + "SGD 1784 %; AdamW 188 %. The second step takes the gradients of two windows, the tenth those of ten."
    ),
    fix="Call `optimizer.zero_grad()` after each `optimizer.step()`, or before the first backward of each window.",
    wrong="""\
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
    optimizer.step()
""",
    right=PLAIN_LOOP,
    certain="Every step and every clearing of gradients in the file; nothing that it does not show gets the optimizer.",
)

WEIGHT_RULES = (
    LOSS_NOT_DIVIDED,
    LOSS_DIVIDED_TWICE,
    ZERO_GRAD_IN_WINDOW,
    STEP_EVERY_MICROBATCH,
    WINDOW_PHASE,
    BACKWARD_ONLY_AT_BOUNDARY,
    ZERO_GRAD_MISSING,
)
