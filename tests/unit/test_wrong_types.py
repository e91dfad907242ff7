"""Values of the wrong type are refused by the library itself, in a process where no type checker does so first."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("unwatched.py")

# Expression, error, and what its message has to name: what was wrong, its value, what to do.
CASES: list[tuple[str, str, tuple[str, ...]]] = [
    *(
        (f"mb.find_learning_rate(w.job(), {name}={value})", "ConfigError", (f"{name} must be", says))
        for name in ("batch_size", "microbatch_size", "steps", "seeds")
        for value, says in [
            ("True", "True"),
            ("2.5", "2.5"),
            ("'2'", "'2'"),
            ("[0.5]", "[0.5]"),
            ("object()", "object"),
        ]
    ),
    *(
        (
            f"mb.sweep(w.job(), **({{'batch_sizes': [2, 4]}} | {{'{name}': {value}}}))",
            "ConfigError",
            (f"{name} must be",),
        )
        for name in ("batch_sizes", "microbatch_size", "samples", "seeds", "points", "grid")
        for value in ("True", "2.5", "'x'", "[0.5, '1']", "object()")
    ),
    ("mb.find_learning_rate(w.model)", "ConfigError", ("job must be an mb.Job", "Linear")),
    ("mb.sweep(3, batch_sizes=[2])", "ConfigError", ("job must be an mb.Job", "int")),
    ("mb.cut(w.x, '8')", "ConfigError", ("microbatch_size", "whole number of at least 1", "'8'")),
    ("mb.cut(w.x, 2.5)", "ConfigError", ("microbatch_size", "2.5")),
    ("mb.cut(w.x, None)", "ConfigError", ("microbatch_size", "None")),
    ("mb.cut(w.x, True)", "ConfigError", ("microbatch_size", "True")),
    ("w.accumulator(model=lambda x: x)", "ConfigError", ("model", "torch.nn.Module", "function")),
    ("w.accumulator(optimizer=[w.sgd, 'adam'])", "ConfigError", ("optimizer", "torch.optim.Optimizer", "str")),
    ("w.accumulator(optimizer=[w.model.weight])", "ConfigError", ("optimizer", "Parameter")),
    ("w.accumulator(optimizer=[w.sgd, w.sgd.param_groups])", "ConfigError", ("optimizer", "list")),
    ("w.accumulator(optimizer=3)", "ConfigError", ("optimizer", "int")),
    ("w.accumulator(microbatch_size=2.0)", "ConfigError", ("microbatch_size", "2.0")),
    ("w.accumulator(microbatch_size=None)", "ConfigError", ("microbatch_size", "None")),
    ("w.accumulator(microbatch_size='Auto')", "ConfigError", ("microbatch_size", "'Auto'")),
    ("w.accumulator(memory_budget=True)", "ConfigError", ("True", "6 GiB")),
    ("w.accumulator(max_grad_norm='1')", "ConfigError", ("max_grad_norm", "'1'")),
    ("w.accumulator(max_grad_norm=torch.tensor(1.0))", "ConfigError", ("max_grad_norm", "tensor(1.)")),
    ("w.accumulator(autocast='bf16')", "ConfigError", ("autocast", "'bf16'", "torch.bfloat16")),
    ("w.accumulator(autocast=True)", "ConfigError", ("autocast", "True")),
    ("w.accumulator(grad_scaler=True)", "ConfigError", ("grad_scaler", "bool")),
    ("mb.Sums(dtype='float32')", "ConfigError", ("dtype", "'float32'")),
    ("mb.Sums(dtype=None)", "ConfigError", ("dtype", "None")),
    ("mb.Sums(how='stochastic')", "ConfigError", ("how", "'stochastic'", '"compensated"')),
    ("mb.Sums(buffer=3)", "ConfigError", ("buffer", "3")),
    ("mb.Ranks(sync=True)", "ConfigError", ("sync", "True")),
    ("mb.Ranks(reduce_dtype='float32')", "ConfigError", ("reduce_dtype", "'float32'")),
    ("w.accumulator(sums={'dtype': torch.float64})", "ConfigError", ("sums must be mb.Sums(...)", "'dtype'")),
    ("w.accumulator(ranks='fast')", "ConfigError", ("ranks must be mb.Ranks(...)", "'fast'")),
    ("w.accumulator(accumulate_dtype=None)", "ConfigError", ("'accumulate_dtype'", "sums=mb.Sums(dtype=...)")),
    ("w.accumulator(nonfinite=None)", "ConfigError", ("nonfinite", "None")),
    ("w.accumulator(nonfinite=['skip'])", "ConfigError", ("nonfinite", "['skip']")),
    ("w.accumulator(autocast=[torch.bfloat16])", "ConfigError", ("autocast", "[torch.bfloat16]")),
    ("w.accumulator(listeners=[3])", "ConfigError", ("listeners", "int")),
    ("w.accumulator(listeners=3)", "ConfigError", ("listeners", "int")),
    ("w.accumulator().windows([w.x], microbatches=2.5)", "ConfigError", ("microbatches", "2.5")),
    ("w.step(lambda y: 3.0)", "LossError", ("'loss'", "float", "0-d tensor", "mb.Loss", ".item()")),
    ("w.step(lambda y: {'loss': y.mean(), 'rate': 0.1})", "LossError", ("'rate'", "float", "metrics={")),
    ("w.step(lambda y: np.float32(3))", "LossError", ("'loss'", "float32", ".item()")),
    ("w.step(lambda y: [y.mean()])", "LossError", ("'loss'", "list", "mb.Loss")),
    ("w.step(lambda y: (y.mean(), y))", "LossError", ("'loss'", "tuple")),
    ("w.step(lambda y: {'a': 3})", "LossError", ("'a'", "int")),
    ("w.step(lambda y: mb.Loss(sum=3.0, count=2))", "LossShapeError", ("Loss.sum", "0-d tensor", "float")),
    ("w.step(lambda y: mb.Loss(sum=y.sum(), count='2'))", "CountError", ("Loss.count", "'2'")),
    ("w.step(lambda y: mb.Loss(sum=y.sum(), count=None))", "CountError", ("Loss.count", "None")),
    ("w.step(lambda y: y.mean(), counts={'loss': '6'})", "CountError", ("count of 'loss'", "'6'")),
    ("w.step(lambda y: y.mean(), counts=6)", "MissingCountError", ("counts=", "dict of term to count", "int")),
    ("w.step(lambda y: y.mean(), counts=lambda x: None)", "MissingCountError", ("counts=", "NoneType")),
    ("w.backward(w.model(w.x).mean(), count='6')", "CountError", ("count", "'6'")),
    ("w.backward(w.model(w.x).mean(), count=torch.tensor(6))", "CountError", ("count", "tensor(6)")),
    ("mb.scale_hyperparameters('AdamW', from_batch_size=1, to_batch_size=2)", "ConfigError", ("Optimizer", "str")),
    ("mb.scale_hyperparameters(w.sgd, from_batch_size=8., to_batch_size=2)", "ConfigError", ("from_batch_size", "8.0")),
    ("mb.scale_hyperparameters(w.sgd, from_batch_size=8, to_batch_size=2, rule=[])", "ConfigError", ("rule", "[]")),
    ("mb.Hyperparameters(optimizer=None, learning_rate=0.1)", "ConfigError", ("optimizer", "None")),
    ("mb.Hyperparameters(optimizer='SGD', learning_rate='0.1')", "ConfigError", ("learning_rate", "'0.1'")),
    ("mb.Hyperparameters(optimizer='Adam', learning_rate=1, betas=[0.9, 0.99])", "ConfigError", ("betas", "[0.9")),
    ("mb.divide_batch('64')", "ConfigError", ("batch_size", "whole number of at least 1", "'64'")),
    # The checker of types draws from Python's own generator, so that it is put back is shown here.
    ("w.random_is_put_back(ValueError)", "ValueError", ()),
    ("w.random_is_put_back(KeyboardInterrupt)", "KeyboardInterrupt", ()),
]
FINE = [
    "w.whole_numbers_of_any_library_find_the_rate_of_those_of_python()",
    "mb.sweep(w.job(), batch_sizes=np.array([1, 2]), seeds=np.int64(1), samples=np.int64(24), points=np.int32(2))",
    "mb.cut(w.x, 2)",
    "mb.divide_batch(64)",
    "w.accumulator()",
    "w.accumulator(listeners=print)",
    "w.step(lambda y: y.mean())",
    "w.backward(w.model(w.x).mean(), count=6)",
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[list[str], str] | None]:
    expressions = [expression for expression, _, _ in CASES] + FINE
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], input=json.dumps(expressions), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return dict(zip(expressions, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize(("expression", "error", "words"), CASES, ids=[case[0] for case in CASES])
def test_it_is_refused_with_what_was_wrong(
    outcomes: dict[str, tuple[list[str], str] | None], expression: str, error: str, words: tuple[str, ...]
) -> None:
    outcome = outcomes[expression]
    assert outcome is not None
    names, message = outcome
    assert names[0] == error, message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("expression", FINE)
def test_what_is_fine_is_not_refused(outcomes: dict[str, tuple[list[str], str] | None], expression: str) -> None:
    assert outcomes[expression] is None
