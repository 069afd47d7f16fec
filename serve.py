"""Serve one frozen proposal with any number of aligners over OpenAI's protocol, or chat in a terminal.

    python serve.py experiment=demo                                                 the pairs of a recipe
    python serve.py proposal=FOLDER aligners='{helpful: FOLDER, harmless: FOLDER}'
    python serve.py chat proposal=FOLDER aligner=FOLDER
    python serve.py worker proposal=FOLDER aligner=FOLDER worker.controller=URL     for FastChat
    python serve.py --help                                                          every key

FOLDER is a model's folder, a run's folder or name, or a hub id. config/serve.yaml explains every key.
"""

import contextlib
import sys
from collections.abc import Sequence

from ram import environment

if __name__ == "__main__":
    environment.check()

from ram.errors import UserError, nearest, run_entry_point
from ram.log import log, setup_logging
from ram.serving import http, terminal
from ram.serving.api import create_app
from ram.serving.fastchat import worker as fastchat_worker
from ram.serving.registry import Models
from ram.settings import compose, serving
from ram.settings.serving import Settings

MODES = ("serve", "chat", "worker", "fastchat")


def serve(settings: Settings, worker: bool = False) -> None:
    """Run the server, or FastChat's worker, until SIGTERM or Ctrl-C."""
    if worker:
        fastchat_worker.check_exposure(settings)
    else:
        serving.check_exposure(settings)
    listener = http.listen(settings)  # before the models load: a taken port is reported at once
    with contextlib.closing(listener):
        config, url = settings.config, http.url_of(settings, listener.getsockname()[1])
        seconds = {"shutdown_seconds": config.shutdown_seconds, "head_seconds": config.limits.body_seconds}
        log.info(loading(settings))
        models = Models(settings)
        banner = f"{models.proposal} with {', '.join(settings.aligners) or 'no aligners'} at {url}"
        try:
            if worker:
                with fastchat_worker.registered(models, url) as app:
                    http.run_server(http.make_server(app, banner=banner, **seconds), listener)
            else:
                banner += f"\na page to talk to them: {url}/  OpenAI's protocol: {url}/v1"
                http.run_server(http.make_server(create_app(models), banner=banner, **seconds), listener)
        finally:
            models.engine.close(wait=False)
    log.info("stopped")


def loading(settings: Settings) -> str:
    """Return the line that says which models are loaded, which may take minutes."""
    return f"loading {settings.config.proposal} and {', '.join(settings.aligners) or 'no aligners'} ..."


def main(arguments: Sequence[str]) -> None:
    """Run `serve.py ARGUMENTS`; without a mode, the server."""
    mode = "serve"
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(f"{__doc__}\n{compose.manual('serve')}")
        return
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        mode, *arguments = arguments
    if mode not in MODES:
        raise UserError(f"{mode!r}: expected key=value or one of {nearest(mode, MODES)}")
    if mode == "fastchat":
        fastchat_worker.run_fastchat(arguments)
        return
    tables = None
    if any(compose.key_of(argument) == "experiment" for argument in arguments):
        from utils import TABLES as tables  # imports the trainers and data sets, which only recipes need
    settings = serving.read_settings(arguments, tables)
    if mode == "chat":
        terminal.check_streams()
        sys.stderr.write(f"{loading(settings)}\n")
        terminal.run(Models(settings))
    else:
        serve(settings, worker=mode == "worker")


if __name__ == "__main__":
    setup_logging()
    run_entry_point(lambda: main(sys.argv[1:]))
