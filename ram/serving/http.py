"""The HTTP server around an ASGI application: listening, bounds on connections, a graceful shutdown.

uvicorn bounds neither the number of connections nor the time that the head of a request may take, and has no
public way to add such bounds. `Connection` therefore uses private parts of uvicorn's protocol class. No other
module does. `tests/serving/test_http.py` fails if uvicorn is upgraded, so that the class is read again.
"""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ram.errors import UserError
from ram.log import log
from ram.settings.serving import Settings

CHECKED_VERSION = "0.54.0"  # of uvicorn, whose private parts `Connection` was written for
UNLIMITED = 1 << 30  # connections


class Seldom(logging.Filter):
    """Lets a few lines a minute through: clients without a key must not fill the log."""

    most, seconds = 10, 60.0

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.count = time.monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self.begin > self.seconds:
            self.begin, self.count = now, 0
        self.count += 1
        if self.count == self.most:
            record.msg = f"{record.getMessage()} (further lines of this kind are left out for a minute)"
            record.args = ()
        return self.count <= self.most


class Connection(H11Protocol):
    """A uvicorn connection that is closed if the head of a request does not arrive in time.

    A connection beyond `max_connections` is closed at once: otherwise a client could keep all others out by
    opening many connections and sending nothing. Private parts used: `connections`, `cycle`, `loop`,
    `timeout_keep_alive_handler`.
    """

    head_seconds = 30.0
    max_connections = UNLIMITED
    deadline: asyncio.TimerHandle | None = None  # when the next head must have arrived

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._start_deadline()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel_deadline()
        elif self.deadline is None:
            # The next head begins, or the body continues although its request was already answered.
            self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)

    def _start_deadline(self) -> None:
        self.deadline = self.loop.call_later(self.head_seconds, self.timeout_keep_alive_handler)

    def _cancel_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


class Server(uvicorn.Server):
    """A uvicorn server that logs when it listens, and finishes running requests on SIGTERM or Ctrl-C.

    A second signal stops it at once. The exit code is 0 in both cases.
    """

    banner = ""  # lines to log once the server listens

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            for line in self.banner.splitlines():
                log.info(line)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def stop(self, number: int) -> None:
        """Stop after the running requests, or at once if already told to stop."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        log.info(f"{signal.Signals(number).name}: running requests are finished, new ones are rejected")


def listen(settings: Settings) -> socket.socket:
    """Bind the socket to serve on.

    Raises:
        UserError: If this machine does not have the address, or the port is taken.
    """
    host, port = settings.config.host.strip("[]"), settings.config.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Naming the protocol lets asyncio turn off Nagle's algorithm, which delays pieces of a stream by 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # A client that does not read its answer would otherwise keep its connection forever.
        milliseconds = min(int(1000 * settings.config.limits.seconds), (1 << 31) - 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}, port {port} ({error.strerror}); set host or port"
        ) from None
    return listener


def url_of(settings: Settings, port: int) -> str:
    """The URL of the server; an IPv6 address gets its brackets."""
    host = settings.config.host
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"http://{host}:{port}"


def make_server(
    app: ASGIApp, shutdown_seconds: float, banner: str = "", head_seconds: float = 30.0
) -> Server:
    """Make a server for an application.

    Args:
        app: The ASGI application.
        shutdown_seconds: How long running requests may take once the server is told to stop.
        banner: Lines to log once the server listens.
        head_seconds: How long the head of a request may take to arrive.
    """
    max_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    max_connections = max_files // 2 if max_files != resource.RLIM_INFINITY else UNLIMITED
    bounds = {"head_seconds": head_seconds, "max_connections": max_connections}
    server = Server(
        uvicorn.Config(
            app,
            http=type("Connection", (Connection,), bounds),
            backlog=min(max_connections // 4 + 1, 2048),  # accepted together, before any of them is counted
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # `Guard` reads them, if the settings name the proxy
            server_header=False,
            timeout_graceful_shutdown=max(int(shutdown_seconds), 1),
        )
    )
    server.banner = banner
    logging.getLogger("uvicorn.error").filters[:] = [Seldom()]
    return server


def run_server(server: Server, listener: socket.socket) -> None:
    """Serve on a bound socket until the server is told to stop."""
    asyncio.run(server.serve(sockets=[listener]))
