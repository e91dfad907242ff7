"""A simulated accelerator: a device of PyTorch's own, ``sim``, whose memory is the host's.

Tensors on it have real storages, strides and views. Each operator runs on the CPU, on tensors that share the device's
memory. So results are those of the CPU, while every allocation is counted. A limit can be set, and memory ends as on a
GPU: with an error of the allocator, in backward's own thread too. Streams, events, pinned memory and random state are
the device's own, and what is done with them is written down. Nothing has to be compiled.

``Full`` has what CUDA has. ``Small`` has what MPS has: no float64, no streams, no counter of peak memory, no limit, no
pinned memory. A process has one of them, from `install` to its end.
"""

import inspect
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

C: Any = torch._C
CPU = C.DispatchKey.CPU
HOST = torch.device("cpu")
DEVICE = torch.device("privateuseone", 0)  # its name until `install`
GIB = 1 << 30
SET = torch.ops.aten.set_.source_Storage_storage_offset


class Stream(torch.Stream):
    """A stream, on which everything is done at once; what waits for what is written down."""

    def __new__(cls, _: Any = None, number: int | None = None) -> Self:
        Full.streams += number is None
        number = Full.streams if number is None else number
        return super().__new__(cls, stream_id=number, device_index=0, device_type=20)

    def __init__(self, _: Any = None, number: int | None = None) -> None:
        self.number = self.stream_id

    def wait_stream(self, stream: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        Full.log.append(("wait", self.number, stream.stream_id))

    def wait_event(self, event: Any) -> None:
        Full.log.append(("wait", self.number, event.of))

    def synchronize(self) -> None:
        Full.log.append(("synchronize", self.number))


class Event:
    """An event, which remembers the stream that it was recorded on."""

    of = -1

    def record(self, stream: Any = None) -> None:
        self.of = (stream or Full.now).stream_id


class Small:
    """The backend's module, with what every backend has."""

    live = peak = 0
    block = 1  # bytes that allocations are rounded up to; 512 of CUDA
    limit = GIB
    log: list[tuple[Any, ...]] = []  # noqa: RUF012 - of the whole process
    state = torch.Generator().get_state()
    float64 = False
    bfloat16 = True

    @classmethod
    def allocate(cls, nbytes: int) -> Any:
        """Allocate device memory; it is freed together with its last tensor."""
        taken = -(-nbytes // cls.block) * cls.block
        if cls.live + taken > cls.limit and may_raise():
            cls.log.append(("out of memory", nbytes))
            raise torch.OutOfMemoryError(f"SIM out of memory. Tried to allocate {nbytes} bytes")
        Small.live += taken
        Small.peak = max(Small.peak, Small.live)
        host = torch.empty_strided((max(nbytes, 1),), (1,), dtype=torch.uint8)
        storage = C._construct_storage_from_data_pointer(host.data_ptr(), DEVICE, nbytes)
        weakref.finalize(storage, cls.free, taken, [host]).atexit = False
        return storage

    @classmethod
    def free(cls, nbytes: int, memory: list[Tensor]) -> None:
        Small.live -= nbytes
        memory.clear()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        Small.state = torch.Generator().manual_seed(seed).get_state()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self) -> bool:
        return self.bfloat16

    def get_rng_state(self, device: Any = "sim") -> Tensor:
        return Small.state.clone()

    def set_rng_state(self, state: Tensor, device: Any = "sim") -> None:
        Small.state = state.clone()

    def synchronize(self) -> None:
        self.log.append(("synchronize",))

    def empty_cache(self) -> None:
        self.log.append(("empty_cache",))

    def current_allocated_memory(self) -> int:
        return self.live

    def recommended_max_memory(self) -> int:
        return self.limit


class Full(Small):
    """The backend's module, with what CUDA's has."""

    float64 = True
    capturing = False
    share = 1.0
    retries = 0
    streams = 0
    now: Any = None
    pinned: set[int] = set()  # noqa: RUF012 - of the whole process
    Event = Event
    Stream = Stream
    current_allocated_memory: Any = None
    recommended_max_memory: Any = None

    def synchronize(self, device: Any = None) -> None:
        self.log.append(("synchronize",))

    def memory_allocated(self, device: Any = None) -> int:
        return self.live

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.peak

    def memory_reserved(self, device: Any = None) -> int:
        return self.live

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        Small.peak = self.live

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {"num_alloc_retries": self.retries}

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.limit - self.live, GIB

    def get_per_process_memory_fraction(self, device: Any = None) -> float:
        return self.share

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        Full.share = fraction
        Small.limit = int(fraction * GIB)
        self.log.append(("limit", Small.limit))

    def get_device_name(self, device: Any = None) -> str:
        return "Simulated 1 GiB"

    def set_device(self, device: Any) -> None:
        self.log.append(("device", torch.device(device).index))

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    @contextmanager
    def device(self, device: Any) -> Generator[None]:
        self.set_device(device)
        yield

    def current_stream(self, device: Any = None) -> Any:
        return self.now

    def set_stream(self, stream: Any) -> None:
        Full.now = stream
        self.log.append(("stream", stream.stream_id))

    @contextmanager
    def stream(self, stream: Any) -> Generator[None]:
        before = self.now
        self.set_stream(stream)
        yield
        self.set_stream(before)


def install(kind: type[Small]) -> Small:
    """Register the device ``sim``, once in a process."""
    module = kind()
    BACKENDS.append(kind)
    _setup_privateuseone_for_python_backend("sim", module)
    Full.now = Stream(number=0)
    library = torch.library.Library("_", "IMPL")
    library.fallback(on_host, "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for name, function in KERNELS.items():
        aten.impl(name, function, "PrivateUse1")
    for name in METADATA:
        packet, _, overload = name.partition(".")
        kernel = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(name, lambda *args, kernel=kernel, **kwargs: kernel._op_dk(CPU, *args, **kwargs), "PrivateUse1")
    aten.impl("linear", cast_linear, "AutocastPrivateUse1")
    if kind is Full:  # pinned memory is the host's, with its addresses written down
        aten.impl("is_pinned", lambda x, device=None: x.data_ptr() in Full.pinned, "CPU", allow_override=True)
        aten.impl("_pin_memory", pin, "CPU", allow_override=True)
        aten.impl("empty.memory_format", host_empty, "CPU", allow_override=True)
        aten.impl("empty_strided", host_strided, "CPU", allow_override=True)
    LIBRARIES.extend([library, aten])
    return module


def may_raise() -> bool:
    """Return whether an error may be raised here: not in a Python hook on backward's own thread.

    Torch's guard of a device that is written in Python cannot be left while an error of Python is set, and after a hook
    it is.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    is_kernel = frame is not None and frame.f_code.co_filename == __file__
    return threading.current_thread() is threading.main_thread() or is_kernel


BACKENDS: list[type["Small"]] = []  # the one of this process
LIBRARIES: list[Any] = []  # a library that is collected takes its kernels with it


# -- tensors ----------------------------------------------------------------------------------------------------------


def tensor_of(storage: Any, dtype: torch.dtype, *, offset: int, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Make a tensor of the device from a part of a storage."""
    if dtype is torch.float64 and not BACKENDS[0].float64:
        raise TypeError("Cannot convert a SIM Tensor to float64 dtype as the SIM framework doesn't support float64")
    made = C._acc.create_empty_tensor([0], dtype)
    SET._op_dk(CPU, made, storage, offset, list(size), list(stride))
    return made


def elements(size: Sequence[int], stride: Sequence[int]) -> int:
    """Count the elements of a storage for this size and these strides."""
    return 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate a tensor on the device."""
    nbytes = elements(size, stride) * dtype.itemsize
    return tensor_of(BACKENDS[0].allocate(nbytes), dtype, offset=0, size=size, stride=stride)


def shared(tensor: Tensor) -> Tensor:
    """Return a CPU tensor that shares a device tensor's memory; a CPU tensor as it is."""
    if tensor.device.type != "sim":
        return tensor
    storage = tensor.untyped_storage()
    host = C._construct_storage_from_data_pointer(storage.data_ptr(), HOST, storage.nbytes())
    made = torch.empty_strided((0,), (1,), dtype=tensor.dtype)
    SET._op_dk(CPU, made, host, tensor.storage_offset(), list(tensor.size()), list(tensor.stride()))
    return made


# -- operators --------------------------------------------------------------------------------------------------------


def on_host(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run any operator on the CPU, on the device's memory."""
    theirs: dict[int, Tensor] = {}
    hosts: list[Tensor] = []

    def to_host(x: Any) -> Any:
        if isinstance(x, torch.device):
            return HOST if x.type == "sim" else x
        if not isinstance(x, Tensor) or x.device.type != "sim":
            return x
        # An empty tensor may be resized by an operator that writes to it.
        host = torch.empty_strided((0,), (1,), dtype=x.dtype) if tuple(x.shape) == (0,) else shared(x)
        hosts.append(host)
        theirs[id(host)] = x
        return host

    def to_device(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if (own := theirs.get(id(x))) is not None:
            if own.size() != x.size():
                resized = copied(x)
                SET._op_dk(CPU, own, resized.untyped_storage(), 0, list(x.size()), list(x.stride()))
            return own
        base = bases.get(x.untyped_storage().data_ptr())
        if base is not None:
            storage, offset = base.untyped_storage(), int(x.storage_offset())
            return tensor_of(storage, x.dtype, offset=offset, size=x.size(), stride=x.stride())
        return copied(x)

    args = tuple(as_tensors(op, args))
    with C._AutoDispatchBelowAutograd():
        here, there = _pytree.tree_map(to_host, (args, kwargs))
        if there.pop("pin_memory", None):
            return as_pinned(op(*here, **there))
        bases = {each.untyped_storage().data_ptr(): theirs[id(each)] for each in hosts if each.numel()}
        with device_random() if torch.Tag.nondeterministic_seeded in op.tags else contextless():
            out = op(*here, **there)
        return _pytree.tree_map(to_device, out)


def as_tensors(op: Any, args: Sequence[Any]) -> Iterator[Any]:
    """Make tensors of the numbers that stand where an operator takes tensors."""
    like = next((each.dtype for each in args if isinstance(each, Tensor)), torch.float32)
    for given, declared in zip(args, op._schema.arguments, strict=False):
        is_number = isinstance(given, int | float) and str(declared.type) == "Tensor"
        yield torch.scalar_tensor(given, dtype=like) if is_number else given


def copied(host: Tensor) -> Tensor:
    """Copy a CPU tensor to the device, with the same strides."""
    made = empty(host.size(), host.stride(), host.dtype)
    shared(made).copy_(host)
    return made


@contextmanager
def contextless() -> Generator[None]:
    yield


@contextmanager
def device_random() -> Generator[None]:
    """Draw random numbers from the device's own state."""
    before = torch.get_rng_state()
    torch.set_rng_state(Small.state)
    yield
    Small.state = torch.get_rng_state()
    torch.set_rng_state(before)


def new(
    size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, **how: Any
) -> Tensor:
    like = torch.empty(size, device="meta", memory_format=how.get("memory_format") or torch.contiguous_format)
    return empty(size, like.stride(), dtype or torch.get_default_dtype())


def new_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    return empty(size, stride, dtype or torch.get_default_dtype())


def copy_from(source: Tensor, target: Tensor, *_: Any, **__: Any) -> Tensor:
    if torch.float64 in {source.dtype, target.dtype} and not BACKENDS[0].float64:
        raise TypeError("Cannot convert a SIM Tensor to float64 dtype as the SIM framework doesn't support float64")
    Small.log.append(("copy", source.device.type, target.device.type, source.nbytes))
    with C._AutoDispatchBelowAutograd():
        shared(target).copy_(shared(source))
    return target


def item(tensor: Tensor) -> Any:
    Small.log.append(("read",))
    return shared(tensor).item()


def convolution(*args: Any) -> Tensor:
    return on_host(torch.ops.aten.convolution.default, *args)


def convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    return on_host(torch.ops.aten.convolution_backward.default, gradient, x, weight, None, *rest)


def record_stream(tensor: Tensor, stream: Any) -> None:
    Small.log.append(("record_stream", stream.stream_id))


def cast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = torch.get_autocast_dtype("sim")
    with C._ExcludeDispatchKeyGuard(C.DispatchKeySet(C.DispatchKey.AutocastPrivateUse1)):
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def pin(x: Tensor, device: Any = None) -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    made.copy_(x)
    return as_pinned(made)


def as_pinned(host: Tensor) -> Tensor:
    """Write down the address of a host tensor as pinned, until the tensor is freed."""
    address = host.data_ptr()
    Full.pinned.add(address)
    weakref.finalize(host.untyped_storage(), Full.pinned.discard, address).atexit = False
    Small.log.append(("pin", host.nbytes))
    return host


def host_empty(
    size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, **how: Any
) -> Tensor:
    like = torch.empty(size, device="meta", memory_format=how.get("memory_format") or torch.contiguous_format)
    return host_strided(size, like.stride(), dtype, pin_memory=pin_memory)


def host_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    """Allocate host memory without the kernels that this module replaces."""
    dtype = dtype or torch.get_default_dtype()
    made = torch.frombuffer(bytearray(dtype.itemsize), dtype=dtype)
    SET._op_dk(CPU, made, torch.UntypedStorage(elements(size, stride) * dtype.itemsize), 0, list(size), list(stride))
    return as_pinned(made) if pin_memory else made


KERNELS = {
    "empty.memory_format": new,
    "empty_strided": new_strided,
    "_copy_from": copy_from,
    "_local_scalar_dense": item,
    "convolution_overrideable": convolution,
    "convolution_backward_overrideable": convolution_backward,
    "record_stream": record_stream,
}
# These only make another view of a storage, so the CPU's kernels do it.
METADATA = (
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
)
