"""Loops with constructs that few loops have: right ones that look wrong, and wrong ones that look like no other.

They use the names of ``microbatch.linting.rules``. ``test_unusual_loops.py`` runs all of them.
"""

from textwrap import dedent

WHOLE = 24  # an epoch of whole windows

UNUSUAL_RIGHT: dict[str, str] = {
    name: dedent(source).lstrip()
    for name, source in [
        (
            "flags that are zipped with the batches decide about the step",
            """
            import itertools
            for epoch in range(epochs):
                flags = itertools.cycle([False] * (N - 1) + [True])
                for (x, y), is_last in zip(loader, flags):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    if is_last:
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
        (
            "the batch is counted by a range beside it",
            """
            import itertools
            for epoch in range(epochs):
                for (x, y), i in zip(loader, itertools.count(1)):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    if i % N == 0:
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
        (
            "a match decides about the step",
            """
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader, start=1):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    match i % N:
                        case 0:
                            optimizer.step()
                            optimizer.zero_grad()
                        case _:
                            pass
            """,
        ),
        (
            "a set of places decides about the step",
            """
            ends = set(range(N - 1, len(loader), N)) | {len(loader) - 1}
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    if i in ends:
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
        (
            "a function counts in a list around it",
            """
            def made(n):
                calls = [0]
                def train(x, y):
                    loss = criterion(model(x), y) / n
                    loss.backward()
                    calls[0] += 1
                    if calls[0] % n == 0:
                        optimizer.step()
                        optimizer.zero_grad()
                return train
            train = made(N)
            for epoch in range(epochs):
                for x, y in loader:
                    train(x, y)
            """,
        ),
        (
            "a hook clears the gradients after the step",
            """
            optimizer.register_step_post_hook(lambda optimizer, args, kwargs: optimizer.zero_grad())
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader, start=1):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    if i % N == 0:
                        optimizer.step()
            """,
        ),
        (
            "a hook divides each gradient",
            """
            for p in model.parameters():
                p.register_hook(lambda gradient: gradient / N)
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader, start=1):
                    loss = criterion(model(x), y)
                    loss.backward()
                    if i % N == 0:
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
        (
            "gradients are added up in buffers of the script",
            """
            import torch
            sums = [torch.zeros_like(p) for p in model.parameters()]
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader, start=1):
                    model.zero_grad()
                    loss = criterion(model(x), y)
                    loss.backward()
                    for s, p in zip(sums, model.parameters()):
                        s += p.grad / N
                    if i % N == 0:
                        for s, p in zip(sums, model.parameters()):
                            p.grad = s.clone()
                            s.zero_()
                        optimizer.step()
            """,
        ),
        (
            "each microbatch has its share of the rows as its weight",
            """
            for epoch in range(epochs):
                for start in range(0, len(loader), N):
                    window = loader[start : start + N]
                    total = sum(len(y) for _, y in window)
                    for x, y in window:
                        loss = criterion(model(x), y)
                        loss = loss * (len(y) / total)
                        loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            """,
        ),
        (
            "N is a number in one place and an argument in another",
            """
            class Every:
                def __init__(self, optimizer, size):
                    self.optimizer, self.size, self.seen = optimizer, size, 0
                def step(self):
                    self.seen += 1
                    if self.seen % self.size == 0:
                        self.optimizer.step()
                        self.optimizer.zero_grad()
            every = Every(optimizer, 4)
            for epoch in range(epochs):
                for x, y in loader:
                    loss = criterion(model(x), y) / 4
                    loss.backward()
                    every.step()
            """,
        ),
        (
            "a scale with N in it multiplies the loss by a function of torch",
            """
            import torch
            scale = 1.0 / float(N)
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader, start=1):
                    loss = criterion(model(x), y)
                    torch.mul(loss, scale).backward()
                    if i % N == 0:
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
    ]
}

UNUSUAL_WRONG: dict[str, tuple[str, str]] = {
    name: (code, dedent(source).lstrip())
    for name, code, source in [
        (
            "the batch is counted by a range beside it, from 0",
            "MB105",
            """
            import itertools
            for epoch in range(epochs):
                for (x, y), i in zip(loader, itertools.count()):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    if i % N == 0:
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
        (
            "a match steps at the first of a window",
            "MB105",
            """
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    match i % N:
                        case 0:
                            optimizer.step()
                            optimizer.zero_grad()
                        case _:
                            pass
            """,
        ),
        (
            "a set of places begins at 0",
            "MB105",
            """
            ends = set(range(0, len(loader), N))
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    if i in ends:
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
        (
            "the count has to be more than N",
            "MB105",
            """
            count = 0
            for epoch in range(epochs):
                for x, y in loader:
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    count += 1
                    if count > N:
                        optimizer.step()
                        optimizer.zero_grad()
                        count = 0
            """,
        ),
        (
            "every microbatch takes the gradients away by hand",
            "MB103",
            """
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader, start=1):
                    for p in model.parameters():
                        p.grad = None
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    if i % N == 0:
                        optimizer.step()
            """,
        ),
        (
            "Accelerate clears at the top of its context",
            "MB103",
            """
            from accelerate import Accelerator
            accelerator = Accelerator(gradient_accumulation_steps=N)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            for epoch in range(epochs):
                for x, y in loader:
                    with accelerator.accumulate(model):
                        optimizer.zero_grad()
                        loss = criterion(model(x), y)
                        accelerator.backward(loss)
                        optimizer.step()
            """,
        ),
        (
            "a batch is cut by its rows, and its pieces are added",
            "MB101",
            """
            import torch
            for epoch in range(epochs):
                for start in range(0, len(loader), N):
                    x, y = (torch.cat(each) for each in zip(*loader[start : start + N]))
                    for first in range(0, x.size(0), 4):
                        loss = torch.nn.functional.mse_loss(model(x[first : first + 4]), y[first : first + 4])
                        loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            """,
        ),
    ]
}
