"""A cable between a client and a Redis server that a test can tamper with."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class Proxy:
    """Passes on what comes, to whichever server ``port`` names by then.

    A reply that begins with ``swallow`` is lost, once: the server has carried out the command, and
    the connection ends without an answer. ``lost`` counts them.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.swallow: bytes | None = None
        self.lost = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.close()
        self._thread.join()
        self._listener.close()
        self._stopped.close()

    def switch(self, port: int) -> None:
        """From now on another server is at this address."""
        self.port = port
        self._stop.send(b"x")

    def _serve(self) -> None:
        ends: dict[socket.socket, socket.socket] = {}
        servers: set[socket.socket] = set()

        def hang_up(end: socket.socket) -> None:
            for one in (end, ends.pop(end)):
                ends.pop(one, None)
                servers.discard(one)
                one.close()

        while True:
            ready, _, _ = select.select([self._listener, self._stopped, *ends], [], [])
            if self._stopped in ready:
                said = self._stopped.recv(1)
                while ends:
                    hang_up(next(iter(ends)))
                if not said:
                    return
                continue
            for end in ready:
                if end is self._listener:
                    client, _ = end.accept()
                    try:
                        server = socket.create_connection(("127.0.0.1", self.port))
                    except OSError:
                        client.close()
                        continue
                    ends[client], ends[server] = server, client
                    servers.add(server)
                elif end in ends:
                    data = b""
                    with contextlib.suppress(OSError):
                        data = end.recv(65536)
                    swallowed = self.swallow
                    if end in servers and swallowed is not None and data.startswith(swallowed):
                        self.swallow = None
                        self.lost += 1
                        data = b""
                    try:
                        if data:
                            ends[end].sendall(data)
                    except OSError:
                        data = b""
                    if not data:
                        hang_up(end)
