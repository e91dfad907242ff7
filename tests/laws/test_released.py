"""What a window used is free as soon as the window ends, and not only once the garbage collector runs."""

import subprocess
import sys

PROGRAM = """
import gc, weakref, torch
import microbatch as mb

def encode(model, x): return model(x)
def loss_fn(model, x): return model(x).square().mean()
def wrong(model, x): raise ValueError("on purpose")
def network(norm):
    return torch.nn.Sequential(torch.nn.Linear(64, 64), norm(64), torch.nn.Linear(64, 64))

def plain(a, x): a.step(x, loss_fn)
def gradient(a, x): a.gradient(x, loss_fn)
def coupled(a, x): a.step(x, lambda model, z: z.var(), encode=encode)
def window(a, x):
    with a.window() as w:
        for each in w.split(x): w.backward(loss_fn(a.options.model, each))
def error(a, x):
    try: a.step(x, wrong)
    except ValueError: pass

WAYS = {
    "plain": (plain, {}), "gradient": (gradient, {}), "window": (window, {}), "error": (error, {}),
    "twice": (coupled, {"coupled": "twice"}), "keep": (coupled, {"coupled": "keep"}),
    "exact": (plain, {"batch_norm": "exact"}), "pooled": (plain, {"batch_norm": "pooled"}),
    "dropout": (plain, {"dropout": "by_row"}), "tree": (plain, {"ranks": mb.Ranks(deterministic=True)}),
}
x = torch.randn(6, 64)
gc.disable()
for name, (run, options) in WAYS.items():
    model = network(torch.nn.BatchNorm1d if "batch_norm" in options else torch.nn.LayerNorm)
    accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2, **options)
    for _ in range(3): run(accumulator, x)
    held = weakref.ref(model)
    del accumulator, model
    print(name, held() is None)
"""


def test_a_model_is_freed_with_its_last_reference() -> None:
    # In a process of its own, because the checks of types in this one hold arguments in cycles.
    said = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    assert len(said.splitlines()) == 10
    assert [line for line in said.splitlines() if not line.endswith("True")] == []
