"""MB401 to MB405: losses and layers for which the mean of N microbatches is not the full batch."""

from microbatch.linting.rules.rule import OFF, Rule

__all__ = ["LOSS_RULES"]

MEAN_OF_MEANS = Rule(
    code="MB401",
    name="mean-of-means",
    severity="warning",
    summary="Each microbatch is averaged over its own counted tokens, and then the microbatches are averaged.",
    happens=(
        "A microbatch with few counted tokens weighs as much as one with many, so its tokens weigh more. "
        "The full batch gives every token the same weight. This happens with padding, `ignore_index`, masks, and "
        "losses of a model that leave labels of -100 out."
    ),
    how_much=(
        OFF + "SGD 3.3 %; AdamW 20 %. The first gradient is off by 35 % for microbatches of 20, 16, 4 and 24 tokens."
    ),
    fix="Sum the loss in each microbatch, and divide by the number of counted tokens of the whole window.",
    wrong="""\
import torch.nn.functional as F

for step in range(steps):
    for k in range(N):
        tokens, labels = next(batches)  # -100 where the rows are padded
        logits = model(tokens).flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-100)
        (loss / N).backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right="""\
import torch.nn.functional as F

for step in range(steps):
    window = [next(batches) for k in range(N)]
    count = sum((labels != -100).sum() for tokens, labels in window)
    for tokens, labels in window:
        logits = model(tokens).flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        (loss / count).backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    certain="In this file: labels that are left out (padding, a mask, -100 in labels), and a mean over the rest.",
)

BATCH_COUPLED_LOSS = Rule(
    code="MB402",
    name="batch-coupled-loss",
    severity="error",
    summary="The loss compares the rows of a batch with one another, and sees one microbatch only.",
    happens=(
        "In a contrastive loss, the other rows of the batch are the negatives. With N microbatches, every row has N "
        "times fewer of them. The mean of the microbatches' losses is another loss, at any number of microbatches. "
        "Mixup, and statistics over the batch inside a loss, have the same problem in a weaker form."
    ),
    how_much=(OFF + "SGD 47 %; AdamW 44 %. A row has 3 negatives instead of 15."),
    fix=(
        "Encode all microbatches first, compute the loss of the whole batch on what they return, and run backward "
        "through each microbatch again. `accumulator.step(batch, loss_fn, encode=encode)` does that."
    ),
    wrong="""\
import torch
import torch.nn.functional as F

for step in range(steps):
    for k in range(N):
        a, b = next(batches)  # pairs: every other row of b is a negative
        logits = model(a) @ model(b).T
        loss = F.cross_entropy(logits, torch.arange(len(a))) / N
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right="""\
import torch
import torch.nn.functional as F

for step in range(steps):
    window = [next(batches) for k in range(N)]
    with torch.no_grad():
        first = torch.cat([model(a) for a, b in window]).requires_grad_()
        second = torch.cat([model(b) for a, b in window]).requires_grad_()
    F.cross_entropy(first @ second.T, torch.arange(len(first))).backward()
    for (a, b), d_a, d_b in zip(window, first.grad.tensor_split(N), second.grad.tensor_split(N)):
        torch.autograd.backward([model(a), model(b)], [d_a, d_b])
    optimizer.step()
    optimizer.zero_grad()
""",
    certain=(
        "A loss that is known to couple rows, or `x @ y.T` with the labels `arange`, and no cached representations."
    ),
)

BATCH_NORM = Rule(
    code="MB403",
    name="batch-norm",
    severity="warning",
    summary="Batch normalisation uses the statistics of a microbatch instead of those of the batch.",
    happens=(
        "Each row is normalised by the mean and variance of its own microbatch, so both the output and the gradient "
        "differ from the full batch's. The smaller the microbatch, the more. The running statistics move N times for "
        "each step."
    ),
    how_much=(
        OFF + "SGD 64 %; AdamW 38 %. "
        "The first gradient is off by 47 % with 4 rows in a microbatch, 11 % with 16 rows and 2 % with 64 rows."
    ),
    fix=(
        "Use a norm that looks at one row, such as GroupNorm or LayerNorm. Or keep BatchNorm and use "
        '`mb.Accumulator(batch_norm="exact")`, which normalises by the whole batch.'
    ),
    wrong="""\
from torch import nn, optim

model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
optimizer = optim.SGD(model.parameters(), lr=0.1)
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right="""\
from torch import nn, optim

model = nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = optim.SGD(model.parameters(), lr=0.1)
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    certain="A BatchNorm that is created in this file, and a microbatch size that is known to be small.",
)

UNEVEN_MICROBATCH = Rule(
    code="MB404",
    name="uneven-microbatch",
    severity="warning",
    summary="A batch is sliced into microbatches of different sizes, and all have the weight 1/N.",
    happens=(
        "If N does not divide the number of rows, the last slice is shorter than the others. "
        "Its rows weigh more than the rows of the other slices."
    ),
    how_much=(
        OFF + "SGD 14 %; AdamW 13 %. "
        "There, a batch of 10 rows is cut into 3, 3, 3 and 1, so that one row weighs three times as much as the others."
    ),
    fix="Weigh each slice by its share of the rows, `len(part) / len(x)`, or assert that N divides the number of rows.",
    wrong="""\
import math

for x, y in loader:  # whole batches
    size = math.ceil(len(x) / N)
    for x_part, y_part in zip(x.split(size), y.split(size)):
        loss = criterion(model(x_part), y_part) / N
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right="""\
import math

for x, y in loader:  # whole batches
    size = math.ceil(len(x) / N)
    for x_part, y_part in zip(x.split(size), y.split(size)):
        loss = criterion(model(x_part), y_part) * len(x_part) / len(x)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    certain="Slices that are known to be of different sizes. Otherwise it depends on the number of rows.",
)

SHARED_PARAMETER = Rule(
    code="MB405",
    name="shared-parameter",
    severity="warning",
    summary="A parameter of the loss, such as a temperature, gets its gradient once for each microbatch.",
    happens=(
        "With cached representations, the loss of the whole batch is computed N times, each time with the graph of "
        "another microbatch. The encoder's gradients are right. A parameter outside of the encoder is part of all N "
        "losses, so its gradient is N times too large."
    ),
    how_much=(
        OFF + "SGD 39 %; AdamW nothing that can be seen (5e-9). "
        "The gradient of the parameter is 4 times too large with N = 4."
    ),
    fix="Detach the parameter in all but one of the N losses, or divide its gradient by N before the step.",
    wrong="""\
import torch
import torch.nn.functional as F

for step in range(steps):
    window = [next(batches)[0] for k in range(N)]
    with torch.no_grad():
        cached = [model(x) for x in window]
    for k, x in enumerate(window):
        z = torch.cat([*cached[:k], model(x), *cached[k + 1 :]])
        logits = z @ z.T * log_scale.exp()
        F.cross_entropy(logits, torch.arange(len(z))).backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right="""\
import torch
import torch.nn.functional as F

for step in range(steps):
    window = [next(batches)[0] for k in range(N)]
    with torch.no_grad():
        cached = [model(x) for x in window]
    for k, x in enumerate(window):
        z = torch.cat([*cached[:k], model(x), *cached[k + 1 :]])
        logits = z @ z.T * log_scale.exp()
        F.cross_entropy(logits, torch.arange(len(z))).backward()
    log_scale.grad /= N
    optimizer.step()
    optimizer.zero_grad()
""",
    certain="Never: it depends on whether the parameter is trained.",
)

LOSS_RULES = (MEAN_OF_MEANS, BATCH_COUPLED_LOSS, BATCH_NORM, UNEVEN_MICROBATCH, SHARED_PARAMETER)
