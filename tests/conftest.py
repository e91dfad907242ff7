"""What every test runs under: types checked while the code runs, one seed, few threads, deterministic kernels."""

import gc
import importlib
import os
import random
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_package
from hypothesis import register_random, settings

if "microbatch" in sys.modules:
    message = "microbatch was imported before its types could be watched"
    raise RuntimeError(message)
DEFINED: set[CodeType] = set()


def once_for_a_definition(check: Any, found: Any = None, **options: Any) -> Any:
    """Check the types of a function inside of a function when it is first defined; each check is compiled anew."""
    if found is None:
        return partial(once_for_a_definition, check, **options)
    if isinstance(found, FunctionType) and "<locals>" in found.__qualname__:
        if found.__code__ in DEFINED:
            return found
        DEFINED.add(found.__code__)
    return check(found, **options)


# Private: another release may lack it, and is slower. What stands in for beartype on a GPU's machine has none to check.
with suppress(ImportError):
    ADDED: Any = importlib.import_module("beartype.claw._ast._clawaststar")
    ADDED.__beartype__ = partial(once_for_a_definition, ADDED.__beartype__)
# An int is a float where a float is asked for (as for the type checker). The command line is left out: it imports torch
# only when a command needs it, so its annotations may name what has not been imported.
beartype_package(
    "microbatch", conf=BeartypeConf(is_pep484_tower=True, claw_skip_package_names=("microbatch.cli",), is_random=False)
)


def once_for_a_type(check: Callable[[type, Any], bool]) -> Callable[[type, Any], bool]:
    """Check each of our types against a Protocol once; Python would check all attributes at every call."""
    passed: set[tuple[type, type]] = set()

    def has_all(protocol: type, value: Any) -> bool:
        pair = protocol, type(value)
        found = pair in passed or check(protocol, value)
        if found and pair[1].__module__.startswith("microbatch."):  # whose instances have the same attributes
            passed.add(pair)
        return found

    return has_all


PROTOCOLS: Any = type(typing.Protocol)
PROTOCOLS.__instancecheck__ = once_for_a_type(PROTOCOLS.__instancecheck__)

# cuBLAS reads this once, when CUDA starts: without it, deterministic matrix products are refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# As many threads as the cores leave to each of the processes that the tests are spread over, and to what these start:
# threads that wait for one another spin, and take several times the work's own time where cores are too few.
THREADS = max(1, min(2, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
import torch  # noqa: E402 - after the lines above, or it is too late

torch.set_num_threads(THREADS)
torch.set_num_interop_threads(1)
# Also fills fresh memory with NaN, so that a sum begun on uninitialised memory shows.
torch.use_deterministic_algorithms(mode=True)


class TorchRandom:
    """Torch's generator as Hypothesis wants it, so that every example starts from the same random state."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # Hypothesis holds it weakly
register_random(TORCH_RANDOM)

# No deadline: the first example pays for torch's warm-up. In CI the same examples every time; elsewhere new ones.
settings.register_profile("here", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> None:
    """Leave what is there before a file's first test out of collections: many tests collect, and modules are many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Start every test from the same random state, and say which."""
    value = 20_260_101
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def nothing_left_on() -> Iterator[None]:
    """Fail the test that leaves a mode or the compiler's stance behind, rather than one that runs after it."""
    yield
    assert (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()) == (0, 0)
    if "torch._dynamo" in sys.modules:
        assert torch._dynamo.eval_frame._stance.stance == "default"


WAITING = {"cli", "devices", "guide", "ranks", "train"}
"""Folders whose tests wait for other processes: ranks, a browser, a run that is stopped."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the files that wait over the whole run, so that the cores have other files' work meanwhile."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    kinds: list[list[Path]] = [[], []]
    for path in files:
        kinds[path.parent.name in WAITING].append(path)
    places = {path: index / len(kind) for kind in kinds for index, path in enumerate(kind)}
    items[:] = [item for path in sorted(files, key=places.__getitem__) for item in files[path]]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a CUDA device where there is none; `tests.devices.simulate` has another one in its place."""
    backend = getattr(torch, os.environ.get("MICROBATCH_TEST_ACCELERATOR", "cuda"))
    if item.get_closest_marker("cuda") and not backend.is_available():
        pytest.skip("needs a CUDA device")
