"""The processes of one run: when one ends, the others learn of it and end too, whatever they wait for."""

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from crepatrain.errors import DivergedError, UserError
from crepatrain.stopping import Stopped

# Seconds that a process has to end by itself when another one has. A launcher ends it by force after 30.
_GRACE = 10.0
# Seconds in which a collective that failed is explained by the end of another process.
_EXPLAINED = 3.0
_SILENT = "it ended without a word"


@dataclass(frozen=True)
class Loss:
    """A process that has ended before the run did, and its last words."""

    process: int
    reason: str


class Companions:
    """Within the context each process holds a connection to the first one, which the system closes however a process ends.

    Args:
        at_loss: called in the first of the processes that are left: writes down what happened, and gives it as an error.
        say: prints that error where this process hangs and can't raise it.
    """

    def __init__(self, accelerator: Accelerator, at_loss: Callable[[Loss], UserError], say: Callable[[UserError], None]) -> None:
        self._rank, self._world = accelerator.process_index, accelerator.num_processes
        self._at_loss, self._say = at_loss, say
        self._loss: Loss | None = None
        self._known, self._left = threading.Event(), threading.Event()
        self._others: dict[int, socket.socket] = {}

    def __enter__(self) -> "Companions":
        if self._world > 1:
            self._connect()
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._send({"done": error is None or isinstance(error, Stopped), "process": self._rank, "reason": _words(error)})
        if isinstance(error, UserError | DivergedError) and self._rank:
            error.reported = True  # by the first process, as its own or as this one's

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Within it an exchange that fails because another process ended says so.

        Raises:
            UserError: another process ended.
        """
        try:
            yield
        except RuntimeError as error:
            if self._world == 1 or not self._known.wait(_EXPLAINED):
                raise
            assert self._loss
            told = self._at_loss(self._loss) if self._speaks else UserError(f"process {self._loss.process} ended", "see above")
            if self._speaks and self._rank:  # the command line lets the first process speak
                self._say(told)
            told.reported = self._rank > 0
            raise told from error

    @property
    def _speaks(self) -> bool:
        """Whether it is for this process to say what happened: the first one says of itself what it can."""
        assert self._loss
        return self._rank == 0 or (self._rank == 1 and self._loss == Loss(0, _SILENT))

    def _connect(self) -> None:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        token = secrets.token_hex(16)
        server = None
        if self._rank == 0:
            here = host in {"localhost", "127.0.0.1"}
            server = socket.create_server(("127.0.0.1" if here else "", 0), backlog=self._world)
        where = [server.getsockname()[1] if server else 0, token]
        broadcast_object_list(where)
        if server is None:
            connection = socket.create_connection((host, where[0]), timeout=60)
            connection.settimeout(None)
            connection.sendall(_line({"token": where[1], "process": self._rank}))
            self._others[0] = connection
        else:
            with server:
                while len(self._others) < self._world - 1:
                    connection, _ = server.accept()
                    hello = _read_line(connection)
                    if hello and hello.get("token") == token:
                        self._others[int(hello["process"])] = connection
        for connection in self._others.values():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that is gone closes nothing
            for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)

    def _listen(self) -> None:
        """Wait until a process ends that should not; if this one then hangs, end it."""
        with selectors.DefaultSelector() as waiting:
            for rank, connection in self._others.items():
                waiting.register(connection, selectors.EVENT_READ, rank)
            while waiting.get_map() and not self._loss:
                for key, _ in waiting.select():
                    said = _read_line(key.fileobj) or {"done": False, "process": key.data, "reason": _SILENT}
                    waiting.unregister(key.fileobj)
                    if not said["done"] and not self._loss:
                        self._loss = Loss(int(said["process"]), str(said["reason"]))
        if self._loss is None:
            return
        self._known.set()
        if self._rank == 0:
            self._send({"done": False, "process": self._loss.process, "reason": self._loss.reason})
        if not self._left.wait(_GRACE):
            if self._speaks:
                self._say(self._at_loss(self._loss))
            os._exit(1)

    def _send(self, message: Mapping[str, Any]) -> None:
        for connection in self._others.values():
            with contextlib.suppress(OSError):
                connection.sendall(_line(message))


def _words(error: BaseException | None) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0] if error else ""


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read_line(connection: Any) -> dict[str, Any] | None:
    """The next message; None where the connection is closed."""
    content = b""
    try:
        while not content.endswith(b"\n"):
            piece = connection.recv(1)
            if not piece:
                return None
            content += piece
        return json.loads(content)
    except (OSError, ValueError):
        return None
