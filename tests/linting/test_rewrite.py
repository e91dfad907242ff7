"""A loop that was turned into one with `mb.Accumulator` runs, and takes the full batch's steps."""

import re
from textwrap import dedent
from typing import Any

import pytest
import torch
from tests.linting import rule_loops
from tests.linting.generated_loops import Loop, generate, is_right, weights_of
from tests.linting.rule_loops import EPOCHS, full, regression, windows

from microbatch.linting.render import Renderer
from microbatch.linting.rewrite import rewrite, sketch
from microbatch.linting.rules.table import RULES
from microbatch.linting.sources import Source


def turned(source: str) -> str:
    """The text that the diff of a sketch makes of a source."""
    old, found = source.split("\n"), list[str]()
    diff = rewrite(Source("train.py", source))
    assert diff, sketch(Source("train.py", source)).reasons
    at = 0
    for line in diff.splitlines()[2:]:
        if match := re.match(r"@@ -(\d+)", line):
            found += old[at : max(int(match[1]) - 1, 0)]
            at = max(int(match[1]) - 1, 0)
        elif line.startswith("+"):
            found.append(line[1:])
        elif not line.startswith("\\"):
            at += 1
            found += [line[1:]] if line.startswith(" ") else []
    return "\n".join(found + old[at:])


GUARD = """
for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / N
        loss.backward()
        if (i + 1) % N == 0:
            optimizer.step()
            optimizer.zero_grad()
"""
LOOPS = {
    "the condition counts from 0": GUARD.replace("(i + 1) % N", "i % N"),
    "the condition counts from 1": GUARD,
    "the loss is not divided": GUARD.replace(" / N", ""),
    "the last window has a place of its own": GUARD
    + """
    if (i + 1) % N != 0:
        optimizer.step()
        optimizer.zero_grad()
""",
    "or last": GUARD.replace("== 0:", "== 0 or i + 1 == len(loader):"),
    "a counter": """
        count = 0
        for epoch in range(epochs):
            for x, y in loader:
                loss = criterion(model(x), y)
                loss = loss / N
                loss.backward()
                count += 1
                if count == N:
                    optimizer.step()
                    optimizer.zero_grad()
                    count = 0
        """,
    "a condition with a name": """
        optimizer.zero_grad()
        for epoch in range(epochs):
            for i, (x, y) in enumerate(loader, start=1):
                is_last = i % N == 0 or i == len(loader)
                (criterion(model(x), y) / N).backward()
                if is_last:
                    optimizer.step()
                    optimizer.zero_grad()
        """,
    "continue before the step": """
        for epoch in range(epochs):
            for i, (x, y) in enumerate(loader):
                loss = criterion(model(x), y)
                loss /= N
                loss.backward()
                if (i + 1) % N != 0:
                    continue
                optimizer.step()
                optimizer.zero_grad()
        """,
    "a function": """
        def train(model, loader, optimizer, accumulate):
            model.train()
            optimizer.zero_grad()
            for i, batch in enumerate(loader):
                x, y = batch
                # the forward pass
                loss = criterion(model(x), y)
                if accumulate > 1:
                    loss = loss / accumulate
                loss.backward()
                # the step
                if (i + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()


        for epoch in range(epochs):
            train(model, loader, optimizer, N)
        """,
    "a function takes the step": """
        def take_step():
            optimizer.step()
            optimizer.zero_grad()


        for epoch in range(epochs):
            for i, (x, y) in enumerate(loader):
                loss = criterion(model(x), y) / N
                loss.backward()
                if (i + 1) % N == 0:
                    take_step()
        """,
    "each gradient is divided": """
        for epoch in range(epochs):
            for i, (x, y) in enumerate(loader):
                criterion(model(x), y).backward()
                if (i + 1) % N == 0:
                    for p in model.parameters():
                        if p.grad is not None:
                            p.grad /= N
                    optimizer.step()
                    optimizer.zero_grad()
        """,
}
INNER = """
for step in range(steps):
    optimizer.zero_grad()
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
    optimizer.step()
"""


def assert_right(text: str, length: int, **names: Any) -> rule_loops.Run:
    """Run a text and compare its steps with those of the full batches."""
    loader = regression(length)
    done = rule_loops.run(text, loader, **names)
    steps = windows(loader) * EPOCHS
    right = full(steps)
    assert len(done.gradients) == len(right.gradients)
    assert torch.allclose(done.weights[-1], right.weights[-1], rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(done.gradients, right.gradients, strict=True))
    return done


@pytest.mark.parametrize("length", [24, 26])
@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_takes_the_steps_of_the_full_batch(name: str, length: int) -> None:
    text = turned(dedent(LOOPS[name]).lstrip())
    assert_right(text, length)
    for word in (".step()", "zero_grad", "% N", "/ N", "enumerate", "optimizer.step"):
        body = text.split("mb.Accumulator", 1)[1]
        assert word not in body, text


def test_an_inner_loop() -> None:
    text = turned(INNER.lstrip())
    assert "with accumulator.window() as window:\n        for k in range(N):" in text
    assert_right(text, 24)


def test_the_wrong_loop_is_wrong() -> None:
    with pytest.raises(AssertionError):
        assert_right(LOOPS["the condition counts from 0"], 24)
    with pytest.raises(AssertionError):
        assert_right(GUARD, 26)


SCALED = """
from torch.nn.utils import clip_grad_norm_

for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / N
        scaler.scale(loss).backward()
        if (i + 1) % N == 0:
            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(model.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
            print("norm", norm)
"""


@pytest.mark.parametrize("length", [24, 26])
def test_scaler_clipping_and_scheduler(length: int) -> None:
    text = turned(SCALED.lstrip())
    assert "mb.Accumulator(model, optimizer, max_grad_norm=max_norm, grad_scaler=scaler)" in text
    loader = regression(length)
    scheduler = lambda made: torch.optim.lr_scheduler.ExponentialLR(made, 0.9)  # noqa: E731
    done = rule_loops.run(text, loader, max_norm=0.1, scheduler=scheduler)

    def after(_: Any, made: torch.optim.Optimizer) -> None:
        made.param_groups[0]["lr"] *= 0.9

    steps = windows(loader) * EPOCHS
    right = full(steps, clip=0.1)
    assert done.printed[0] == pytest.approx(norm_of(loader), rel=1e-9)
    assert not torch.allclose(done.weights[-1], right.weights[-1])  # without the schedule
    right = full(steps, clip=0.1, after=after)
    assert torch.allclose(done.weights[-1], right.weights[-1], rtol=0, atol=1e-9)


def norm_of(loader: rule_loops.Data) -> float:
    first = full(windows(loader)[:1])
    return first.gradients[0].norm().item()


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("total += loss.item()", "total += loss.item() / N"),
        ("total += loss.item() * N", "total += loss.item()"),
        ("total += N * loss.detach()", "total += loss.detach()"),
    ],
)
def test_what_is_reported_stays(report: str, expected: str) -> None:
    source = INNER.lstrip().replace("loss.backward()\n", f"loss.backward()\n        {report}\n")
    source = source.replace("    optimizer.zero_grad()\n", "    optimizer.zero_grad()\n    total = 0.0\n")
    source += '    print("loss", total)\n'
    text = turned(source)
    assert f"        {expected}\n" in text
    loader = regression(24)
    assert rule_loops.run(text, loader).printed == pytest.approx(rule_loops.run(source, loader).printed)


def test_what_the_new_lines_read_stays() -> None:
    source = f"accumulate = 4\n{GUARD.replace('N', 'accumulate')}"
    text = turned(source)
    assert "accumulate = 4\n" in text
    assert_right(text, 26)


def test_only_what_was_divided_is_divided_where_it_is_reported() -> None:
    divided = """
        loss = criterion(model(x), y)
        print(loss.item())
        loss /= N
        total += loss.item()
"""
    source = INNER.lstrip().replace("\n        loss = criterion(model(x), y) / N\n", divided)
    source = source.replace("    optimizer.zero_grad()\n", "    optimizer.zero_grad()\n    total = 0.0\n")
    source = f"def other(loss):\n    return loss.item()\n\n\n{source}    print(total)\n"
    text = turned(source)
    assert (text.count("loss.item()"), text.count("loss.item() / N")) == (3, 1)
    loader = regression(24)
    assert rule_loops.run(text, loader).printed == pytest.approx(rule_loops.run(source, loader).printed)


def test_a_learning_rate_that_is_set_right_before_the_step() -> None:
    between = """
    # the learning rate
    for group in optimizer.param_groups:
        group["lr"] = 0.1 / (1 + step)

    norm = clip_grad_norm_(model.parameters(), 0.1)
    print(norm)
    optimizer.step()
"""
    source = "from torch.nn.utils import clip_grad_norm_\n\n" + INNER.lstrip().replace(
        "\n    optimizer.step()\n", between
    )
    text = turned(source)
    loader = regression(24)
    done, old = rule_loops.run(text, loader), rule_loops.run(source, loader)
    assert torch.allclose(done.weights[-1], old.weights[-1], rtol=0, atol=1e-12)
    assert done.printed == pytest.approx(old.printed)
    # Under a condition inside of the loop, it comes too late, and the sketch says so.
    step = "            optimizer.step()\n"
    source = GUARD.replace(step, f"            optimizer.param_groups[0]['lr'] = 0.1 / (1 + i)\n{step}")
    assert "# The step is taken already" in turned(source)
    assert "# The step is taken already" not in turned(GUARD.replace(step, f"{step}            print(i)\n"))


def test_other_lines_stay_as_they_are() -> None:
    source = dedent('''
        """What it is."""
        import torch  # the import

        def train(model, optimizer, loader, log):
            for i, (x, y) in enumerate(loader):  # microbatches
                # a comment of the forward pass
                loss = criterion( model(x),y ) / 8
                loss.backward()
                if i % 100 == 0:
                    log("""
          a long
        text""", i)
                if (i + 1) % 8 == 0:
                    # a comment of the step
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

                    log('stepped')  # said
                    if stop():
                        break
            return  model
    ''')
    assert turned(source) == dedent('''
        """What it is."""
        import torch  # the import
        import microbatch as mb

        def train(model, optimizer, loader, log):
            # Better once for the whole run, where the optimizer is made; then pass it to this function.
            accumulator = mb.Accumulator(model, optimizer)
            for window in accumulator.windows(enumerate(loader), microbatches=8):  # microbatches
                for i, (x, y) in window:
                    # a comment of the forward pass
                    loss = criterion( model(x),y )
                    window.backward(loss)
                    if i % 100 == 0:
                        log("""
          a long
        text""", i)
                log('stepped')  # said
                if stop():
                    break
            return  model
    ''')


@pytest.mark.parametrize("seed", range(0, 120, 6))
def test_of_random_loops_each_that_is_turned_is_right(seed: int) -> None:
    loop = generate(seed)
    found = sketch(Source("loop.py", loop.source))
    assert bool(found.diff) is not bool(found.reasons)
    if found.diff:
        for length in (6, 8):
            assert is_right(*weights_of(Loop(turned(loop.source), ""), 3, length), 3, length)


TRAINING_STEP = """
def training_step(self, batch, batch_idx):
    loss = self.model(batch) / N
    loss.backward()
    if (batch_idx + 1) % N == 0:
        self.optimizer.step()
        self.optimizer.zero_grad()
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (RULES["MB302"].wrong, "line 9: Accelerate's `accumulate()` owns its windows"),
        (RULES["MB106"].wrong, "backward and step are under one condition"),
        (GUARD.replace("optimizer.step()", "optimizer.step()\n            other_optimizer.step()"), "2 optimizers"),
        (
            GUARD.replace("loss.backward()", "loss.backward()\n        if x.isnan().any():\n            break"),
            "`break`",
        ),
        (GUARD.replace("loss.backward()", "loss.backward(retain_graph=True)"), "arguments of its own"),
        (INNER.replace("for k in range(N)", "k = 0\n    while k < N"), "no plain `for` loop"),
        (GUARD.replace("        loss.b", "        N = 4 if i < 9 else 8\n        loss.b"), "changes inside"),
        (
            GUARD.replace(
                "        if (",
                "        norm = clip_grad_norm_(model.parameters(), 1)\n        print(norm)\n        if (",
            ),
            "norm of its gradients",
        ),
        (TRAINING_STEP, "called once for each microbatch"),
        (
            GUARD.replace(
                "            optimizer.step()",
                "            clip_grad_value_(model.parameters(), 1)\n            optimizer.step()",
            ),
            "clips by value",
        ),
    ],
)
def test_what_cannot_be_turned_says_why(source: str, reason: str) -> None:
    found = sketch(Source("train.py", source.lstrip()))
    assert found.diff == ""
    assert any(reason in each for each in found.reasons), found.reasons


def test_a_file_without_a_loop_has_no_sketch() -> None:
    assert sketch(Source("a.py", "x = 1\n")).diff == ""
    assert sketch(Source("a.py", "def f(:\n")).diff == ""


def test_all_rules_have_a_sketch_or_a_reason() -> None:
    for rule in RULES.values():
        for text in (rule.wrong, rule.right):
            found = sketch(Source("a.py", text))
            if found.diff:
                compile(turned(text), "a.py", "exec")


def test_a_renderer_without_changes_gives_the_file_back() -> None:
    for text in [*LOOPS.values(), *(rule.right for rule in RULES.values())]:
        source = Source("a.py", dedent(text))
        renderer = Renderer(source)
        assert renderer.file(source.tree) == source.text  # type: ignore[arg-type]
