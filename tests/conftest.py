"""Settings for all tests: one thread, because tiny tensors gain nothing from more, and no access to a hub."""

import gc
import os
import shutil
import signal
import tempfile

os.environ.update(
    RAM_ABILITIES=tempfile.mkdtemp(prefix="ram-abilities-"),
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

import pytest
import torch
from browser import CHROMIUM, open_browser

import utils


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
    utils.setup_logging()
    utils.quiet_transformers()
    yield
    shutil.rmtree(os.environ["RAM_ABILITIES"], ignore_errors=True)


@pytest.fixture(autouse=True)
def propagated_log(monkeypatch):
    """Let caplog see the project's log."""
    monkeypatch.setattr(utils.log, "propagate", True)


@pytest.fixture(autouse=True)
def restored_signals():
    """Restore the handler of SIGTERM, which an entry point changes, after each test."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def pytest_collection_finish():
    """Exclude the libraries' permanent objects from garbage collection, which saves a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def browser():
    """A page of a headless Chromium, skipped if the system has none; RAM_REQUIRE_BROWSER forbids that.

    It ends with the module: while Playwright runs, no other test can start an event loop in this thread.
    """
    if CHROMIUM is None:
        if os.environ.get("RAM_REQUIRE_BROWSER"):
            pytest.fail("no Chromium on this machine, and RAM_REQUIRE_BROWSER is set")
        pytest.skip("no Chromium on this machine")
    with open_browser() as page:
        yield page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of models to serve; the tests of a module may change it."""
    from served import save_models

    models = tmp_path_factory.mktemp("models")
    save_models(models)
    return models


@pytest.fixture
def start():
    """A function that makes engines (`engines.open_engine`), which are closed at the end of the test."""
    from engines import open_engine

    engines = []

    def make(*models, **settings):
        engines.append(open_engine(*models, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(wait=False)
        assert not engine.thread.is_alive()
