"""A server under load over HTTP: are all answers right, how much faster is a crowd, who is sent away.

    python benchmarks/load.py [--seconds 120 --clients 64 --proposal FOLDER --aligners FOLDER FOLDER FOLDER]

Starts `serve.py` as a user would, with three aligners, and asks it over keep-alive connections: streamed and
not, of every aligner and of the proposal alone, with seeds of their own. Every answer must be what
`ram.decoding.generate` gives for its pair and seed. One client of an aligner, 16 of it and 16 of all models
take turns for their speed, then so many `--clients` ask for `--seconds`, each again as soon as it is
answered; last, twice as many as the server may hold come at once: as many as it holds must be served, the
others told to come again (429, Retry-After). Its figures must say afterwards that nothing is held. Without
arguments it takes the demo's models (`bash bin/demo.sh` first). The last line is one JSON object.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from exactness import DEMO, demo_run

from ram.data.prompts import render
from ram.decoding import generation
from ram.decoding.par import PARParams
from ram.errors import run_entry_point
from ram.models import checkpoints
from ram.storage.files import read_rows

ROOT = Path(__file__).resolve().parents[1]
ROWS, TEMPERATURES = 16, (1.0, 0.5)  # answers decoded at once; of aligner and proposal
Asked = tuple[str, int, int]  # model, row of the prompts, seed


class Expected:
    """The expected answer of each request, by `ram.decoding.generate`."""

    def __init__(self, proposal: str, aligners: dict[str, str], prompts: list[str], new_tokens: int) -> None:
        tokenizer, _ = checkpoints.load_pair(proposal, next(iter(aligners.values())))
        t_q, t_p = TEMPERATURES
        law = PARParams("par", temperature=t_q, top_p=0.95, repetition_penalty=1.0, base_temperature=t_p)
        model, self.prompts, self.texts = checkpoints.load_model(proposal, "auto", "cpu"), prompts, {}
        self.tokens: dict[Asked, int] = {}
        ids = [tokenizer(render(prompt)).input_ids for prompt in prompts]
        for seed, (name, path) in enumerate([("proposal", None), *aligners.items()]):
            aligner = path and checkpoints.load_model(path, "auto", "cpu")
            settings = {"max_new_tokens": new_tokens, "seed": seed, "row_ids": [0] * len(ids)}
            settings |= {"stop": ["\n\nHuman"]}
            for row, found in enumerate(generation.generate(model, aligner, tokenizer, ids, law, **settings)):
                self.texts[name, row, seed] = found.text
                self.tokens[name, row, seed] = len(found.token_ids)
        self.requests = sorted(self.texts, key=lambda asked: (asked[1], asked[0]))
        self.new_tokens = new_tokens


@contextlib.contextmanager
def served(arguments: list[str]) -> Iterator[int]:
    """The port of a server that ends when the context is left."""
    command = [sys.executable, str(ROOT / "serve.py"), *arguments, "port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"a page to talk to them: http://127.0.0.1:(\d+)/", line):
                break
        else:
            raise RuntimeError("the server did not start")
        yield int(found[1])
    finally:
        process.terminate()
        process.wait(60)


class Client:
    """One connection, kept open; as little work as possible, since clients and server share the machine."""

    def __init__(self, port: int, expected: Expected, heard: Counter, times: list[float]) -> None:
        self.port, self.expected, self.heard, self.times = port, expected, heard, times
        self.reader = self.writer = None

    async def ask(self, asked: Asked, stream: bool) -> None:
        """Sends one request and counts its outcome."""
        model, row, seed = asked
        body = {
            "model": model,
            "messages": [{"role": "user", "content": self.expected.prompts[row]}],
            "seed": seed,
            "stream": stream,
            "max_tokens": self.expected.new_tokens,
        }
        start = time.perf_counter()
        try:
            status, headers, text = await self.post(json.dumps(body).encode())
        except (OSError, EOFError, ValueError) as error:
            self.heard[f"failed: {type(error).__name__}"] += 1
            self.writer = None
            return
        if status == 429:
            self.heard["sent away" if b"retry-after" in headers.lower() else "429 without Retry-After"] += 1
            return
        if status != 200:
            self.heard[f"status {status}"] += 1
            return
        self.times.append(time.perf_counter() - start)
        right = self.text_of(text, stream) == self.expected.texts[asked]
        self.heard["right" if right else "wrong"] += 1
        self.heard["tokens"] += self.expected.tokens[asked] * right

    async def post(self, body: bytes) -> tuple[int, bytes, bytes]:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        headers = await self.reader.readuntil(b"\r\n\r\n")
        if size := re.search(rb"(?i)content-length: (\d+)", headers):
            return int(headers[9:12]), headers, await self.reader.readexactly(int(size[1]))
        parts = []
        while size := int(await self.reader.readline(), 16):
            parts.append((await self.reader.readexactly(size + 2))[:-2])
        await self.reader.readline()
        return int(headers[9:12]), headers, b"".join(parts)

    @staticmethod
    def text_of(answer: bytes, stream: bool) -> str:
        if not stream:
            return json.loads(answer)["choices"][0]["message"]["content"]
        events = [json.loads(line[6:]) for line in answer.split(b"\n") if line.startswith(b"data: {")]
        if any("error" in event for event in events):
            return "an error"
        return "".join(c["delta"].get("content", "") for event in events for c in event["choices"])


async def crowd(
    port: int, expected: Expected, clients: int, seconds: float, model: str | None = None
) -> dict:
    """So many clients that never pause, for so long; they ask for one model, or for all in turn."""
    requests = [asked for asked in expected.requests if model in (None, asked[0])]
    heard, times, turn, end = Counter(), [], itertools.count(), time.perf_counter() + seconds

    async def client() -> None:
        own = Client(port, expected, heard, times)
        while time.perf_counter() < end:
            number = next(turn)
            await own.ask(requests[number % len(requests)], stream=number % 4 < 2)
        own.writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.perf_counter() - start
    speed = heard.pop("tokens", 0) / took
    return {"heard": dict(heard), "tokens_per_second": round(speed, 1), "seconds": times}


async def flood(port: int, expected: Expected, count: int) -> dict:
    """So many requests at once, once."""
    heard, times = Counter(), []
    clients = [Client(port, expected, heard, times) for _ in range(count)]
    turns = (expected.requests[number % len(expected.requests)] for number in range(count))
    await asyncio.gather(*(each.ask(asked, False) for each, asked in zip(clients, turns, strict=False)))
    heard.pop("tokens", None)
    return dict(heard)


async def held(port: int) -> dict[str, float]:
    """The rows and requests that the server's metrics report, and its memory."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    wanted = ("ram_rows", "ram_waiting", "process_resident_memory_bytes")
    return {name: float(re.search(rf"(?m)^{name} (\S+)$", text)[1]) for name in wanted}


async def run(port: int, expected: Expected, args) -> dict:
    contenders = {"one": (1, "a"), "many": (ROWS, "a"), "mixed": (ROWS, None)}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.rounds + 1):  # the first warms up
        for name, (clients, model) in contenders.items():
            found = await crowd(port, expected, clients, args.turn, model)
            speeds[name] += [found["tokens_per_second"]] * bool(turn)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result: dict = {"tokens_per_second": medians}
    result["many_to_one"] = round(medians["many"] / medians["one"], 2)
    before = await held(port)
    found = await crowd(port, expected, args.clients, args.seconds)
    times = sorted(found.pop("seconds"))
    found["latency_ms"] = {
        name: round(1000 * times[int(share * (len(times) - 1))], 1)
        for name, share in (("median", 0.5), ("95 %", 0.95), ("worst", 1.0))
    }
    result[f"{args.clients} clients for {args.seconds:g} s"] = found
    result[f"{2 * args.clients} at once"] = [await flood(port, expected, 2 * args.clients) for _ in range(5)]
    await asyncio.sleep(1)
    after = await held(port)
    result["held"] = {"rows": after["ram_rows"], "waiting": after["ram_waiting"]}
    memory = "process_resident_memory_bytes"
    result["memory_mb"] = {"before": before[memory] / 1e6, "after": after[memory] / 1e6}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--proposal")
    parser.add_argument("--aligners", nargs=3)
    parser.add_argument(
        "--prompts", default=str(DEMO / "data/seed0/test/toy_test.json"), help="rows with `instruction`"
    )
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120, help="that so many clients ask for")
    parser.add_argument("--turn", type=float, default=6, help="seconds of a turn of one client or of 16")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    proposal = args.proposal or demo_run("wu_sft_toy_")
    demo = ("ours_sft_toy_", "sft_toy_toy-small_", "ours_sft_toy-mixture_")
    folders = args.aligners or [demo_run(pattern) for pattern in demo]
    aligners = dict(zip("abc", folders, strict=True))
    prompts = [row["instruction"] for _, row in read_rows(args.prompts, ("instruction",))]
    expected = Expected(proposal, aligners, prompts, args.new_tokens)
    t_q, t_p = TEMPERATURES
    names = ", ".join(f"{name}: {path!r}" for name, path in aligners.items())
    law = ["sample_mode=par", f"temperature={t_q}", f"base_temperature={t_p}", "top_p=0.95"]
    law = [f"sampling.{each}" for each in [*law, "repetition_penalty=1.0"]]
    # All clients have one address, which gets half of the rows and of the queue.
    limits = [f"engine.max_rows={2 * ROWS}", f"engine.max_waiting={2 * (args.clients - ROWS)}"]
    with served([f"proposal={proposal!r}", f"aligners={{{names}}}", *law, *limits]) as port:
        result = asyncio.run(run(port, expected, args))
    print(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    run_entry_point(main)
