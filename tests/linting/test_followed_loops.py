"""What stands in objects, closures, contexts and helpers is followed; without the fault, nothing is certain."""

import ast

import pytest
from tests.linting.followed_loops import CLEARINGS, OBJECTS, cleared_by

from microbatch.linting.doctor import doctor
from microbatch.linting.module import Module


def certain(source: str) -> set[str]:
    return {each.rule for each in doctor(source) if each.confidence == "certain" and each.rule < "MB5"}


@pytest.mark.parametrize("name", list(OBJECTS))
def test_the_fault_is_certain(name: str) -> None:
    codes, source = OBJECTS[name]
    assert certain(source) == codes


MENDED = {
    "a counter in a dataclass, tested before it is raised": ("state.micro %", "(state.micro + 1) %"),
    "a counter in an enclosing function": ("if count %", "if (count + 1) %"),
    "a property is the condition of the step": ("(self.turn + 1) %", "self.turn %"),
    "a context manager of the file clears the gradients": (
        "    for k in range(accum_steps):\n        x, y = next(batches)\n        with fresh(opt):\n",
        "    with fresh(opt):\n        for k in range(accum_steps):\n            x, y = next(batches)\n",
    ),
    "a context of the file takes the step when it is left": (".backward()", ".div(accum_steps).backward()"),
    "the loss is a lambda": (".backward()", ".div(accum_steps).backward()"),
    "the loss is a partial function": (".backward()", ".div(accum_steps).backward()"),
    "groups of a loader": (".backward()", ".div(k).backward()"),
    "a window whose step stands in a method": (".backward()", ".div(self.pieces).backward()"),
    "pairs by einsum": ('"i d, j d -> i j"', '"i d, i d -> i d"'),
    "a resumed run compares microbatches with steps": ("(len(loader) // accum_steps)", "len(loader)"),
    "gradients that are cleared once an epoch": ("opt.step()", "opt.step(); opt.zero_grad()"),
    "a loop that does not accumulate, and never clears": ("opt.step()", "opt.step(); opt.zero_grad()"),
    "one optimizer of two is never cleared": ("g_optim.step()", "g_optim.step(); g_optim.zero_grad()"),
}


@pytest.mark.parametrize("name", list(OBJECTS))
def test_nothing_is_certain_once_it_is_mended(name: str) -> None:
    old, new = MENDED[name]
    source = OBJECTS[name][1]
    assert old in source
    assert certain(source.replace(old, new)) == set()


@pytest.mark.parametrize("statement", CLEARINGS)
def test_gradients_may_be_cleared_in_many_ways(statement: str) -> None:
    assert certain(cleared_by("pass")) == {"MB107"}
    assert certain(cleared_by(statement)) == set()


def test_a_length_is_not_the_number_of_microbatches() -> None:
    loop = """
last_index = len(loader) - 1
n = len(loader)
for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        is_last = i == last_index
        (criterion(model(x), y) / accum).backward()
        if (i + 1) % accum == 0 or is_last or i + 1 == n:
            opt.step()
            opt.zero_grad()
"""
    assert certain(loop) == set()
    assert {each.rule for each in doctor(loop) if each.rule < "MB5"} == {"MB112"}


ROWS = """
loader = torch.utils.data.DataLoader(rows, batch_size={size})
scheduler = get_linear_schedule_with_warmup(optimizer, 10, {total})
for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        (criterion(model(x), y) / accum_steps).backward()
        if (i + 1) % accum_steps == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
"""


@pytest.mark.parametrize(
    ("size", "total", "codes"),
    [
        ("args.batch_size", "len(rows) // args.batch_size * epochs", {"MB301"}),
        ("args.batch_size // accum_steps", "len(rows) // args.batch_size * epochs", set()),
        ("args.batch_size", "len(rows) // (args.batch_size * accum_steps) * epochs", set()),
        ("args.batch_size", "len(rows)", {"MB301"}),
        ("args.batch_size", "args.updates", set()),
    ],
)
def test_a_schedule_counts_steps_only_where_the_batch_size_is_that_of_a_step(
    size: str, total: str, codes: set[str]
) -> None:
    assert certain(ROWS.format(size=size, total=total)) == codes


@pytest.mark.parametrize(
    ("test", "codes"), [("self.count % self.every == 0", {"MB105"}), ("(self.count + 1) % self.every == 0", set())]
)
def test_an_object_that_is_called_counts(test: str, codes: set[str]) -> None:
    loop = f"""
class Turn:
    def __init__(self, every):
        self.every = every
        self.count = 0
    def __call__(self):
        ready = {test}
        self.count += 1
        return ready

turn = Turn(4)
for epoch in range(epochs):
    for x, y in loader:
        (torch.nn.functional.mse_loss(model(x), y) / turn.every).backward()
        if turn():
            opt.step()
            opt.zero_grad()
"""
    assert certain(loop) == codes


@pytest.mark.parametrize(("begin", "codes"), [("self.before_batch()", set()), ("self.count += 1", {"MB107"})])
def test_a_base_class_in_another_file_may_clear(begin: str, codes: set[str]) -> None:
    loop = f"""
class Trainer(BaseTrainer):
    def run(self):
        for x, y in self.loader:
            {begin}
            torch.nn.functional.mse_loss(self.model(x), y).backward()
            self.optimizer.step()
"""
    assert certain(loop) == codes


@pytest.mark.parametrize(("call", "codes"), [("begin(model, opt)", set()), ("adjust_lr(opt, epoch)", {"MB107"})])
def test_a_function_that_gets_the_optimizer_may_clear(call: str, codes: set[str]) -> None:
    assert certain(cleared_by(call)) == codes


PIECES = """
for batch in loader:
    for x, y in zip(batch["x"].chunk(pieces), batch["y"].chunk(pieces)):
        loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
        {}
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize(
    ("backward", "codes"),
    [
        ('(loss / len(batch["x"])).backward()', set()),
        ("(loss / len(x)).backward()", {"MB101"}),
        ("(loss / len(x)).backward(torch.tensor(1 / pieces))", set()),
        ("(loss / len(x)).backward(torch.ones_like(loss))", {"MB101"}),
    ],
)
def test_what_a_sum_is_divided_by_tells_a_mean_of_a_piece_from_one_of_the_batch(backward: str, codes: set[str]) -> None:
    assert certain(PIECES.format(backward)) == codes


def test_a_call_without_what_a_method_must_be_given_is_no_call_of_it() -> None:
    source = (
        "class Trainer:\n    def train(self, args, k=1):\n        unwrap(net).train()\n        loss.backward()\n\n"
        "trainer.train(args)\ntrainer.train(*given)\ntrainer.train(args=args)\n"
    )
    module = Module(ast.parse(source))
    calls = [n.func for n in module.nodes if isinstance(n, ast.Call)]
    found = {
        func.lineno: module.resolve(func, None) is not None
        for func in calls
        if isinstance(func, ast.Attribute) and func.attr == "train"
    }
    assert found == {3: False, 6: True, 7: True, 8: True}
