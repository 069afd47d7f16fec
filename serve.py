"""Serves one frozen proposal with any number of aligners over OpenAI's protocol, or talks to them in a
terminal.

    python serve.py proposal=FOLDER aligners='{helpful: FOLDER, harmless: FOLDER}'
    python serve.py chat proposal=FOLDER aligner=FOLDER
    python serve.py worker proposal=FOLDER aligner=FOLDER worker.controller=URL     for FastChat
    python serve.py --help                                                          every key

config/serve.yaml has every key with a comment.
"""

import asyncio
import contextlib
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ram.errors import UserError, nearest, run_entry_point
from ram.log import log, setup_logging
from ram.serving import terminal
from ram.serving.api import create_app
from ram.serving.fastchat import worker as fastchat_worker
from ram.serving.registry import Models
from ram.settings import compose, serving
from ram.settings.serving import Settings

MODES = ("serve", "chat", "worker", "fastchat")


class Connection(H11Protocol):
    """uvicorn's connection, which is closed where a request's head does not come within `seconds`, and at
    once where there are `most` others: who opens many and says nothing would keep everybody else out.
    """

    seconds, most = 30.0, 1 << 30
    due: asyncio.TimerHandle | None = None  # when a request must be there

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self.due = self.loop.call_later(self.seconds, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cancel_due()
        elif self.due is None:  # another head begins, or a body goes on whose request was refused
            self.due = self.loop.call_later(self.seconds, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self.cancel_due()
        super().connection_lost(exc)

    def cancel_due(self) -> None:
        if self.due is not None:
            self.due.cancel()
            self.due = None


class Server(uvicorn.Server):
    """uvicorn's server, which says when it listens, and ends in peace (exit code 0) after SIGTERM or Ctrl-C:
    what runs is finished.
    """

    said = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for line in self.said.splitlines() if self.started else ():
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
        if self.should_exit:
            self.force_exit = True  # told twice: at once
            return
        log.info(f"{signal.Signals(number).name}: what runs is finished, nothing new is taken")
        self.should_exit = True


def listen(settings: Settings) -> socket.socket:
    """The socket to serve on; raises UserError for a host that this machine has not, or a port that is
    taken.
    """
    host, port = settings.config.host.strip("[]"), settings.config.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named TCP, for asyncio to turn Nagle's algorithm off: pieces of a stream would wait 40 ms each.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Whoever reads no answer for so long loses the connection, which would stay for ever.
        patience = min(1000 * settings.config.limits.seconds, (1 << 31) - 1)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UserError(
            f"cannot listen on {host}, port {port} ({error.strerror}); set host or port"
        ) from None
    return found


def url_of(settings: Settings, port: int) -> str:
    host = settings.config.host
    return f"http://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"http://{host}:{port}"


def make_server(app, seconds: float, said: str = "", arrival: float = 30.0) -> Server:
    """A server of an application; told to stop, it lets what runs take so many seconds more.

    said: lines to log once it listens. arrival: seconds that the head of a request may take to come.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = files // 2 if files != resource.RLIM_INFINITY else Connection.most
    server = Server(
        uvicorn.Config(
            app,
            http=type("Connection", (Connection,), {"seconds": arrival, "most": most}),
            backlog=min(most // 4 + 1, 2048),  # so many are let in before any of them is counted
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(int(seconds), 1),
        )
    )
    server.said = said
    return server


def run_server(server: Server, found: socket.socket) -> None:
    """Serves until somebody tells the server to stop."""
    asyncio.run(server.serve(sockets=[found]))


def serve(settings: Settings, worker: bool = False) -> None:
    """Runs the server, or FastChat's worker, until SIGTERM or Ctrl-C."""
    (fastchat_worker.check_exposure if worker else serving.check_exposure)(settings)
    found = listen(settings)  # before the models: a port that is taken shows at once
    with contextlib.closing(found):
        url, config = url_of(settings, found.getsockname()[1]), settings.config
        times = {"seconds": config.shutdown_seconds, "arrival": config.limits.body_seconds}
        models = Models(settings)
        try:
            said = f"{models.proposal} with {', '.join(settings.aligners) or 'no aligners'} at {url}"
            if worker:
                with fastchat_worker.registered(models, url) as app:
                    run_server(make_server(app, said=said, **times), found)
            else:
                said += f"\na page to talk to them: {url}/  OpenAI's protocol: {url}/v1"
                run_server(make_server(create_app(models), said=said, **times), found)
        finally:
            models.engine.close(wait=False)
    log.info("stopped")


def main(arguments: Sequence[str]) -> None:
    mode, rest = (
        (arguments[0], arguments[1:]) if arguments[:1] and "=" not in arguments[0] else ("serve", arguments)
    )
    if mode in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\n{compose.manual('serve')}")
        return
    if mode not in MODES:
        raise UserError(f"{mode!r}: expected key=value or one of {nearest(mode, MODES)}")
    if mode == "fastchat":
        fastchat_worker.run_fastchat(rest)
        return
    settings = serving.read_settings(rest)
    if mode == "chat":
        terminal.check_streams()
        terminal.run(Models(settings))
    else:
        serve(settings, worker=mode == "worker")


if __name__ == "__main__":
    setup_logging()
    run_entry_point(lambda: main(sys.argv[1:]))
