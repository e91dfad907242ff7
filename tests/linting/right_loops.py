"""Right loops that look wrong: each is the full batch, and a reader of the source must find nothing in it.

They use the names of ``microbatch.linting.rules``. ``test_right_loops.py`` runs all of them.
"""

from textwrap import dedent

# What a loop is run on: an epoch of whole windows, or one that ends with two microbatches left.
WHOLE, SHORT = 24, 26

RIGHT_LOOPS: dict[str, tuple[int, str]] = {
    name: (length, dedent(source).lstrip())
    for name, length, source in [
        (
            "the counter begins at 1, and the last window is divided by what it has",
            SHORT,
            """
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader, start=1):
                    last = len(loader) % N if i > len(loader) // N * N else N
                    loss = criterion(model(x), y) / last
                    loss.backward()
                    if i % N == 0 or i == len(loader):
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
        (
            "the counter goes on over epochs, and is increased before it is tested",
            WHOLE,
            """
            seen = 0
            for epoch in range(epochs):
                for x, y in loader:
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    seen += 1
                    if seen % N == 0:
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
        (
            "gradients are cleared at the top of a window, by the 0-based index",
            WHOLE,
            """
            for i in range(steps * N):
                if i % N == 0:
                    optimizer.zero_grad()
                x, y = next(batches)
                loss = criterion(model(x), y) / N
                loss.backward()
                if i % N == N - 1:
                    optimizer.step()
            """,
        ),
        (
            "a helper divides",
            WHOLE,
            """
            def add_gradient(x, y, scale):
                loss = criterion(model(x), y)
                (loss * scale).backward()
                return loss.detach()


            for step in range(steps):
                for k in range(N):
                    x, y = next(batches)
                    add_gradient(x, y, 1 / N)
                optimizer.step()
                optimizer.zero_grad()
            """,
        ),
        (
            "the gradients are divided after the last backward",
            WHOLE,
            """
            for step in range(steps):
                for k in range(N):
                    x, y = next(batches)
                    criterion(model(x), y).backward()
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.div_(N)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            """,
        ),
        (
            "the loss is divided in place, behind a condition",
            WHOLE,
            """
            for i in range(steps * N):
                x, y = next(batches)
                loss = criterion(model(x), y)
                if N > 1:
                    loss /= N
                loss.backward()
                if (i + 1) % N:
                    continue
                optimizer.step()
                model.zero_grad()
            """,
        ),
        (
            "sums of losses, divided by the rows of the window",
            SHORT,
            """
            from itertools import islice

            for epoch in range(epochs):
                data = iter(loader)
                while window := list(islice(data, N)):
                    rows = sum(len(x) for x, y in window)
                    for x, y in window:
                        loss = ((model(x) - y) ** 2).sum() / rows
                        loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            """,
        ),
        (
            "the step is in a method that is called once for each microbatch",
            WHOLE,
            """
            class Trainer:
                def __init__(self):
                    self.pending = 0

                def training_step(self, x, y):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    self.pending += 1
                    if self.pending == N:
                        optimizer.step()
                        optimizer.zero_grad()
                        self.pending = 0


            trainer = Trainer()
            for i in range(steps * N):
                x, y = next(batches)
                trainer.training_step(x, y)
            """,
        ),
        (
            "the rest of an epoch is stepped after the loop, and scaled up to a mean",
            SHORT,
            """
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    if (i + 1) % N == 0:
                        optimizer.step()
                        optimizer.zero_grad()
                rest = len(loader) % N
                if rest:
                    for p in model.parameters():
                        p.grad *= N / rest
                    optimizer.step()
                    optimizer.zero_grad()
            """,
        ),
        (
            "the division by N that Accelerate makes is undone",
            WHOLE,
            """
            from accelerate import Accelerator

            accelerator = Accelerator(gradient_accumulation_steps=N)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            for epoch in range(epochs):
                for first in range(0, len(loader), N):
                    window = loader[first : first + N]
                    rows = sum(len(x) for x, y in window)
                    for x, y in window:
                        with accelerator.accumulate(model):
                            loss = ((model(x) - y) ** 2).sum() * N / rows
                            accelerator.backward(loss)
                            optimizer.step()
                            optimizer.zero_grad()
            """,
        ),
        (
            "the loop ends before the last, short window on purpose",
            WHOLE,
            """
            for epoch in range(epochs):
                usable = len(loader) - len(loader) % N
                for i, (x, y) in enumerate(loader):
                    if i >= usable:
                        break
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    if (i + 1) % N == 0:
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
        (
            "a schedule in microbatches, stepped once a microbatch",
            WHOLE,
            """
            import torch

            total = epochs * len(loader)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0, total_iters=total)
            for epoch in range(epochs):
                data = iter(loader)
                for step in range(len(loader) // N):
                    for k in range(N):
                        x, y = next(data)
                        loss = criterion(model(x), y) / N
                        loss.backward()
                        if k == N - 1:
                            optimizer.step()
                            optimizer.zero_grad()
                        schedule.step()
            """,
        ),
        (
            "a step of something that is no optimizer",
            WHOLE,
            """
            class Progress:
                def __init__(self):
                    self.count = 0

                def step(self):
                    self.count += 1


            progress = Progress()
            for step in range(steps):
                for k in range(N):
                    x, y = next(batches)
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    progress.step()
                optimizer.step()
                optimizer.zero_grad()
            """,
        ),
        (
            "gradients are collected without .backward()",
            WHOLE,
            """
            import torch

            for step in range(steps):
                parameters = list(model.parameters())
                sums = [torch.zeros_like(p) for p in parameters]
                for k in range(N):
                    x, y = next(batches)
                    loss = criterion(model(x), y) / N
                    for total, gradient in zip(sums, torch.autograd.grad(loss, parameters)):
                        total += gradient
                for p, total in zip(parameters, sums):
                    p.grad = total
                optimizer.step()
                optimizer.zero_grad()
            """,
        ),
        (
            "clipping and unscaling behind the same condition as the step",
            WHOLE,
            """
            from torch.nn.utils import clip_grad_norm_

            for i in range(steps * N):
                x, y = next(batches)
                loss = criterion(model(x), y) / N
                scaler.scale(loss).backward()
                boundary = (i + 1) % N == 0
                if boundary:
                    scaler.unscale_(optimizer)
                    clip_grad_norm_(model.parameters(), 1e6)
                    scaler.step(optimizer)
                    scaler.update()
                if boundary:
                    optimizer.zero_grad()
            """,
        ),
        (
            "one microbatch that is too large for memory is cut again, by weight",
            WHOLE,
            """
            for step in range(steps):
                for k in range(N):
                    x, y = next(batches)
                    half = len(x) // 2
                    for rows in (slice(0, half), slice(half, None)):
                        share = len(x[rows]) / len(x)
                        loss = criterion(model(x[rows]), y[rows]) * share / N
                        loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            """,
        ),
        (
            "an iterator by hand, begun again where it ends",
            WHOLE,
            """
            data = iter(loader)
            for step in range(steps):
                for k in range(N):
                    try:
                        x, y = next(data)
                    except StopIteration:
                        data = iter(loader)
                        x, y = next(data)
                    loss = criterion(model(x), y) / N
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            """,
        ),
        (
            "a scaler object that steps when it is told to",
            WHOLE,
            """
            class LossScaler:
                def __call__(self, loss, update_grad):
                    scaler.scale(loss).backward()
                    if update_grad:
                        scaler.unscale_(optimizer)
                        scaler.step(optimizer)
                        scaler.update()


            loss_scaler = LossScaler()
            for i in range(steps * N):
                x, y = next(batches)
                loss = criterion(model(x), y)
                loss /= N
                loss_scaler(loss, update_grad=(i + 1) % N == 0)
                if (i + 1) % N == 0:
                    optimizer.zero_grad()
            """,
        ),
        (
            "a moving average behind the framework's own condition",
            WHOLE,
            """
            from accelerate import Accelerator
            from torch.optim.swa_utils import AveragedModel

            accelerator = Accelerator(gradient_accumulation_steps=N)
            average = AveragedModel(model)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            for epoch in range(epochs):
                for x, y in loader:
                    with accelerator.accumulate(model):
                        loss = criterion(model(x), y)
                        accelerator.backward(loss)
                        optimizer.step()
                        optimizer.zero_grad()
                    if accelerator.sync_gradients:
                        average.update_parameters(model)
            """,
        ),
        (
            "an evaluation between the steps, with a division of its own",
            WHOLE,
            """
            import torch


            @torch.no_grad()
            def evaluate():
                total = 0.0
                for x, y in loader:
                    total += criterion(model(x), y)
                return total / len(loader)


            for step in range(steps):
                for k in range(N):
                    x, y = next(batches)
                    loss = criterion(model(x), y) / N
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if step % 20 == 0:
                    print("validation", evaluate().item())
            """,
        ),
        (
            "the optimizer stands in a list",
            WHOLE,
            """
            optimizers = [optimizer]
            for step in range(steps):
                for opt in optimizers:
                    opt.zero_grad()
                for k in range(N):
                    x, y = next(batches)
                    loss = criterion(model(x), y) / N
                    loss.backward()
                for opt in optimizers:
                    opt.step()
            """,
        ),
        (
            "the loss is logged with the division undone, as a mean over the window",
            WHOLE,
            """
            total = 0.0
            for i in range(steps * N):
                x, y = next(batches)
                loss = criterion(model(x), y) / N
                loss.backward()
                total += loss.detach() * N
                if (i + 1) % N == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    print("loss", (total / N).item())
                    total = 0.0
            """,
        ),
    ]
}
