"""What every request passes before the server looks at it: who asks, from which page, with how large a body.

A page in a browser may send requests to this machine. So on loopback only names of this machine are taken as
Host (another name that resolves to it is an attack), and an Origin must be the server's own.
"""

import asyncio
import hmac
import re
import time
from urllib.parse import urlsplit

from ram.log import log
from ram.serving.metrics import Metrics
from ram.serving.protocol import ApiError
from ram.serving.responses import to_json
from ram.settings.serving import Settings, is_loopback

OPEN = {"/", "/chat.css", "/chat.js", "/health"}  # without a key
SAFE_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
HUNG_UP = 499  # counted where the client did not wait for an answer
DISCARDED = 8  # a body too large is read on to so many times the limit, so that its sender hears why


class Guard:
    """ASGI middleware around the whole application; the only place that answers what was not foreseen."""

    def __init__(self, app, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.names = {name.lower() for name in settings.config.allowed_hosts}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        began, status, whole = time.monotonic(), HUNG_UP, False

        async def counting(message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message = message | {"headers": [*message["headers"], *SAFE_HEADERS]}
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body")

        self.metrics.running += 1
        try:
            await self._pass(scope, receive, counting)
        except ApiError as error:
            await respond(error, counting)
        except asyncio.CancelledError:  # the server has waited for this one as long as it may
            if status == HUNG_UP:
                error = ApiError(503, "the server is shutting down", "shutting_down", retry_after=1)
                await respond(error, counting)
        except Exception:
            log.exception(f"{scope['method']} {scope['path'][:80]!r} failed")
            if status == HUNG_UP:
                await respond(ApiError(500, "the server failed; its log says why", "internal"), counting)
            elif not whole:
                raise  # the answer has begun: all that is left is to break it off
        finally:
            self.metrics.running -= 1
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.count(route, status, time.monotonic() - began)

    async def _pass(self, scope, receive, send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_names(headers)
        self._check_key(scope, headers)
        config = self.settings.config
        try:
            async with asyncio.timeout(config.limits.body_seconds):
                body = await read_body(headers, receive, config.limits.body_bytes)
        except TimeoutError:
            raise ApiError(408, "the request took too long to arrive", "timeout") from None
        if body is None:
            return None
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replayed():
            return next(given, None) or await receive()

        await self.app(scope, replayed, send)

    def _check_names(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "").lower()
        if is_loopback(self.settings.config.host) or self.names:
            name = re.sub(r":\d*\Z", "", host)
            if not (name in self.names or is_loopback(name) or name == self.settings.config.host):
                raise ApiError(
                    403, "this name is not one of the server's (allowed_hosts)", "host_not_allowed"
                )
        if (origin := headers.get("origin")) is not None:
            place = urlsplit(origin).netloc.lower() if "://" in origin else ""
            if not place or (place != host and re.sub(r":\d*\Z", "", place) not in self.names):
                raise ApiError(403, "pages of other origins may not ask here", "origin_not_allowed")

    def _check_key(self, scope, headers: dict[str, str]) -> None:
        path, settings = scope["path"], self.settings
        if path in OPEN and scope["method"] in ("GET", "HEAD"):
            return
        admin = path.startswith("/admin/") and settings.admin_key is not None
        wanted = settings.admin_key if admin else settings.key
        if wanted is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), wanted.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(401, "no valid key: send it as `Authorization: Bearer KEY`", "invalid_api_key")


async def read_body(headers: dict[str, str], receive, limit: int) -> bytes | None:
    """A request's whole body, None where the client hung up; raises ApiError for one above `limit` bytes."""
    parts, size = [], 0
    stated = headers.get("content-length", "0")
    too_large = ApiError(413, f"the body is larger than {limit} bytes", "body_too_large")
    if not stated.isdecimal() or len(stated) > 15 or int(stated) > DISCARDED * limit:
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


async def respond(error: ApiError, send) -> None:
    body = to_json(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
