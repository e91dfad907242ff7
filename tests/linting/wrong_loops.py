"""Wrong loops in forms that a search for a pattern does not find, and the rules that name what is wrong.

They use the names of ``microbatch.linting.rules``. ``test_wrong_loops.py`` runs all of them.
"""

from textwrap import dedent

# The number of microbatches in an epoch of which the loop is wrong; 26 leaves two of them after six windows of four.
WHOLE, SHORT = 24, 26

WRONG_LOOPS: dict[str, tuple[set[str], int, str]] = {
    name: (codes, length, dedent(source).lstrip())
    for name, codes, length, source in [
        (
            "no step at 0, so the first window has one microbatch more",
            {"MB105", "MB110"},
            WHOLE,
            """
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    if i > 0 and i % N == 0:
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
        (
            "the forced step at the end of an epoch leaves the counter as it is",
            {"MB105", "MB112"},
            SHORT,
            """
            count = 0
            for epoch in range(epochs):
                for i, (x, y) in enumerate(loader):
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    count += 1
                    if count % N == 0 or i == len(loader) - 1:
                        optimizer.step()
                        optimizer.zero_grad()
            """,
        ),
        (
            "the counter is reset to 1",
            {"MB105"},
            WHOLE,
            """
            count = 0
            for i in range(steps * N):
                x, y = next(batches)
                loss = criterion(model(x), y) / N
                loss.backward()
                count += 1
                if count == N:
                    optimizer.step()
                    optimizer.zero_grad()
                    count = 1
            """,
        ),
        (
            "one branch divides, the other one does not",
            {"MB101"},
            WHOLE,
            """
            import torch.nn.functional as F

            mixed = scaler.is_enabled()
            for step in range(steps):
                for k in range(N):
                    x, y = next(batches)
                    loss = F.mse_loss(model(x), y)
                    if mixed:
                        scaler.scale(loss).backward()
                    else:
                        (loss / N).backward()
                if mixed:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                optimizer.zero_grad()
            """,
        ),
        (
            "a helper clears the gradients",
            {"MB103"},
            WHOLE,
            """
            def add_gradient(x, y):
                optimizer.zero_grad()
                loss = criterion(model(x), y) / N
                loss.backward()


            for step in range(steps):
                for k in range(N):
                    x, y = next(batches)
                    add_gradient(x, y)
                optimizer.step()
            """,
        ),
        (
            "the loss and the gradients are divided",
            {"MB102"},
            WHOLE,
            """
            for step in range(steps):
                for k in range(N):
                    x, y = next(batches)
                    loss = criterion(model(x), y) / N
                    loss.backward()
                for p in model.parameters():
                    p.grad /= N
                optimizer.step()
                optimizer.zero_grad()
            """,
        ),
        (
            "a window counted in rows, whose last one is dropped",
            {"MB111"},
            SHORT,
            """
            for epoch in range(epochs):
                model.zero_grad()
                pending = 0
                for x, y in loader:
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    pending += 1
                    if pending < N:
                        continue
                    optimizer.step()
                    optimizer.zero_grad()
                    pending = 0
            """,
        ),
        (
            "the rest is stepped after the loop, each microbatch by the weight of a whole window",
            {"MB112"},
            SHORT,
            """
            for epoch in range(epochs):
                pending = 0
                for x, y in loader:
                    loss = criterion(model(x), y) / N
                    loss.backward()
                    pending += 1
                    if pending == N:
                        optimizer.step()
                        optimizer.zero_grad()
                        pending = 0
                if pending > 0:
                    optimizer.step()
                    optimizer.zero_grad()
            """,
        ),
        (
            "a microbatch whose memory ended is left out",
            {"MB114"},
            WHOLE,
            """
            def forward_backward(x, y):
                if len(x) and float(x[0, 0]) > 1.0:
                    raise MemoryError
                loss = criterion(model(x), y) / N
                loss.backward()


            for step in range(steps):
                for k in range(N):
                    x, y = next(batches)
                    try:
                        forward_backward(x, y)
                    except MemoryError:
                        continue
                optimizer.step()
                optimizer.zero_grad()
            """,
        ),
        (
            "clipping by a method, outside the condition of the step",
            {"MB201"},
            WHOLE,
            """
            from torch.nn.utils import clip_grad_norm_


            class Trainer:
                def clip(self):
                    clip_grad_norm_(model.parameters(), 0.5)

                def train(self):
                    for i in range(steps * N):
                        x, y = next(batches)
                        loss = criterion(model(x), y) / N
                        loss.backward()
                        self.clip()
                        if (i + 1) % N == 0:
                            optimizer.step()
                            optimizer.zero_grad()


            Trainer().train()
            """,
        ),
    ]
}
