"""The HTTP server: bounds on idle, slow and too many connections, and the uvicorn version they rely on."""

import asyncio
import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import uvicorn
from served import eventually, healthy
from uvicorn.protocols.http.h11_impl import H11Protocol

from ram.serving import http

LARGE = 16 << 20  # bytes


def test_uvicorn_is_the_version_that_the_adapter_was_written_for():
    """On an upgrade: read `ram.serving.http.Connection` beside uvicorn's class, then change both versions."""
    assert uvicorn.__version__ == http.CHECKED_VERSION
    for name in ("connection_made", "data_received", "connection_lost", "timeout_keep_alive_handler"):
        assert callable(getattr(H11Protocol, name))


@contextlib.contextmanager
def small_server(**bounds: float) -> Iterator[tuple[str, int]]:
    """The address of a server without models, in a process that may open 40 files."""

    async def app(scope, receive, send):
        await asyncio.sleep(0.6 if scope["path"] == "/slow" else 0)
        body = b"ok" if scope["path"] != "/large" else bytes(LARGE)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resource, "getrlimit", lambda kind: (40, 40))
        server = http.make_server(app, 1, **bounds)
    limits = SimpleNamespace(seconds=1)
    listener = http.listen(SimpleNamespace(config=SimpleNamespace(host="127.0.0.1", port=0, limits=limits)))
    thread = threading.Thread(target=http.run_server, args=(server, listener))
    thread.start()
    try:
        eventually(lambda: server.started)
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def is_closed(connection: socket.socket) -> bool:
    """Read to the end of a connection, which the server must close."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(1000):
            pass
    return True


@pytest.mark.parametrize("start", ["", "GET / HT", "GET / HTTP/1.1\r\nHost:", "POST"])
def test_connection_without_a_whole_request_head_is_closed(start):
    """This includes a later request and a body that continues after its answer.

    A connection whose request is being answered stays open.
    """
    request = "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
    if start == "POST":
        start, request = "", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(small_server(head_seconds=0.3))
        idle, active = (stack.enter_context(socket.create_connection(address, 5)) for _ in range(2))
        idle.sendall(start.encode())
        active.sendall(request.encode())
        assert is_closed(idle)
        assert b"200 OK" in active.recv(1000)
        deadline = time.monotonic() + 3  # earlier than uvicorn's own limit of five seconds
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                active.sendall(b"G")
                time.sleep(0.05)


def test_connection_that_does_not_read_its_answer_is_closed():
    """The part of a large answer that is in the system's buffers arrives; the rest is dropped."""
    with contextlib.ExitStack() as stack:
        address, reader = stack.enter_context(small_server()), stack.enter_context(socket.socket())
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(5)
        reader.connect(address)
        reader.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(2.5)
        n_bytes = 0
        with pytest.raises(ConnectionError):
            while n_more := len(reader.recv(1 << 20)):
                n_bytes += n_more
        assert 0 < n_bytes < LARGE


def test_connections_beyond_the_limit_are_closed():
    """As soon as another connection is closed, a new one is accepted."""
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(small_server())
        connections = []
        for _ in range(20):
            connections.append(stack.enter_context(socket.create_connection(address, 5)))
            time.sleep(0.01)
        with socket.create_connection(address, 5) as one_more:
            assert is_closed(one_more)
        connections[0].close()
        eventually(lambda: healthy("http://{}:{}".format(*address)))
