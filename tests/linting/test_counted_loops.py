"""What counts microbatches and what counts steps; helpers, outputs and measures that are no microbatches."""

import pytest
from tests.linting.counted_loops import PAIRS, RIGHT, pieces, right, wrong

from microbatch.linting.doctor import doctor


def certain(source: str) -> set[str]:
    return {each.rule for each in doctor(source) if each.confidence == "certain" and each.rule < "MB5"}


@pytest.mark.parametrize("name", list(PAIRS))
def test_the_wrong_loop_is_certain(name: str) -> None:
    assert certain(wrong(name)) == PAIRS[name][2]


@pytest.mark.parametrize("name", list(PAIRS))
def test_nothing_is_certain_in_the_right_loop(name: str) -> None:
    assert certain(right(name)) == set()


@pytest.mark.parametrize("name", list(RIGHT))
def test_nothing_is_certain_in_right_loops_of_unusual_shape(name: str) -> None:
    assert certain("import torch\nimport torch.nn.functional as F\n" + RIGHT[name]) == set()


def test_the_step_may_stand_in_the_caller_of_the_loop() -> None:
    assert "MB101" in certain(pieces(divided=False))
    assert "MB101" not in certain(pieces(divided=True))


def test_a_model_that_is_given_a_length_is_a_model() -> None:
    loop = """
labels = [-100] + labels + [-100]
model = AutoModelForTokenClassification.from_pretrained(name, num_labels={})
for step, batch in enumerate(loader):
    loss = model(**batch).loss / n_accum
    loss.backward()
    if (step + 1) % n_accum == 0:
        optimizer.step()
        optimizer.zero_grad()
"""
    assert certain(loop.format("3")) == certain(loop.format("len(label_list)")) == {"MB401"}


def test_a_setting_that_only_counts_is_no_certain_fault() -> None:
    loop = """
class Trainer:
    def fit(self, loader):
        total = len(loader) // self.config.gradient_accumulation_steps
        for x, y in loader:
            loss = torch.nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
"""
    found = [each for each in doctor(loop) if each.rule == "MB104"]
    assert [(each.confidence, each.needs) for each in found] == [
        ("depends", ("what else reads `gradient_accumulation_steps`",))
    ]


def test_the_heads_of_a_model_are_no_microbatches() -> None:
    loop = """
import torch
import torch.nn.functional as F
criterion = torch.nn.CrossEntropyLoss()
for epoch in range(3):
    for step, batch in enumerate(loader):
        logits = model(**batch)
        labels = dataset.ids[batch['labels']]
        loss = 0.0
        for index, i in enumerate(logits):
            loss += criterion(i, labels[:, index])
        loss /= len(logits)
        if args.gradient_accumulation_steps > 1:
            loss = loss / args.gradient_accumulation_steps
        loss.backward()
        if (step + 1) % args.gradient_accumulation_steps == 0:
            optimizer.step()
            model.zero_grad()
"""
    assert [each.rule for each in doctor(loop) if each.confidence == "certain"] == []
