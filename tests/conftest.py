"""Every test runs on one thread (tiny tensors gain nothing from more) and never asks a hub for anything."""

import contextlib
import gc
import os
import signal

os.environ.update(
    HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"
)

import pytest
import torch
from browser import CHROMIUM, Browser

import utils


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
    utils.setup_logging()
    utils.quiet_transformers()


@pytest.fixture(autouse=True)
def propagated_log(monkeypatch):
    """Lets caplog see the project's log."""
    monkeypatch.setattr(utils.log, "propagate", True)


@pytest.fixture(autouse=True)
def own_signals():
    """What an entry point does with SIGTERM ends with the test that called it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def pytest_collection_finish():
    """What the libraries hold for ever need not be gone through by every garbage collection: a tenth of the
    time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One headless Chromium for all pages; a test opens its own."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with contextlib.closing(Browser(tmp_path_factory.mktemp("profile"))) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models to serve; tests of a module may change theirs."""
    from served import save_models

    found = tmp_path_factory.mktemp("models")
    save_models(found)
    return found


@pytest.fixture
def start():
    """Makes engines (`engines.open_engine`) that are closed at the end of the test."""
    from engines import open_engine

    opened = []

    def make(*models, **settings):
        opened.append(open_engine(*models, **settings))
        return opened[-1]

    yield make
    for each in opened:
        each.close(wait=False)
        assert not each.thread.is_alive()
