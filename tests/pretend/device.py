"""The pretend device in this process: `install` before anything imports torch. Where CUDA's own Python code can run, it does."""

import contextlib
import ctypes
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_PACKAGE = f"{Path(__file__).parents[2] / 'crepatrain'}/"
_GIB = 1 << 30
TOTAL = 24 * _GIB
_Listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)


class Device:
    """What the device has seen.

    Attributes:
        seen: while `watching`, how often each thing happened: its kind, what it was, and the line of the package that caused it.
            Kinds: wait (the host waits for all that is queued), event (it waits for an event), copy (of pinned memory, not waited
            for).
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        self._library.device_live.restype = self._library.device_peak.restype = ctypes.c_int64
        self._library.device_limit.argtypes = [ctypes.c_int64]
        self._listener = _Listener(lambda kind, what: self.saw(kind.decode(), what.decode()))
        self._library.device_listen(self._listener)
        self._library.device_install()
        self.seen: Counter[tuple[str, str, str]] = Counter()
        self.watching = False

    def saw(self, kind: str, what: str) -> None:
        """Count something, if it is watched."""
        if self.watching:
            lines = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE)]
            where = f"{lines[-1].filename.removeprefix(_PACKAGE)}:{lines[-1].lineno}" if lines else "backward"
            self.seen[kind, what, where] += 1

    @property
    def live(self) -> int:
        """Bytes in use."""
        return self._library.device_live()

    @property
    def peak(self) -> int:
        """Most bytes that were in use at once, since it was last forgotten."""
        return self._library.device_peak()

    def forget_peak(self) -> None:
        """Begin to measure the peak again."""
        self._library.device_forget_peak()

    def limit(self, size: int) -> None:
        """Let no more bytes than these be in use; 0: no limit."""
        self._library.device_limit(size)


def _event_class(device: Device) -> type:
    class Event:
        """Of a device that has always done its work."""

        def __init__(self, enable_timing: bool = False, **_options: Any) -> None:
            self._timed, self._at = enable_timing, None

        def record(self, _stream: Any = None) -> None:
            self._at = time.perf_counter()

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            assert self._at is not None, "waits for an event that was not recorded"
            device.saw("event", "synchronize")

        def elapsed_time(self, later: "Event") -> float:
            assert self._timed
            assert later._timed
            assert self._at is not None
            assert later._at is not None
            return 1000 * (later._at - self._at)

    return Event


def _stream_class(pretend: Device, event_class: type, where: Any) -> type:
    class Stream:
        """The only one."""

        device, cuda_stream = where, 0

        def __init__(self, *_arguments: Any, **_options: Any) -> None: ...

        def synchronize(self) -> None:
            pretend.saw("wait", "synchronize")

        def wait_event(self, event: Any) -> None: ...

        def wait_stream(self, stream: "Stream") -> None: ...

        def record_event(self, event: Any = None) -> Any:
            event = event or event_class()
            event.record()
            return event

    return Stream


def install(library: Path) -> Device:
    """Make torch believe in one CUDA device, for the rest of this process."""
    device = Device(library)  # before torch is imported, which looks for devices

    import torch

    def memory(_device: int) -> dict[str, Any]:
        sizes = {"current": device.live, "peak": device.peak}
        return {f"{kind}_bytes": {"all": sizes} for kind in ("allocated", "reserved", "active", "requested")}

    properties = SimpleNamespace(
        name="pretend", total_memory=TOTAL, major=9, minor=0, multi_processor_count=128, gcnArchName="", is_integrated=False
    )
    inner: dict[str, Any] = {
        "init": lambda: None,
        "getDeviceCount": lambda: 1,
        "getDevice": lambda: 0,
        "setDevice": lambda _device: None,
        "isInBadFork": lambda: False,
        "synchronize": lambda: device.saw("wait", "synchronize"),
        "emptyCache": lambda: None,
        "memoryStats": memory,
        "resetPeakMemoryStats": lambda _device: device.forget_peak(),
        "isCurrentStreamCapturing": lambda: False,
        "getCurrentRawStream": lambda _device: 0,
        "getArchFlags": lambda: "sm_90",
    }
    for name, function in inner.items():
        setattr(torch._C, f"_cuda_{name}", function)

    event_class = _event_class(device)
    stream_class = _stream_class(device, event_class, torch.device("cuda", 0))
    stream = stream_class()

    @contextlib.contextmanager
    def unchanged(_which: Any = None) -> Iterator[None]:
        yield

    outer: dict[str, Any] = {
        "_initialized": True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "default_generators": (torch.default_generator,),
        "get_device_properties": lambda _device=None: properties,
        "mem_get_info": lambda _device=None: (TOTAL - device.live, TOTAL),
        "Event": event_class,
        "current_stream": lambda _device=None: stream,
        "default_stream": lambda _device=None: stream,
        "Stream": stream_class,
        "stream": unchanged,
        "_exchange_device": lambda _device: 0,
        "_maybe_exchange_device": lambda _device: 0,
    }
    for name, thing in outer.items():
        setattr(torch.cuda, name, thing)
    # It takes a stream of CUDA's own class.
    torch.Tensor.record_stream = lambda _tensor, _stream: None  # type: ignore[method-assign]
    assert torch.cuda.is_available()
    return device
