"""A server over tiny models in this process, and what its answers should be."""

import contextlib
import functools
import ssl
import threading
import time

import httpx
from tiny import byte_tokenizer, save_model_folder, tiny_model, tiny_tokenizer

import serve
from ram.data import prompts
from ram.decoding import generation
from ram.models import checkpoints
from ram.serving import api
from ram.serving.registry import Models
from ram.settings import serving

TOKENIZER = byte_tokenizer()
# Nothing here speaks TLS, for which httpx would read the machine's certificates with every request (40 ms).
PLAIN = {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "trust_env": False, "timeout": 60}
get, post = functools.partial(httpx.get, **PLAIN), functools.partial(httpx.post, **PLAIN)
SAMPLING = ["sampling.temperature=1.0", "sampling.base_temperature=1.0", "sampling.sample_mode=par"]


def save_models(folder):
    """A proposal, aligners a and b, one of another tokenizer and one whose weights are damaged."""
    size, end = len(TOKENIZER), {"eos_token_id": TOKENIZER.eos_token_id}
    found = {"p": tiny_model(size, 1, layers=2, **end), "a": tiny_model(size, 2, **end)}
    found["b"] = tiny_model(size, 3, **end)
    for name, model in found.items():
        save_model_folder(folder / name, model, TOKENIZER)
    letters = tiny_tokenizer()
    save_model_folder(folder / "other", tiny_model(len(letters), 4), letters)
    save_model_folder(folder / "damaged", found["b"], TOKENIZER)
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return found


def settings(folder, *arguments):
    aligners = f"aligners={{a: {folder}/a, b: {folder}/b}}"
    given = [f"proposal={folder}/p", aligners, "port=0", f"aligner_root={folder}", *SAMPLING]
    return serving.read_settings([*given, *arguments])


@contextlib.contextmanager
def listening(models, app, listener):
    """A server of an application in a thread, until the context is left."""
    server = serve.make_server(app, 1)
    thread = threading.Thread(target=serve.run_server, args=(server, listener))
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


def opened(folder, *arguments):
    """(models, listener, url) that a server is made of."""
    found = settings(folder, *arguments)
    models, listener = Models(found), serve.listen(found)
    return models, listener, serve.url_of(found, listener.getsockname()[1])


@contextlib.contextmanager
def running(folder, *arguments):
    """(models, url) of a server that stops when the context is left."""
    models, listener, url = opened(folder, *arguments)
    with listening(models, api.create_app(models), listener):
        yield models, url


@functools.cache
def load(path):
    return checkpoints.load_model(path, "float32")


def expected(models, name, text, seed, new, row=0, stop=("\n\nHuman",), **changed):
    """What `decoding.generate` says: the answer that the server must give."""
    paths = [models.proposal, None if name in (None, "proposal") else models.served[name].path]
    pair = [path and load(path) for path in paths]
    law = models.law(changed)
    settings = {"max_new_tokens": new, "seed": seed, "row_ids": [row], "stop": stop}
    return generation.generate(*pair, TOKENIZER, [text], law, **settings)[0]


def chat_text(*said):
    """The dialogue that messages of user and assistant in turns become."""
    return prompts.render_dialogue([(index % 2 == 0, text) for index, text in enumerate(said)])


def eventually(condition, seconds=60):
    """Wait until a condition holds; only a failing test waits for long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def ask(url, body, path="chat/completions", **more):
    return post(f"{url}/v1/{path}", json=body, **more)
