"""What counts microbatches and what counts steps; helpers, outputs and measures that are no microbatches."""

import ast

import pytest
from tests.linting.counted_loops import PAIRS, RIGHT, pieces, right, wrong

from microbatch.linting.doctor import doctor
from microbatch.linting.machine import Machine


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


@pytest.mark.parametrize(("other", "confidence"), [("total", "certain"), ("period", "depends")])
def test_a_schedule_that_a_setting_chooses_is_no_certain_fault(other: str, confidence: str) -> None:
    loop = f"""
if args.period is None:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, 1e-6)
else:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, {other}, 1e-5)
seen = 0
while seen < total:
    for x, y in loader:
        (F.cross_entropy(model(x), y) / accum_steps).backward()
        seen += 1
        if seen % accum_steps == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
"""
    found = [each for each in doctor(loop) if each.rule == "MB301"]
    assert [(each.confidence, each.needs) for each in found] == [
        (confidence, () if confidence == "certain" else ("`args.period is None`",))
    ]


@pytest.mark.parametrize("made", ["F.cross_entropy(model(x), y, reduction='none')", "model(x, y)"])
def test_a_mean_of_what_a_model_returns_as_its_loss_may_be_one_over_devices(made: str) -> None:
    loop = f"""
for i, (x, y) in enumerate(loader):
    loss = {made}
    loss = loss.mean()
    loss.backward()
    if (i + 1) % accum_steps == 0:
        optimizer.step()
        optimizer.zero_grad()
"""
    (found,) = [each for each in doctor(loop) if each.rule == "MB101"]
    assert found.confidence == ("depends" if made.startswith("model") else "certain")


@pytest.mark.parametrize(("padding", "confidence"), [(-1, "certain"), (0, "depends")])
def test_labels_that_the_file_pads_with_the_label_to_ignore_are_ignored(padding: int, confidence: str) -> None:
    loop = f"""
def pair(rows):
    return longest(rows, pad_id=0), longest(shifted(rows), pad_id={padding})
for i, rows in enumerate(loader):
    x, y = pair(rows)
    (F.cross_entropy(model(x), y, ignore_index=-1) / accum_steps).backward()
    if (i + 1) % accum_steps == 0:
        optimizer.step()
        optimizer.zero_grad()
"""
    (found,) = [each for each in doctor(loop) if each.rule == "MB401"]
    assert found.confidence == confidence


@pytest.mark.parametrize(
    ("made", "rules"), [("loss", {"MB702"}), ("measure(net)", set()), ("eval_loss(net, x)", set())]
)
def test_a_loss_that_is_measured_is_not_the_loss_of_a_microbatch(made: str, rules: set[str]) -> None:
    name = "loss_now" if made == "loss" else "eval_loss"
    loop = f"""
net = Net()
for i, (x, y) in enumerate(loader):
    loss = F.cross_entropy(net(x), y)
    (loss / accum_steps).backward()
    if (i + 1) % accum_steps == 0:
        optimizer.step()
        optimizer.zero_grad()
        {name} = {made}
        print(i, {name})
"""
    assert {each.rule for each in doctor(loop)} & {"MB701", "MB702"} == ({"MB702"} if made == "loss" else set())


@pytest.mark.parametrize("tested", [True, False])
def test_a_mean_over_tasks_after_the_training_is_a_measure(*, tested: bool) -> None:
    test = """
    error = 0.0
    for task in range(n):
        learner = model.clone()
        error += F.mse_loss(learner(tasks.test()), tasks.labels()).item()
    print("error", error / n)
"""
    loop = f"""
def main(model, tasks, optimizer, n):
    for iteration in range(1000):
        optimizer.zero_grad()
        for task in range(n):
            learner = model.clone()
            loss = F.mse_loss(learner(tasks.train()), tasks.labels())
            loss.backward()
        for p in model.parameters():
            p.grad.data.mul_(1.0 / n)
        optimizer.step()
        {"pass" if tested else "print(loss)"}
{test if tested else ""}
"""
    assert {each.rule for each in doctor(loop)} & {"MB701", "MB702"} == (set() if tested else {"MB702"})


@pytest.mark.parametrize("divided", ["loss.numel()", "mask.numel()"])
def test_a_sum_is_no_mean_because_its_own_size_divides_it(divided: str) -> None:
    loop = f"""
for i, (x, y, mask) in enumerate(loader):
    loss = (F.cross_entropy(model(x), y, reduction="none") * mask).sum()
    (loss / {divided}).backward()
    if (i + 1) % accum_steps == 0:
        optimizer.step()
        optimizer.zero_grad()
"""
    assert ("MB101" in certain(loop)) == divided.startswith("mask")


@pytest.mark.parametrize("cut", [True, False])
def test_the_length_of_a_loader_that_gives_whole_windows_counts_steps(*, cut: bool) -> None:
    inner = "for x, y in zip(data.chunk(n), targets.chunk(n)):" if cut else "for x, y in loader:"
    outer = "for data, targets in loader:" if cut else "for epoch in range(3):"
    loop = f"""
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps_per_epoch=len(loader), epochs=3)
seen = 0
{outer}
    optimizer.zero_grad()
    {inner}
        (F.cross_entropy(model(x), y) / n).backward()
        seen += 1
        if seen % n == 0:
            optimizer.step()
            scheduler.step()
            {"pass" if cut else "optimizer.zero_grad()"}
"""
    assert ("MB301" in certain(loop)) == (not cut)


def test_what_is_computed_before_a_loop_over_layers_says_nothing_of_the_counter() -> None:
    loop = """
class Train:
    def steps(self):
        n, rem = divmod(self.rows, self.size)
        if rem:
            n += 1
        return n
    def fit(self):
        state = State()
        n = self.steps()
        turns = trange(state.step * n, self.last * n, desc="train")
        for index, batch in zip(turns, state.loader):
            with torch.no_grad():
                hidden = self.teacher(batch).hidden_states[:-1]
            labels = shifted(batch)
            for i, h in enumerate(hidden):
                if self.soft:
                    loss = torch.sum(labels.exp() * (labels - state.lens(h, i)), dim=-1).mean()
                else:
                    loss = F.cross_entropy(state.lens(h, i), labels)
                (loss / n).backward()
            step, rem = divmod(index, n)
            if rem == n - 1:
                state.opt.step()
                state.opt.zero_grad()
                state.step = step + 1
"""
    assert "MB105" not in {each.rule for each in doctor(loop)}


def test_tables_of_tables_are_gone_through_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = """
def table(rows):
    for a in range(10):
        for b in range(10):
            for c in range(10):
                rows[a][b][c] = rows[a][b][c] + 1
for i, (x, y) in enumerate(loader):
    table(rows)
    (F.cross_entropy(model(x), y) / accum_steps).backward()
    if (i + 1) % accum_steps == 0:
        optimizer.step()
        optimizer.zero_grad()
"""
    ran = 0
    statement = Machine.statement

    def counted(self: Machine, node: ast.stmt) -> object:
        nonlocal ran
        ran += isinstance(node, ast.Assign) and "rows" in ast.unparse(node)
        return statement(self, node)

    monkeypatch.setattr(Machine, "statement", counted)
    doctor(loop)
    assert 0 < ran < 5_000
