"""What importing costs: torch and nothing else, no thread, no patch; and the command line's help not even torch."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "microbatch"
CORE = (
    "__init__.py",
    "errors.py",
    "failed_layer.py",
    "products.py",
    "torch_errors.py",
    "batch",
    "loss",
    "gradients",
    "ranks",
    "memory",
    "step",
    "checking",
    "linting",
    "planning",
    "train/job.py",
)
COMMAND_LINE_ONLY = {"rich", "typer", "pydantic", "pydantic_core", "safetensors", "starlette", "uvicorn"}
JOBS_ONLY = {"tokenizers", "sklearn", "scipy", "PIL"}

USE_EVERY_NAME = """
import microbatch
for name in microbatch.__all__:
    getattr(microbatch, name)
"""


def fresh(code: str) -> str:
    """Run code in a Python of its own, warnings as errors, and return what it printed last."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        # With byte code, as an installed package brings it.
        env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        | {"COLUMNS": "100"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.rstrip("\n").rpartition("\n")[2]


def modules(code: str) -> set[str]:
    """Return the names of all modules that a Python of its own has after the code."""
    return set(json.loads(fresh(code + "\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))")))


def others(names: set[str]) -> set[str]:
    """Return the modules that are neither Python's own nor ours."""
    return {
        each for each in names if each.partition(".")[0] not in sys.stdlib_module_names | {"microbatch", "__main__"}
    }


def loaded(code: str) -> set[str]:
    """Return the top-level packages, other than Python's own and ours, that a Python of its own has after the code."""
    return {name.partition(".")[0] for name in others(modules(code))}


def test_the_package_loads_nothing_that_torch_does_not() -> None:
    ours, torchs = loaded(USE_EVERY_NAME), loaded("import torch, torch.distributed, torch.utils.data")
    assert "torch" in ours
    assert not ours & (COMMAND_LINE_ONLY | JOBS_ONLY)
    assert {name for name in ours - torchs if not name.startswith("_")} == set()


def test_a_package_that_torch_does_not_load_would_be_seen() -> None:
    assert "rich" in loaded("import rich.table")


# What the compiler brings along: a second of CPU time, and more modules than the rest of torch.
COMPILER = {"torch._dynamo", "sympy", "torch.distributed.fsdp"}

PREPARE = """
import torch
from torch import nn

class Plain(torch.optim.Optimizer):
    # Without the wrapper by which the methods of torch's own optimizers import the compiler.
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])

model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
sgd = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
plain = lambda: Plain(model.parameters(), {"lr": 0.1})
batch = torch.randn(16, 4)
loss_fn = lambda model, microbatch: model(microbatch).square().mean()
"""
FIRST_STEP = """
import microbatch as mb
mb.Accumulator(model, {optimizer}(), microbatch_size=4).step(batch, loss_fn)
"""
BY_HAND = """
optimizer = {optimizer}()
for microbatch in batch.split(4):
    (loss_fn(model, microbatch) / 4).backward()
optimizer.step()
optimizer.zero_grad()
"""


def first_step(code: str, optimizer: str) -> set[str]:
    """Return the modules, other than Python's own and ours, that are loaded after a first step."""
    return others(modules(PREPARE + code.replace("{optimizer}", optimizer)))


def test_a_first_step_loads_nothing_that_a_hand_written_loop_does_not() -> None:
    # The constructor of every optimizer of torch imports the compiler.
    assert first_step(FIRST_STEP, "sgd") - first_step(BY_HAND, "sgd") == set()


def test_a_hand_written_loop_needs_no_compiler_and_a_step_that_loads_it_would_be_seen() -> None:
    assert first_step(BY_HAND, "plain") & COMPILER == set()
    assert modules("import torch._dynamo") >= COMPILER


SNAPSHOT = """
import json, os, signal, sys, threading, warnings
import torch, torch.distributed, torch.utils.data, torch.nn.functional, torch.optim, torch.autograd.graph
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

PLACES = [torch, torch.Tensor, torch.nn.Parameter, torch.nn.Module, torch.nn.functional, torch.optim.Optimizer,
          torch.autograd, torch.autograd.graph, torch.amp, torch.utils.data.DataLoader, torch.distributed,
          sys.modules["builtins"], warnings, threading.Thread]

def snapshot():
    state = {(str(place), name): id(value) for place in PLACES for name, value in vars(place).items()
             if name not in ("__warningregistry__", "__annotations__")}
    state["environment"] = dict(os.environ)
    state["hooks"] = (sys.excepthook, sys.displayhook, threading.excepthook, list(sys.meta_path), list(sys.path_hooks))
    state["signals"] = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    state["filters"] = list(warnings.filters)
    state["threads"] = [thread.name for thread in threading.enumerate()]
    state["native threads"] = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    state["modes"] = (len(function_modes()), len(dispatch_modes()), torch.is_grad_enabled(), torch.get_default_dtype(),
                      torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_default_device())
    state["random"] = torch.get_rng_state().tolist()
    return state

def changed_by(code):
    before = snapshot()
    exec(code, globals())
    after = snapshot()
    return [str(key) for key in before if after.get(key, "gone") != before[key]]

warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # of threads, which a numerical library may have
told = {}
for code in {codes}:  # each in a process of its own, in which torch has been imported
    reading, writing = os.pipe()
    if not os.fork():
        os.write(writing, json.dumps(changed_by(code)).encode())
        os._exit(0)
    os.close(writing)
    told[code] = json.load(os.fdopen(reading))
print("\\n" + json.dumps(told))
"""

# What must be seen, and under which key.
CHANGES = {
    "torch.nn.functional.linear = lambda *a: None": "linear",
    "torch.Tensor.backward = None": "backward",
    "import time; threading.Thread(target=time.sleep, args=(1,), daemon=True).start()": "threads",
    "torch.manual_seed(3)": "random",
    "torch.set_default_dtype(torch.float64)": "modes",
    "os.environ['OMP_NUM_THREADS'] = '7'": "environment",
    "signal.signal(signal.SIGINT, signal.SIG_DFL)": "signals",
}


@pytest.fixture(scope="module")
def changed() -> dict[str, list[str]]:
    """Return what each code changes of torch, the interpreter and the process."""
    return json.loads(fresh(SNAPSHOT.replace("{codes}", repr([USE_EVERY_NAME, *CHANGES]))))


def test_the_package_starts_nothing_and_patches_nothing(changed: dict[str, list[str]]) -> None:
    assert changed[USE_EVERY_NAME] == []


@pytest.mark.parametrize("code", CHANGES)
def test_a_patch_or_a_thread_would_be_seen(changed: dict[str, list[str]], code: str) -> None:
    assert any(CHANGES[code] in change for change in changed[code])


def test_the_whole_package_costs_at_most_an_eighth_of_what_torch_does() -> None:
    timed = f"""
import gc, time
start = time.process_time()
import torch, torch.distributed, torch.utils.data
torchs, start = time.process_time() - start, time.process_time()
gc.disable()  # or a look at all of torch's objects falls into one of them by chance
{USE_EVERY_NAME}
print((time.process_time() - start) / torchs)
"""
    # Of one process, so that a busy machine slows both; the best of a few, for the first one makes the byte code.
    shares: list[float] = []
    while len(shares) < 4 and min(shares, default=1.0) > 0.125:
        shares.append(float(fresh(timed)))
    assert min(shares) <= 0.125


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["guide", "--help"]])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["microbatch", *{arguments!r}]
from microbatch.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert "torch" not in loaded(code)


def test_the_live_view_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    code = f"""
from pathlib import Path
from microbatch.guide.live import open_runs
from microbatch.guide.serve import serve
from microbatch.guide.server import Guide
Guide(open_runs([Path({str(tmp_path)!r})]))
"""
    packages = loaded(code)
    assert "torch" not in packages
    assert "starlette" in packages
    # The negative control: the playground's own side needs it.
    assert "torch" in loaded(code + "import microbatch.guide.worker")


def imports(source: str) -> set[str]:
    """Return the top-level packages that source imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: `from microbatch.room.file import name`"
            found.add((node.module or "").partition(".")[0])
    return found


def core_files() -> list[Path]:
    paths = [PACKAGE / place for place in CORE]
    return sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))


@pytest.mark.parametrize("file", core_files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_core_imports_torch_alone(file: Path) -> None:
    # What makes turns cheaper, where it is there; without it threads take them.
    optional = {"greenlet"} if file == PACKAGE / "loss" / "fibers.py" else set[str]()
    assert imports(file.read_text(encoding="utf-8")) - sys.stdlib_module_names <= {"torch", "microbatch"} | optional


def test_an_import_inside_a_function_would_be_seen() -> None:
    assert imports("def f():\n    from numpy import array\n    import torch.nn") == {"numpy", "torch"}
