"""A server over tiny models in this process, and the answers that it must give."""

import contextlib
import functools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from tiny import byte_tokenizer, save_model_folder, tiny_model, tiny_tokenizer

from ram.data import prompts
from ram.decoding import generation
from ram.decoding.requests import of_proposal
from ram.models import checkpoints
from ram.serving import api, http
from ram.serving.registry import Models
from ram.settings import serving

TOKENIZER = byte_tokenizer()
# The test servers do not use TLS. Without this context httpx reads the machine's certificates with every
# request, which takes 40 ms.
PLAIN = {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "trust_env": False, "timeout": 60}
get, head, post = (functools.partial(call, **PLAIN) for call in (httpx.get, httpx.head, httpx.post))
SAMPLING = ["sampling.temperature=1.0", "sampling.base_temperature=1.0", "sampling.sample_mode=par"]


def save_models(folder: Path) -> dict[str, Any]:
    """Save a proposal, aligners a and b, one with another tokenizer and one with damaged weights."""
    size, end = len(TOKENIZER), {"eos_token_id": TOKENIZER.eos_token_id}
    models = {"p": tiny_model(size, 1, layers=2, **end), "a": tiny_model(size, 2, **end)}
    models["b"] = tiny_model(size, 3, **end)
    for name, model in models.items():
        save_model_folder(folder / name, model, TOKENIZER)
    letters = tiny_tokenizer()
    save_model_folder(folder / "other", tiny_model(len(letters), 4), letters)
    save_model_folder(folder / "damaged", models["b"], TOKENIZER)
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return models


def settings(folder: Path, *arguments: str) -> serving.Settings:
    aligners = f"aligners={{a: {folder}/a, b: {folder}/b}}"
    base = [f"proposal={folder}/p", aligners, "port=0", f"aligner_root={folder}", *SAMPLING]
    return serving.read_settings([*base, *arguments])


@contextlib.contextmanager
def listening(models: Models, app, listener: socket.socket) -> Iterator[None]:
    """Run a server of an application in a thread until the context is left."""
    server = http.make_server(app, 1)
    thread = threading.Thread(target=http.run_server, args=(server, listener))
    thread.start()
    eventually(lambda: server.started)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(20)
        models.engine.close(wait=False)
        listener.close()
        assert not thread.is_alive()


def opened(folder: Path, *arguments: str) -> tuple[Models, socket.socket, str]:
    """The models, listening socket and URL of a server that does not run yet."""
    server_settings = settings(folder, *arguments)
    models, listener = Models(server_settings), http.listen(server_settings)
    return models, listener, http.url_of(server_settings, listener.getsockname()[1])


@contextlib.contextmanager
def running(folder: Path, *arguments: str) -> Iterator[tuple[Models, str]]:
    """The models and URL of a server that stops when the context is left."""
    models, listener, url = opened(folder, *arguments)
    with listening(models, api.create_app(models), listener):
        yield models, url


@functools.cache
def load(path):
    return checkpoints.load_model(path, "float32")


def expected(models, name, text, seed, new, row=0, stop=("\n\nHuman",), **changed):
    """The answer of `generate`, which the server's must equal."""
    paths = [models.proposal, None if name in (None, "proposal") else models.served[name].path]
    pair = [path and load(path) for path in paths]
    law = models.law(of_proposal(changed) if pair[1] is None else changed)
    options = {"max_new_tokens": new, "seed": seed, "row_ids": [row], "stop": stop}
    return generation.generate(*pair, TOKENIZER, [text], law, **options)[0]


def chat_text(*turns: str) -> str:
    """The prompt of a dialogue in which the user and the assistant take turns."""
    return prompts.render_dialogue([(index % 2 == 0, text) for index, text in enumerate(turns)])


def eventually(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)


def healthy(url: str) -> bool:
    """Whether a server answers its health check."""
    try:
        return get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def ask(url: str, body: dict[str, Any], path: str = "chat/completions", **more: Any) -> httpx.Response:
    return post(f"{url}/v1/{path}", json=body, **more)
