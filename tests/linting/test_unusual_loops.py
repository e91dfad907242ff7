"""Unusual right loops are the full batch and give no certain finding; unusual wrong ones are not, and are named."""

import pytest
from tests.linting.rule_loops import EPOCHS, apart, full, regression, run, windows
from tests.linting.unusual_loops import UNUSUAL_RIGHT, UNUSUAL_WRONG, WHOLE

from microbatch.linting.doctor import doctor


@pytest.mark.parametrize("name", list(UNUSUAL_RIGHT))
def test_it_is_right_and_no_finding_is_certain(name: str) -> None:
    batches = regression(WHOLE)
    assert apart(run(UNUSUAL_RIGHT[name], batches), full(windows(batches) * EPOCHS)) < 1e-10
    found = [each for each in doctor(UNUSUAL_RIGHT[name]) if each.confidence == "certain"]
    assert [(each.rule, each.line, each.message) for each in found] == []


@pytest.mark.parametrize("name", list(UNUSUAL_WRONG))
def test_it_is_wrong_and_the_finding_is_certain(name: str) -> None:
    code, source = UNUSUAL_WRONG[name]
    batches = regression(WHOLE)
    assert apart(run(source, batches), full(windows(batches) * EPOCHS)) > 1e-3
    found = {each.rule for each in doctor(source) if each.confidence == "certain" and each.rule < "MB5"}
    assert found == {code}


# What a file shows of a label that is ignored, and of a sum that grows: no run is needed to see what is said.
TOKENS = """
import torch.nn.functional as F
for i, batch in enumerate(loader, start=1):
    logits = model(batch["ids"])
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index={ignored}) / N
    loss.backward()
    if i % N == 0:
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.parametrize(
    ("source", "certain"),
    [
        (TOKENS.format(ignored="-100"), False),
        (TOKENS.format(ignored="pad_id"), True),
        ("labels[padding] = -100\n" + TOKENS.format(ignored="-100"), True),
        ("recent = losses[-100 * N :]\n" + TOKENS.format(ignored="-100"), False),
    ],
)
def test_that_a_label_is_ignored_is_certain_where_some_label_is_written(source: str, *, certain: bool) -> None:
    found = [each.confidence for each in doctor(source) if each.rule == "MB401"]
    assert found == ["certain" if certain else "depends"]


LOGGED = """
for step in range(steps):
    logs = {{}}
    for _ in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y)
        (loss / N).backward()
        {log}
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        loss = criterion(model(held_x), held_y)
        print(loss.item())
"""


@pytest.mark.parametrize(
    ("log", "codes"),
    [("accum_log(logs, loss.item() / N)", set[str]()), ("run.log(loss.item() / N)", {"MB701"})],
)
def test_a_sum_over_the_window_and_an_evaluation_are_not_blamed(log: str, codes: set[str]) -> None:
    found = {each.rule for each in doctor("import torch\n" + LOGGED.format(log=log)) if each.rule.startswith("MB7")}
    assert found == codes
