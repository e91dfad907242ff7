"""An edit mends its fault in the user's own lines, and is offered only if the simulation of the edited file says so."""

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
from tests.linting import rule_loops
from tests.linting.generated_loops import FAULTS, TAIL_FAULTS, Loop, generate, is_right, weights_of
from tests.linting.rule_loops import EPOCHS, apart, full, regression, windows

from microbatch.linting import fixes
from microbatch.linting.doctor import doctor, judge
from microbatch.linting.edits import apply_edits, file_diff, fitting, fragment
from microbatch.linting.finding import Finding
from microbatch.linting.mends import MENDS
from microbatch.linting.rules.table import RULES
from microbatch.linting.sources import Source, read_text


def found_in(text: str, rule: str) -> Finding:
    return next(each for each in judge(Source("train.py", text)) if each.rule == rule)


def edited(text: str, rule: str) -> str:
    """The text with the edits of one fault."""
    finding = found_in(text, rule)
    assert finding.edits, f"{rule} has no edits"
    return apply_edits(text, finding.edits)


def lines(text: str) -> str:
    return dedent(text).lstrip("\n")


# -- the rules' own loops ---------------------------------------------------------------------------------------------

WITH_EDITS = [
    "MB101",
    "MB103",
    "MB104",
    "MB105",
    "MB106",
    "MB107",
    "MB201",
    "MB202",
    "MB203",
    "MB302",
    "MB303",
    "MB502",
    "MB603",
]


@pytest.mark.parametrize("code", WITH_EDITS)
def test_the_edited_loop_is_the_right_one(code: str) -> None:
    text = edited(RULES[code].wrong, code)
    assert code not in {each.rule for each in doctor(text)}
    if code not in {"MB101", "MB303", "MB603"}:  # lines in other places, or an import that nothing needs
        assert "".join(text.split()) == "".join(RULES[code].right.split())


@pytest.mark.parametrize(
    ("code", "loss"),
    [
        ("MB101", None),
        ("MB103", None),
        ("MB104", None),
        ("MB105", None),
        ("MB106", None),
        ("MB107", None),
        ("MB201", 0.05),
        ("MB202", 0.05),
    ],
)
def test_the_edited_loop_takes_the_steps_of_the_full_batch(code: str, loss: float | None) -> None:
    loader = regression(24)
    right = full(windows(loader) * EPOCHS, clip=loss)
    wrong = rule_loops.run(RULES[code].wrong, loader, max_norm=loss)
    mended = rule_loops.run(edited(RULES[code].wrong, code), loader, max_norm=loss)
    assert apart(wrong, right) > 1e-2
    assert apart(mended, right) < 1e-9


# -- the user's own lines ---------------------------------------------------------------------------------------------


def test_comments_tabs_and_quotes_stay() -> None:
    text = lines("""
        for epoch in range( epochs ):
        \tfor i,(x,y) in enumerate(loader):
        \t\tloss = criterion(model(x), y)/N   # größe
        \t\tloss.backward()
        \t\tif i%N==0 and not stop['now']:   # every N
        \t\t\toptimizer.step() ; optimizer.zero_grad()
        """)
    assert edited(text, "MB105") == text.replace("if i%N==0", "if (i + 1) % N==0")


@pytest.mark.parametrize(
    ("test", "new"),
    [
        ("i % N == 0", "(i + 1) % N == 0"),
        ("not i % N", "not (i + 1) % N"),
        ("i > 0 and i % N == 0", "(i + 1) % N == 0"),
        ("i % N == 0 or i == len(loader) - 1", "(i + 1) % N == 0 or i == len(loader) - 1"),
    ],
)
def test_the_condition_counts_from_the_other_end(test: str, new: str) -> None:
    text = RULES["MB112"].wrong.replace("(i + 1) % N == 0 or i + 1 == len(loader)", test)
    assert edited(text, "MB105") == text.replace(test, new)
    started = text.replace("enumerate(loader)", "enumerate(loader, start=1)").replace(test, "(i + 1) % N == 0")
    assert edited(started, "MB105") == started.replace("(i + 1) % N", "i % N")


def test_a_condition_with_a_name() -> None:
    text = lines("""
        for epoch in range(epochs):
            for i, (x, y) in enumerate(loader):
                last = i % N == 0
                loss = criterion(model(x), y) / N
                loss.backward()
                if last:
                    optimizer.step()
                    optimizer.zero_grad()
        """)
    assert edited(text, "MB105") == text.replace("i % N", "(i + 1) % N")


def test_all_conditions_of_one_kind_move_together() -> None:
    text = lines("""
        model = DistributedDataParallel(model)
        for epoch in range(epochs):
            for i, (x, y) in enumerate(loader):
                with model.no_sync() if i % N != 0 else nullcontext():
                    loss = criterion(model(x), y) / N
                    loss.backward()
                if i % N == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        """)
    # The condition of the step alone would leave its last backward under `no_sync`.
    assert edited(text, "MB105") == text.replace("i % N", "(i + 1) % N")


def test_unscale_stands_under_the_condition_of_the_scaler() -> None:
    text = lines("""
        import torch.nn.functional as F

        def train(model, loader, optimizer, scaler, args):
            for i, (x, y) in enumerate(loader):
                loss = F.mse_loss(model(x), y) / args.accumulate
                if args.fp16:
                    scaler.scale(loss).backward()
                else:
                    loss.backward()
                if (i + 1) % args.accumulate == 0:
                    # keep it small
                    clip_grad_norm_(model.parameters(), 1.0)
                    if args.fp16:
                        scaler.step(optimizer)
                        scaler.update()
                    else:
                        optimizer.step()
                    optimizer.zero_grad()
        """)
    comment = "            # keep it small\n"
    new = "            if args.fp16:\n                scaler.unscale_(optimizer)\n"
    assert edited(text, "MB202") == text.replace(comment, new + comment)


def test_clipping_goes_to_the_step_with_its_comment_and_unscale() -> None:
    text = lines("""
        scaler = torch.amp.GradScaler("cuda")
        for epoch in range(epochs):
            for i, (x, y) in enumerate(loader):
                loss = criterion(model(x), y) / N
                scaler.scale(loss).backward()
                # clip it
                clip_grad_norm_(model.parameters(), max_norm=1.0)  # here
                if (i + 1) % N == 0:
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
        """)
    finding = found_in(text, "MB201")
    assert fragment(Source("train.py", text), finding) == [
        "         scaler.scale(loss).backward()",
        "-        # clip it",
        "-        clip_grad_norm_(model.parameters(), max_norm=1.0)  # here",
        "         if (i + 1) % N == 0:",
        "+            scaler.unscale_(optimizer)",
        "+            # clip it",
        "+            clip_grad_norm_(model.parameters(), max_norm=1.0)  # here",
        "             scaler.step(optimizer)",
    ]
    assert {each.rule for each in doctor(apply_edits(text, finding.edits))} <= {"MB110"}


def test_the_scheduler_goes_behind_the_step() -> None:
    text = lines("""
        total = epochs * (len(loader) // N)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=total)
        for epoch in range(epochs):
            for i, (x, y) in enumerate(loader):
                loss = criterion(model(x), y) / N
                loss.backward()
                if (i + 1) % N == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                scheduler.step()
        """)
    step = "            optimizer.step()\n"
    moved = text.replace("        scheduler.step()\n", "").replace(step, f"{step}            scheduler.step()\n")
    assert edited(text, "MB301") == moved
    # Where the file does not show the length of the schedule, it may be meant in microbatches.
    unknown = "\n".join(text.split("\n")[2:])
    assert found_in(unknown, "MB301").confidence == "depends"
    assert found_in(unknown, "MB301").edits == ()


def test_a_scheduler_that_is_made_later_is_prepared_there() -> None:
    made = "scheduler = get_scheduler('linear', optimizer)\n"
    text = RULES["MB302"].wrong.replace("for epoch in range(epochs):\n", f"{made}for epoch in range(epochs):\n", 1)
    assert edited(text, "MB302") == text.replace(made, f"{made}scheduler = accelerator.prepare(scheduler)\n")


@pytest.mark.parametrize(
    ("report", "new"),
    [
        ('writer.add_scalar("loss", loss.item(), step)', 'writer.add_scalar("loss", loss.item() * N, step)'),
        ("wandb.log({'loss': loss.item()})", "wandb.log({'loss': loss.item() * N})"),
    ],
)
def test_the_report_says_the_loss(report: str, new: str) -> None:
    text = lines(f"""
        for step in range(steps):
            for k in range(N):
                x, y = next(batches)
                loss = criterion(model(x), y) / N
                loss.backward()
                {report}
            optimizer.step()
            optimizer.zero_grad()
        """)
    assert edited(text, "MB701") == text.replace(report, new)


def test_lines_of_windows_and_notebooks() -> None:
    source = read_text(RULES["MB105"].wrong.replace("\n", "\r\n"), path="train.py")
    assert isinstance(source, Source)
    edits = next(each for each in judge(source) if each.rule == "MB105").edits
    assert "+        if (i + 1) % N == 0:\r\n" in file_diff(source, edits)
    cells = [{"cell_type": "code", "source": text} for text in ("N = 4", RULES["MB105"].wrong)]
    source = read_text(json.dumps({"cells": cells}), path="train.ipynb")
    assert isinstance(source, Source)
    edits = next(each for each in judge(source) if each.rule == "MB105").edits
    assert "+++ b/train.ipynb:cell 2" in file_diff(source, edits)
    assert "+        if (i + 1) % N == 0:" in file_diff(source, edits)


# -- what is not offered ----------------------------------------------------------------------------------------------


ANOTHER_FUNCTION = """
import torch.nn.functional as F

def add(x, y):
    F.mse_loss(model(x), y).backward()

def train(n_accumulate):
    for step in range(steps):
        for k in range(n_accumulate):
            add(*next(batches))
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        # The loss may be a sum.
        ("MB101", RULES["MB101"].wrong.replace("F.mse_loss", "criterion")),
        # The norm is read outside of the window.
        ("MB201", RULES["MB201"].wrong.replace("        clip_", "        norm = clip_") + "print(norm)\n"),
        # What the `with` line reads is made between the forward pass and it.
        (
            "MB502",
            RULES["MB502"].wrong.replace(
                "        with model.no_sync() if k < N - 1 else nullcontext():",
                "        held = model.no_sync() if k < N - 1 else nullcontext()\n        with held:",
            ),
        ),
        # Two statements on one line.
        ("MB103", RULES["MB103"].wrong.replace("(batches)\n        optimizer", "(batches); optimizer")),
        # The function does not know N.
        ("MB101", ANOTHER_FUNCTION),
    ],
)
def test_where_the_edit_may_be_wrong_there_is_none(rule: str, text: str) -> None:
    assert found_in(text, rule).edits == ()


WRONG = RULES["MB105"].wrong
TEXTS = {
    "the right edit": (WRONG.replace("if i %", "if (i + 1) %"), True),
    "the fault is still there": (WRONG.replace("if i %", "if (i + 2) %"), False),
    "another fault came": (WRONG.replace("if i %", "if (i + 1) %").replace("/ N", "/ N / N"), False),
    "gradients are cleared inside": (
        WRONG.replace("if i %", "if (i + 1) %").replace(
            "        loss =", "        optimizer.zero_grad()\n        loss ="
        ),
        False,
    ),
    "one step an epoch": (WRONG.replace("        if i % N == 0:\n            opt", "    if True:\n        opt"), False),
    "the step is hidden": (WRONG.replace("optimizer.step()", "take(optimizer)"), False),
    "the loop is gone": ("x = 1\n", False),
    "it does not parse": (WRONG + "for\n", False),
    "nothing changed": (WRONG, False),
}


@pytest.mark.parametrize("name", TEXTS)
def test_each_edit_is_tried_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, is_offered = TEXTS[name]

    def mend(*_: Any) -> Iterator[str]:
        yield text

    monkeypatch.setattr(fixes, "MENDS", {"MB105": mend})
    edits = found_in(WRONG, "MB105").edits
    assert bool(edits) is is_offered
    if edits:
        assert apply_edits(WRONG, edits) == text


def test_edits_that_are_wrong_together_are_not_offered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    text = RULES["MB101"].wrong.replace(
        "        loss.backward()\n", "        loss.backward()\n        torch.cuda.empty_cache()\n"
    )
    assert {each.rule for each in judge(Source("a.py", text)) if each.edits} == {"MB101", "MB603"}

    def divide_again(*_: Any) -> Iterator[str]:
        yield text.replace("        torch.cuda.empty_cache()\n", "").replace("y)\n", "y) / N\n")

    # Alone, the second edit mends two faults; together with the first one, the loss is divided twice.
    monkeypatch.setattr(fixes, "MENDS", {**MENDS, "MB603": divide_again})
    assert {each.rule for each in judge(Source("a.py", text)) if each.edits} == {"MB101"}


def test_a_fault_in_an_imported_file_has_no_edits(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def train():\n" + indent(RULES["MB105"].wrong, "    "))
    (tmp_path / "main.py").write_text("from helper import train\n\ntrain()  # backward\n")
    found = doctor(tmp_path / "main.py", folder=tmp_path)
    assert all(each.edits == () for each in found if each.path.endswith("helper.py"))
    assert [each.rule for each in doctor(tmp_path / "helper.py") if each.edits] == ["MB105"]


# -- random loops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(0, 150, 3))
def test_of_random_loops_each_edit_is_right(seed: int) -> None:
    loop = generate(seed)
    found = judge(Source("loop.py", loop.source))
    if loop.fault == "" or loop.fault in TAIL_FAULTS:
        assert not any(each.edits for each in found)
        return
    for each in found:
        text = apply_edits(loop.source, each.edits)
        if each.edits and each.rule == FAULTS[loop.fault]:
            for size in (2, 3):
                assert is_right(*weights_of(Loop(text, ""), size, 2 * size), size, 2 * size), text


def test_edits_that_fit_are_right_together() -> None:
    text = RULES["MB105"].wrong.replace("criterion(model(x), y) / N", "torch.nn.functional.mse_loss(model(x), y)")
    found = judge(Source("a.py", f"import torch\n\n{text}"))
    chosen = fitting(found)
    assert {each.rule for each in chosen} == {"MB101", "MB105"}
    mended = apply_edits(f"import torch\n\n{text}", [edit for each in chosen for edit in each.edits])
    loader = regression(24)
    done = rule_loops.run(mended, loader)
    assert apart(done, full(windows(loader) * EPOCHS)) < 1e-9


CLIPPED = """
for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / N
        loss.backward()
        if max_norm > 0:
            clip_grad_norm_(model.parameters(), max_norm)
        if (i + 1) % N == 0:
            optimizer.step()
            optimizer.zero_grad()
"""


def test_a_line_moves_with_the_condition_that_it_has_alone() -> None:
    text = edited(CLIPPED, "MB201")
    assert "            if max_norm > 0:\n                clip_grad_norm_(model.parameters(), max_norm)\n" in text
    assert text.count("clip_grad_norm_") == 1


def test_a_line_of_one_branch_stays_in_it() -> None:
    text = CLIPPED.replace("        if max_norm > 0:\n", "        if mixed:\n            other()\n        else:\n")
    assert found_in(text, "MB201").edits == ()


def test_a_file_that_unscales_on_some_path_gets_no_second_call() -> None:
    text = RULES["MB202"].right.replace("    scaler.unscale_", "    if careful:\n        scaler.unscale_")
    assert found_in(text, "MB202").edits == ()


def test_gradients_that_nothing_else_clears_stay_cleared() -> None:
    text = RULES["MB103"].wrong
    assert "optimizer.zero_grad()" in edited(text, "MB103")
    branch = text.replace(
        "        optimizer.zero_grad()",
        "        if fresh:\n            pass\n        else:\n            optimizer.zero_grad()",
    )
    assert all(not each.edits for each in judge(Source("a.py", branch)) if each.rule == "MB103")
