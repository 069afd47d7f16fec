"""How long a small request waits while another client attacks the server.

    python benchmarks/fairness.py [--proposal FOLDER --aligner FOLDER] [--turns 20]

Starts `serve.py` as a user would. A client at 127.0.0.1 sends the requests of one attack again and again,
each as soon as the one before is answered, or when a refusal (429) tells it to. Meanwhile a client at
127.0.0.2 asks for 8 tokens, 20 times; before each attack it asks as often in quiet. Without arguments the
pair has the sizes of the toy pair and random weights. The last line is one JSON object; the exit code is 1
if an attack makes the median more than 5 times as long.
"""

import argparse
import http.client
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from load import served

from ram.data.toy_world import build_world
from ram.models import checkpoints

MOST = 5.0  # times the quiet median
ATTACKER, PROBE = "127.0.0.1", "127.0.0.2"
WORLD = {"entities": 60, "general_rows": 10, "aligned_rows": 10}
WORLD |= {"general_styles": {"terse": 1.0}, "mixture_styles": {"terse": 1.0}}
SIZES = {"proposal": (128, 384, 4), "aligner": (56, 144, 2)}  # hidden, intermediate, layers
USER = {"role": "user", "content": "Tell me the dish."}
SMALL = {"model": "aligner", "messages": [USER], "max_tokens": 8, "temperature": 1.0, "seed": 0}
MEGABYTE = 1_000_000  # characters; the server takes bodies of 1,048,576 bytes


def turns(count: int, characters: int) -> list[dict[str, str]]:
    """Return a dialogue of an even number of long turns, each of so many characters, and a short question."""
    text = ("the dish of a town " * (1 + characters // 19))[:characters]
    return [*({"role": ("user", "assistant")[i % 2], "content": text} for i in range(count)), USER]


def attacks() -> dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]]:
    """Return name -> (connections, requests as path and body, which the connections take in turn)."""
    chat, many = "chat/completions", [USER | {"content": "hi"}] * 25_000
    long, logprobs = SMALL | {"max_tokens": 48}, {"logprobs": 20, "max_tokens": 40}
    return {
        "2 dialogues of 1 MB": (2, [(chat, SMALL | {"messages": turns(20, MEGABYTE // 21)})]),
        "2 words of 1 MB": (2, [(chat, SMALL | {"messages": [USER | {"content": "a" * MEGABYTE}]})]),
        "2 dialogues of 17,000 turns": (2, [(chat, SMALL | {"messages": turns(17_000, 12)})]),
        "4 lists of 25,000 messages": (
            4,
            [(chat, {"model": "nobody", "messages": many}), (chat, SMALL | {"messages": [1] * 25_000})],
        ),
        "20 requests with n=16": (20, [(chat, long | {"n": 16})]),
        "6 requests of 16 prompts with 20 log-probabilities": (
            6,
            [("completions", {"model": "aligner", "prompt": ["Tell me"] * 16, **logprobs})],
        ),
    }


def ask(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, float]:
    """Send a request and read its answer; return the status and the seconds of Retry-After."""
    connection.request("POST", f"/v1/{path}", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    return response.status, float(response.headers.get("Retry-After", 0))


def connect(port: int, address: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=600, source_address=(address, 0))


def attack(port: int, name: str, begun: Any, stop: Any, statuses: Any) -> None:
    """Send an attack's requests until `stop` is set. Runs in a process of its own."""
    count, requests = attacks()[name]
    bodies = [(path, json.dumps(body).encode()) for path, body in requests]
    heard: Counter = Counter()

    def keep_asking(number: int) -> None:
        connection = connect(port, ATTACKER)
        while not stop.is_set():
            try:
                status, pause = ask(connection, *bodies[number % len(bodies)])
                heard[status] += 1
                stop.wait(pause)
            except (OSError, http.client.HTTPException) as error:  # closed during a large upload
                heard[type(error).__name__] += 1
                connection.close()

    threads = [threading.Thread(target=keep_asking, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    begun.set()
    stop.wait()
    for thread in threads:
        thread.join(5)
    statuses.send(dict(heard))


def probe(port: int, count: int) -> list[float]:
    """Return the seconds that each of `count` small requests takes."""
    connection, body, seconds = connect(port, PROBE), json.dumps(SMALL).encode(), []
    for _ in range(count):
        start = time.perf_counter()
        status, _ = ask(connection, "chat/completions", body)
        seconds.append(time.perf_counter() - start)
        if status != 200:
            raise RuntimeError(f"the probe got {status}")
    return seconds


def measure(port: int, name: str, count: int) -> dict[str, Any]:
    """Measure the probe in quiet, then under an attack."""
    quiet = probe(port, count)
    context = multiprocessing.get_context("spawn")
    begun, stop, (receiver, sender) = context.Event(), context.Event(), context.Pipe(duplex=False)
    process = context.Process(target=attack, args=(port, name, begun, stop, sender))
    process.start()
    begun.wait()
    time.sleep(1)
    attacked = probe(port, count)
    stop.set()
    heard = receiver.recv() if receiver.poll(30) else {}
    process.kill()
    process.join()
    medians = [statistics.median(quiet), statistics.median(attacked)]
    return {
        "quiet_ms": round(1000 * medians[0], 1),
        "attacked_ms": round(1000 * medians[1], 1),
        "worst_ms": round(1000 * max(attacked), 1),
        "ratio": round(medians[1] / medians[0], 2),
        "attacker": heard,
    }


def random_pair(folder: Path) -> dict[str, str]:
    """Write a pair of the toy pair's sizes with random weights; return the folders."""
    build_world(folder / "world", WORLD, seed=0)
    tokenizer = checkpoints.load_tokenizer(str(folder / "world" / "tokenizer"))
    paths = {}
    for seed, (name, (hidden, intermediate, layers)) in enumerate(SIZES.items()):
        architecture = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate}
        architecture |= {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4}
        architecture |= {"max_position_embeddings": 256, "tie_word_embeddings": True}
        model = checkpoints.new_model(architecture, tokenizer, seed)
        checkpoints.export_model(model, tokenizer, folder / name, "float32", {"add_bos": False})
        paths[name] = str(folder / name)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--proposal")
    parser.add_argument("--aligner")
    parser.add_argument("--turns", type=int, default=20, help="small requests per median")
    parser.add_argument("--only", default="", help="attacks whose name has this text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        paths = {"proposal": args.proposal, "aligner": args.aligner}
        if args.proposal is None:
            paths = random_pair(Path(name))
        with served([f"{key}={path!r}" for key, path in paths.items()]) as port:
            probe(port, args.turns)  # warms up
            results = {}
            for kind in (name for name in attacks() if args.only in name):
                results[kind] = measure(port, kind, args.turns)
                print(f"{kind}: {results[kind]}", flush=True)
    print(json.dumps(results))
    sys.exit(any(result["ratio"] > MOST for result in results.values()))


if __name__ == "__main__":
    main()
