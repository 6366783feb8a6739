"""Seconds, bytes and operations of a call, on any device."""

import contextlib
import ctypes
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode


# Operations that make the host wait for a value of the device.
_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")


@dataclass
class Spread:
    """Repeated measurements of one thing: median, quartiles and number."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The spread of at least one value."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0], 1)
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), lower, upper, len(values))


def wait_for(device: torch.device) -> None:
    """Returns when a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


def alternate(
    functions: dict[str, Callable[[], object]], device: torch.device, rounds: int, warmup: int = 1, progress=iter
) -> dict[str, list[float]]:
    """
    Seconds of several functions that take turns, so that whatever disturbs the machine disturbs all of them.

    Args:
        functions: By name.
        device: Where they work.
        rounds: How often each is measured.
        warmup: How often each runs before.
        progress: Wraps the rounds, as a progress bar does.

    Returns:
        `rounds` measurements for every name.
    """
    times = {name: [] for name in functions}
    for number in progress(range(warmup + rounds)):
        for name, function in functions.items():
            elapsed = seconds(function, device)
            if number >= warmup:
                times[name].append(elapsed)
    return times


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """
    The most memory that a call needs beyond what was in use: on a GPU as torch's allocator counts, on Linux CPUs the
    growth of the process; `None` elsewhere.
    """
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    with contextlib.suppress(OSError, AttributeError):  # not every system can trim or reset
        # What was freed before goes back to the system, or the call would find it and not seem to need it.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        function()
        return max(0, _status("VmHWM") - before)
    return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


@dataclass
class OperationCounts:
    """
    What a call asks of a device.

    Attributes:
        launches: Operations that compute or copy, each at least one kernel on a GPU; views and empty tensors are none.
        waits: Operations for whose result the host waits.
        largest: Elements of the largest tensor that was made.
        by_name: Launches by operation.
    """

    launches: int = 0
    waits: int = 0
    largest: int = 0
    by_name: dict[str, int] = field(default_factory=dict)


class _Counter(TorchDispatchMode):
    def __init__(self, counts: OperationCounts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        # Indexing with a mask of booleans is a nonzero in disguise.
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        self.counts.waits += name in _WAITS or by_mask
        if not is_view and name not in _EMPTY:
            self.counts.launches += 1
            self.counts.by_name[name] = self.counts.by_name.get(name, 0) + 1
        if not any(r.alias_info is not None for r in returns):
            results = result if isinstance(result, (list, tuple)) else [result]
            sizes = [value.numel() for value in results if isinstance(value, torch.Tensor)]
            self.counts.largest = max([self.counts.largest, *sizes])
        return result


def count_operations(function: Callable[[], object]) -> OperationCounts:
    """
    Counts what a call asks of a device, on any device.

    Copies between host and device can't be told from others on a CPU: `torch.Tensor.cpu` and `torch.tensor(...,
    device=...)` are no waits here. [`count_waits`] finds them on a GPU.
    """
    counts = OperationCounts()
    with _Counter(counts):
        function()
    return counts


def count_waits(function: Callable[[], object]) -> int | None:
    """How often the host waits for a GPU during a call, as torch tells; `None` without one."""
    if not torch.cuda.is_available():
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Lets torch use so many threads of the CPU; `None` leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(device: torch.device) -> dict[str, str | int]:
    """What a measurement has to be reported with."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in ("holitom-hf", "torch", "transformers", "av")},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"  # run from its sources


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
