"""MB701 and MB702: the training is right, and the number that is reported is not the loss."""

from microbatch.linting.rules.rule import Rule

__all__ = ["LOG_RULES"]

MEAN_LOGGED = """\
for step in range(steps):
    total = 0.0
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    print("loss", total.item())
"""

LOGGED_LOSS_SCALED = Rule(
    code="MB701",
    name="logged-loss-scaled",
    severity="logging",
    summary="The loss is reported after its division by N.",
    happens=(
        "The curve is N times too low. Runs with different N cannot be compared, and a lower loss at a larger N says "
        "nothing. The training itself is right."
    ),
    how_much="The number is 0.25 of the loss with N = 4. The weights are right, with any optimizer.",
    fix="Report the mean of the losses before the division, which is the sum of `loss / N` over the window.",
    wrong=MEAN_LOGGED.replace("total.item()", "total.item() / N"),
    right=MEAN_LOGGED,
    certain="The divided loss reaches the report by name, and nothing multiplies it by N.",
)

LOGGED_LAST = Rule(
    code="MB702",
    name="logged-last",
    severity="logging",
    summary="Only the last microbatch of each window is reported.",
    happens=(
        "The number is the loss of 1/N of the batch. Its mean over many steps is right, but it is noisier than the "
        "loss of the batch that the step was taken with. The training itself is right."
    ),
    how_much=(
        "The number is, on average over 60 steps with N = 4, 41 % away from the batch's loss. The weights are "
        "right, with any optimizer."
    ),
    fix="Add up `loss.detach()` over the window, and report the sum.",
    wrong="""\
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y)
        (loss / N).backward()
    optimizer.step()
    optimizer.zero_grad()
    print("loss", loss.item())
""",
    right=MEAN_LOGGED,
    certain="A simulated window in which one microbatch's loss alone reaches the report.",
)

LOG_RULES = (LOGGED_LOSS_SCALED, LOGGED_LAST)
