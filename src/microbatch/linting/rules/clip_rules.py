"""MB201 to MB204: clipping, and the order of a gradient scaler's calls."""

from microbatch.linting.rules.rule import OFF, Rule

__all__ = ["CLIP_RULES"]

UNSCALED_ONCE = """\
from torch.nn.utils import clip_grad_norm_

for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
"""

CLIP_EVERY_MICROBATCH = Rule(
    code="MB201",
    name="clip-every-microbatch",
    severity="warning",
    summary="Gradients are clipped after every microbatch, not once a window.",
    happens=(
        "What is clipped is the sum so far. If its norm is above the threshold before the window is complete, the "
        "microbatches so far are cut down and later ones weigh more. "
        "Below the threshold, nothing changes. The norm is computed N times instead of once."
    ),
    how_much=(
        OFF + "SGD 8.6 %; AdamW 12 %. The threshold was 0.3 of the first gradient's norm. "
        "That gradient is off by 29 % at 0.3 of the gradient's norm, and by nothing at 0.9 of the gradient's norm."
    ),
    fix="Clip once a window, between the last backward and `optimizer.step()`.",
    wrong="""\
from torch.nn.utils import clip_grad_norm_

for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
        clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
""",
    right="""\
from torch.nn.utils import clip_grad_norm_

for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
    clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
""",
    certain="A simulated window in which gradients are clipped before its last backward.",
)

CLIP_SCALED_GRADIENTS = Rule(
    code="MB202",
    name="clip-scaled-gradients",
    severity="error",
    summary="Clipping sees gradients that are still multiplied by the loss scale.",
    happens=(
        "The norm that is compared with the threshold is thousands of times too large, so every step is clipped. "
        "The scaler then divides what is left by the loss scale. The update is far too small, and its size depends on "
        "the scale alone. Adam and AdamW divide by the size of the gradient, so they hide it until eps matters."
    ),
    how_much=(OFF + "SGD 100 %; AdamW 4.5 %. With SGD, an update is 65,536 times too small: that is the loss scale."),
    fix="Call `scaler.unscale_(optimizer)` before clipping.",
    wrong=UNSCALED_ONCE.replace("    scaler.unscale_(optimizer)\n", ""),
    right=UNSCALED_ONCE,
    certain="A scaler that is known to be enabled, and no `unscale_` on any path from backward to clipping.",
)

UNSCALE_TWICE = Rule(
    code="MB203",
    name="unscale-twice",
    severity="error",
    summary="`unscale_` runs twice for one optimizer before `update`, which PyTorch refuses.",
    happens=(
        "The first window with more than one microbatch ends in a RuntimeError. Gradients may be unscaled once a "
        "window only, when all of them are there: what is added later is still scaled."
    ),
    how_much="Nothing is trained: the first window raises a RuntimeError.",
    fix="Call `scaler.unscale_(optimizer)` once a window, after the last backward.",
    wrong="""\
from torch.nn.utils import clip_grad_norm_

for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
""",
    right=UNSCALED_ONCE,
    certain="A simulated window in which `unscale_` runs twice, and a scaler that is known to be enabled.",
)

SCALER_ORDER = Rule(
    code="MB204",
    name="scaler-order",
    severity="error",
    summary="`scaler.update()` is missing, runs before `scaler.step()`, or runs once a microbatch.",
    happens=(
        "Before the step, `update` makes the scaler forget that gradients are unscaled, so `step` divides them by the "
        "scale again. Once a microbatch, `update` raises where no gradient was unscaled, or changes the scale inside a "
        "window, so that its microbatches have different weights. Where it is missing, the second step raises."
    ),
    how_much=(
        "With SGD, the first update is 65,536 times too small: that is the loss scale. The second window raises "
        "a RuntimeError. "
        "The other wrong orders raise at once, or at the second step."
    ),
    fix="In this order, once a window: `unscale_`, clip, `step`, `update`.",
    wrong=UNSCALED_ONCE.replace(
        "    scaler.step(optimizer)\n    scaler.update()\n", "    scaler.update()\n    scaler.step(optimizer)\n"
    ),
    right=UNSCALED_ONCE,
    certain="A simulated window with the calls in a wrong order, and a scaler that is known to be enabled.",
)

CLIP_RULES = (CLIP_EVERY_MICROBATCH, CLIP_SCALED_GRADIENTS, UNSCALE_TWICE, SCALER_ORDER)
