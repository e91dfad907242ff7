"""MB301 to MB305: what is counted in steps and what in microbatches, and what should live as long as the run."""

from microbatch.linting.rules.rule import OFF, Rule

__all__ = ["SCHEDULE_RULES"]

SCHEDULE_UNITS = Rule(
    code="MB301",
    name="schedule-units",
    severity="error",
    summary=(
        "The scheduler's length is counted in microbatches and it is stepped once a window, or the other way round."
    ),
    happens=(
        "A schedule of `len(loader)` steps that is stepped once a window walks 1/N of its way: warmup is N times too "
        "long, and the learning rate never comes down. The other way round it is at its end after 1/N of the run. "
        "Both units are right; only the pair is a fault."
    ),
    how_much=(OFF + "SGD 20 %; AdamW 29 %. The last learning rate is 75 % of the first one, not 1 %."),
    fix=(
        "Count both in optimizer steps: `len(loader) // N` for each epoch, and `scheduler.step()` after the "
        "optimizer's."
    ),
    wrong="""\
import torch

total = epochs * len(loader)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=total)
for epoch in range(epochs):
    data = iter(loader)
    for step in range(len(loader) // N):
        for k in range(N):
            x, y = next(data)
            loss = criterion(model(x), y) / N
            loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
""",
    right="""\
import torch

total = epochs * (len(loader) // N)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=total)
for epoch in range(epochs):
    data = iter(loader)
    for step in range(len(loader) // N):
        for k in range(N):
            x, y = next(data)
            loss = criterion(model(x), y) / N
            loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
""",
    certain=(
        "Both in this file: the length from `len(loader)` with or without `// N`, and where the scheduler is stepped."
    ),
)

SCHEDULER_NOT_PREPARED = Rule(
    code="MB302",
    name="scheduler-not-prepared",
    severity="warning",
    summary="The scheduler is stepped inside `accumulate()`, but `prepare()` was not given it.",
    happens=(
        "Under `accumulate()`, a prepared optimizer or scheduler does nothing before the last microbatch of a window. "
        "A scheduler that was not prepared steps every time, so it is N times ahead of the optimizer."
    ),
    how_much=(OFF + "SGD 49 %; AdamW 70 %. The schedule is at its end after 15 of 60 steps."),
    fix="Pass the scheduler to `accelerator.prepare`.",
    wrong="""\
from accelerate import Accelerator

accelerator = Accelerator(gradient_accumulation_steps=N)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(epochs):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = criterion(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
""",
    right="""\
from accelerate import Accelerator

accelerator = Accelerator(gradient_accumulation_steps=N)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
for epoch in range(epochs):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = criterion(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
""",
    certain="The `prepare` call in this file, without the scheduler.",
)

EMA_EVERY_MICROBATCH = Rule(
    code="MB303",
    name="ema-every-microbatch",
    severity="warning",
    summary="The moving average of the weights is updated after every microbatch.",
    happens=(
        "The weights change once a window, but the average decays N times in it: a decay of d acts like d to the power "
        "of N. The average follows the weights N times faster and smooths less."
    ),
    how_much=(
        "A decay of 0.9 acts like 0.66 with N = 4. After 60 steps of SGD, the average is behind the weights by "
        "3.3 % of the distance travelled, not 7.1 %. The weights themselves are right."
    ),
    fix="Update the average once a window, after `optimizer.step()`.",
    wrong="""\
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
        if k == N - 1:
            optimizer.step()
            optimizer.zero_grad()
        ema.update_parameters(model)
""",
    right="""\
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
        if k == N - 1:
            optimizer.step()
            optimizer.zero_grad()
            ema.update_parameters(model)
""",
    certain="An update without the step's condition, and a decay that is not the N-th root of another.",
)

COUNTER_UNITS = Rule(
    code="MB304",
    name="counter-units",
    severity="warning",
    summary="A number of optimizer steps is compared with a number of microbatches.",
    happens=(
        "A resumed run that skips as many microbatches as it had made steps repeats most of its data. "
        "A run that ends when its microbatches reach `max_steps` makes 1/N of its steps."
    ),
    how_much=(
        "A run that is resumed after 10 steps trains on 30 of 40 microbatches again, with N = 4. "
        "After 50 more steps, the weights are off by this share of the distance they travelled: SGD 8.3 %; AdamW 16 %."
    ),
    fix="Multiply the number of steps by N where it is compared with microbatches.",
    wrong="""\
def resume(global_step):
    for seen in range(global_step):
        next(batches)
    while global_step < steps:
        for k in range(N):
            x, y = next(batches)
            loss = criterion(model(x), y) / N
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        global_step += 1
""",
    right="""\
def resume(global_step):
    for seen in range(global_step * N):
        next(batches)
    while global_step < steps:
        for k in range(N):
            x, y = next(batches)
            loss = criterion(model(x), y) / N
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        global_step += 1
""",
    certain="Both uses of the number in this file.",
)

OPTIMIZER_RECREATED = Rule(
    code="MB305",
    name="optimizer-recreated",
    severity="error",
    summary="The optimizer is created again in every epoch, so its state is lost.",
    happens=(
        "Momentum and the moments of Adam begin at zero in every epoch. Adam's first steps then all have full length, "
        "because its bias correction starts again too. A scheduler still holds the old optimizer, and does nothing."
    ),
    how_much=(OFF + "SGD with momentum 50 %; AdamW 46 %; SGD without momentum nothing. There are 6 steps in an epoch."),
    fix="Create the optimizer once, before the loop over epochs.",
    wrong="""\
import torch

for epoch in range(epochs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = iter(loader)
    for step in range(len(loader) // N):
        for k in range(N):
            x, y = next(data)
            loss = criterion(model(x), y) / N
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
""",
    right="""\
import torch

optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for epoch in range(epochs):
    data = iter(loader)
    for step in range(len(loader) // N):
        for k in range(N):
            x, y = next(data)
            loss = criterion(model(x), y) / N
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
""",
    certain="The optimizer's creation inside the loop over epochs, for a model that is created outside of it.",
)

SCHEDULE_RULES = (SCHEDULE_UNITS, SCHEDULER_NOT_PREPARED, EMA_EVERY_MICROBATCH, COUNTER_UNITS, OPTIMIZER_RECREATED)
