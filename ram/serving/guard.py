"""Checks that every request must pass first: key, host, origin, and the size of the body.

Any web page that is open in a browser can send requests to this machine. On loopback the Host header must
therefore name this machine (any other name that resolves to it is an attack), and an Origin must be the
server's own.
"""

import asyncio
import hmac
import ipaddress
import re
import time
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ram.log import log
from ram.serving.metrics import Metrics
from ram.serving.protocol import ApiError
from ram.serving.responses import to_json
from ram.settings.serving import Settings, is_loopback

OPEN = {"/", "/chat.css", "/chat.js", "/health"}  # paths that need no key
SAFE_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
HUNG_UP = 499  # the status that is counted if the client disconnects before its answer
FREE_BYTES = 1 << 16  # a refused request with a larger body is answered after a pause
REFUSED_PER_SECOND = 1 << 20  # bytes of refused bodies that a connection can send
DISCARDED = 8  # an oversized body is read up to this many times the limit, so that its sender gets the error


def _plain(address: str) -> str:
    """Return an address; one of IPv4 without the prefix that a socket of both versions gives it."""
    return address[7:] if re.fullmatch(r"::ffff:[\d.]+", address, re.IGNORECASE) else address


class Guard:
    """ASGI middleware around the whole application, which also answers unexpected exceptions."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.names = {name.lower() for name in settings.config.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        if scope["method"] == "HEAD":  # the server itself leaves the body out
            scope = {**scope, "method": "GET"}
        begin, status, complete = time.monotonic(), HUNG_UP, False

        async def send_and_note(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                await pause_if_refused(message["status"], scope)
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *SAFE_HEADERS]}
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body")

        self.metrics.running.inc()
        try:
            await self._check_and_run(scope, receive, send_and_note)
        except ApiError as error:
            await respond(error, send_and_note)
        except asyncio.CancelledError:  # the server is stopping, and shutdown_seconds are over
            if status == HUNG_UP:
                error = ApiError(503, "the server is shutting down", "shutting_down", retry_after=1)
                await respond(error, send_and_note)
        except Exception:
            log.exception(f"{scope['method']} {scope['path'][:80]!r} failed")
            if status == HUNG_UP:
                failure = ApiError(500, "the server failed; its log says why", "internal")
                await respond(failure, send_and_note)
            elif not complete:
                raise  # the answer has begun, so closing the connection is the only way to report this
        finally:
            self.metrics.running.dec()
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.count(route, status, time.monotonic() - begin)

    async def _check_and_run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, read its body, and pass both on to the application."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_host(headers)
        self._check_key(scope, headers)
        scope["ram.client"] = self._client(scope, headers)
        config = self.settings.config
        try:
            async with asyncio.timeout(config.limits.body_seconds):
                body = await read_body(headers, receive, config.limits.body_bytes)
        except TimeoutError:
            raise ApiError(408, "the request took too long to arrive", "timeout") from None
        if body is None:
            return
        scope["ram.body_bytes"] = len(body)
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_read_body() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, receive_read_body, send)

    def _check_host(self, headers: dict[str, str]) -> None:
        """Raise ApiError if the Host is not this server's, or the Origin is another page's."""
        host = headers.get("host", "").lower()
        if is_loopback(self.settings.config.host) or self.names:
            name = re.sub(r":\d*\Z", "", host)
            if not (name in self.names or is_loopback(name) or name == self.settings.config.host):
                text = "the Host header does not name this server (allowed_hosts)"
                raise ApiError(403, text, "host_not_allowed")
        if (origin := headers.get("origin")) is not None:
            source = urlsplit(origin).netloc.lower() if "://" in origin else ""
            if not source or (source != host and re.sub(r":\d*\Z", "", source) not in self.names):
                raise ApiError(403, "requests from pages of other origins are rejected", "origin_not_allowed")

    def _client(self, scope: Scope, headers: dict[str, str]) -> str:
        """Return who sends a request: its peer, or whom a trusted proxy forwards; IPv6 by its network."""
        peer = _plain((scope.get("client") or ("?",))[0])
        forwarded = [_plain(name.strip()) for name in headers.get("x-forwarded-for", "").split(",")]
        while peer in map(_plain, self.settings.config.trusted_proxies) and forwarded and forwarded[-1]:
            peer = forwarded.pop()
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return peer[:64]
        return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else peer

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raise ApiError if the path needs a key and the request does not have it."""
        path, settings = scope["path"], self.settings
        if path in OPEN and scope["method"] in ("GET", "HEAD"):
            return
        admin = path.startswith("/admin/") and settings.admin_key is not None
        key = settings.admin_key if admin else settings.key
        if key is None:
            return
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        valid = hmac.compare_digest(credentials.strip().encode("latin-1"), key.encode())
        if scheme.lower() != "bearer" or not valid:
            raise ApiError(401, "no valid key: send it as `Authorization: Bearer KEY`", "invalid_api_key")


async def pause_if_refused(status: int, scope: Scope) -> None:
    """Wait before a large body's refusal is sent.

    Refusing costs little, so clients that repeat such requests at full speed would keep the interpreter busy
    with reading JSON, and everybody's tokens would wait for it.
    """
    size = scope.get("ram.body_bytes", 0)
    if 400 <= status < 500 and size > FREE_BYTES:
        await asyncio.sleep(size / REFUSED_PER_SECOND)


async def read_body(headers: dict[str, str], receive: Receive, limit: int) -> bytes | None:
    """Read the whole body of a request.

    Starlette's own limit answers in plain text and closes the connection while the client still sends; many
    clients then report a broken connection. This function drains moderately oversized bodies first.

    Returns:
        The body, or None if the client disconnected.

    Raises:
        ApiError: If the body has more than `limit` bytes.
    """
    parts, size = [], 0
    length = headers.get("content-length", "0")
    too_large = ApiError(413, f"the body is larger than {limit} bytes", "body_too_large")
    if not length.isdecimal() or len(length) > 15 or int(length) > DISCARDED * limit:
        raise too_large
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size += len(message.get("body", b""))
        if size <= limit:
            parts.append(message.get("body", b""))
        if not message.get("more_body") or size > DISCARDED * limit:
            break
    if size > limit:
        raise too_large
    return b"".join(parts)


async def respond(error: ApiError, send: Send) -> None:
    """Send an error as the whole answer."""
    body = to_json(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
