"""A server of the completion protocol that answers each prompt in a broken or hostile way.

A prompt has the word `case=NAME`; the names are those of `ANSWERED` and `FAILED`.
"""

import asyncio
import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future

BOMB = gzip.compress(gzip.compress(bytes(1 << 30), 1), 1)  # some kB that become a gigabyte
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


def completion(text="fine", usage=None, **choice):
    answer = {"choices": [{"text": text, "finish_reason": "stop"} | choice]}
    return json.dumps(answer if usage is None else answer | {"usage": usage}).encode()


ANSWERED = {  # name -> (body, the text that must be kept)
    "half a character": (completion("a\ud83d"), "a\ufffd"),
    "halves in wrong order": (completion("\ude00b\ud83d"), "\ufffdb\ufffd"),
    "huge count": (completion(usage={"completion_tokens": 10**18}), "fine"),
    "negative count": (completion(usage={"completion_tokens": -5}), "fine"),
    "count is a text": (completion(usage={"completion_tokens": "4"}), "fine"),
    "count is true": (completion(usage={"completion_tokens": True}), "fine"),
    "usage is a list": (completion(usage=[1, 2]), "fine"),
    "reason of another kind of server": (completion(finish_reason="eos_token"), "fine"),
}
BODIES = {  # of answers that give none
    "not a number": b'{"choices": [{"text": "x"}], "usage": {"completion_tokens": NaN}}',
    "long integer": b'{"choices": [{"text": "x"}], "n": ' + b"9" * 5000 + b"}",
    "deep nesting": b"[" * 100_000,
    "cut short": b'{"choices": [{"te',
    "not UTF-8": b'{"choices": [{"text": "\xff\xfe"}]}',
    "text is a number": completion(5),
    "reason is an object": completion(finish_reason={"a": 1}),
    "stopped by a filter": completion("half an", finish_reason="content_filter"),
    "stopped without a reason": completion("half an", finish_reason=None),
    "no choice": b'{"choices": []}',
    "nothing": b"",
}
FAILED = {  # name -> part of the reason that is listed
    **dict.fromkeys(BODIES, "lacks the requested result"),
    "drip of headers": "no whole answer in",
    "drip of body": "no whole answer in",
    "silence": "no whole answer in",
    "endless body": "longer than|no whole answer in",  # what comes first
    "announced terabyte": "longer than|no whole answer in",
    "bomb": "compressed",
    "closed at once": "RemoteProtocolError|ReadError",
    "garbage": "RemoteProtocolError",
    "escapes": "400: .*owned",
}


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    if head.startswith("GET"):
        body = b'{"data": [{"id": "toy"}]}'
    else:
        length = int(re.search(r"(?i)content-length: (\d+)", head)[1])
        prompt = json.loads(await reader.readexactly(length))["prompt"]
        case = re.search(r"case=([^.]*)\.", prompt)[1]
        body = BODIES.get(case) if case in BODIES else ANSWERED.get(case, (None,))[0]
    plain = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
    if body is not None:
        writer.write(plain + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return
    if case.startswith("drip"):
        writer.write(plain + (b"" if case == "drip of headers" else b"Content-Length: 9999\r\n\r\n"))
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)
    if case == "silence":
        await asyncio.sleep(3600)
    if case in ("endless body", "announced terabyte"):
        announced = b"Content-Length: 1099511627776\r\n" if case == "announced terabyte" else b""
        writer.write(plain + announced + b"\r\n")
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()
    if case == "bomb":
        headers = f"Content-Encoding: gzip, gzip\r\nContent-Length: {len(BOMB)}\r\n\r\n"
        writer.write(plain + headers.encode() + BOMB)
    if case == "garbage":
        writer.write(b"\x00\xff" * 50 + b"\r\n\r\n")
    if case == "escapes":
        writer.write(b"HTTP/1.1 400 Bad\r\nConnection: close\r\n\r\n" + ESCAPE.encode())


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await serve(reader, writer)
        await writer.drain()
    except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
        pass  # the client has gone, or the test has ended
    finally:
        writer.close()


@contextlib.contextmanager
def running() -> Iterator[int]:
    """Run the server in a thread; the value is its port."""
    loop, port = asyncio.new_event_loop(), Future()

    async def serve_until_stopped() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=256)
        port.set_result(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    task = loop.create_task(serve_until_stopped())

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        others = asyncio.all_tasks(loop)
        for other in others:
            other.cancel()
        if others:
            loop.run_until_complete(asyncio.wait(others))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield port.result(60)
    loop.call_soon_threadsafe(task.cancel)
    thread.join(60)
