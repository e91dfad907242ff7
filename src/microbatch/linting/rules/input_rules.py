"""MB000 to MB003: what the doctor could not read or judge, and suppressions that are not used."""

from microbatch.linting.rules.rule import PLAIN_LOOP, Rule

__all__ = ["INPUT_RULES"]

UNREADABLE = Rule(
    code="MB000",
    name="unreadable",
    severity="input",
    summary="The file could not be read, or is not valid Python.",
    happens=(
        "Nothing in this file was judged; of a notebook, only the cell that is named was left out. The exit status is "
        "2, never 0, so that a hook cannot take it for success."
    ),
    how_much="",
    fix="Mend the line that the message names, or leave the file out with `exclude`.",
    wrong=PLAIN_LOOP.replace("range(steps):", "range(steps)"),
    right=PLAIN_LOOP,
    certain="The file itself.",
)

NO_ACCUMULATION_FOUND = Rule(
    code="MB001",
    name="no-accumulation-found",
    severity="input",
    summary="The file has no loop in which gradients of several microbatches are added up.",
    happens=(
        "A loop that steps after every backward has nothing that the rules could judge. "
        "This is a note for a file that was named alone, and it is not an error."
    ),
    how_much="",
    fix="Name the file that has the training loop. If it has one that was not found, report it.",
    wrong="""\
for x, y in loader:
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""",
    right=PLAIN_LOOP,
    certain="The file itself.",
)

OPAQUE = Rule(
    code="MB002",
    name="opaque",
    severity="input",
    summary="A loop accumulates, but a part of it is in code that the doctor cannot see.",
    happens=(
        "The loss, the model or the optimizer is handed to a function that is not in the files given. "
        "What that function may do cannot be judged, so nothing is said about it, right or wrong."
    ),
    how_much="",
    fix="Give the folder that has the other file, or run `microbatch check` on the loop, which sees everything.",
    wrong="""\
from training_tools import run_backward

for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        run_backward(loss, optimizer)
    optimizer.step()
    optimizer.zero_grad()
""",
    right=PLAIN_LOOP,
    certain="The file itself.",
)

UNUSED_SUPPRESSION = Rule(
    code="MB003",
    name="unused-suppression",
    severity="input",
    summary="A comment suppresses a rule that finds nothing on its line.",
    happens=(
        "The code was changed, or the code of the rule is misspelt. A comment that is left over would hide the "
        "fault if "
        "it came back."
    ),
    how_much="",
    fix="Remove the comment.",
    wrong=PLAIN_LOOP.replace("optimizer.step()", "optimizer.step()  # microbatch: ignore[MB105] windows are whole"),
    right=PLAIN_LOOP,
    certain="The file itself.",
)

INPUT_RULES = (UNREADABLE, NO_ACCUMULATION_FOUND, OPAQUE, UNUSED_SUPPRESSION)
