"""One page of a headless Chromium for the tests: Playwright with the browser that the system has."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A page, with the messages that it logged and the exceptions that it threw."""

    def __init__(self, page: Any) -> None:
        self.page, self.devtools = page, page.context.new_cdp_session(page)
        self.messages: list[str] = []
        self.load_seconds = 0.0  # CPU time of the page's main thread for loading the last page and drawing it
        self.send("Performance.enable", timeDomain="threadTicks")
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))

    def open(self, address: str, width: int = 1400, height: int = 900, scheme: str = "light") -> None:
        """Load a page in a window of some size and a colour scheme."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme)
        self.page.goto("about:blank")
        begin = self._thread_seconds()
        self.page.goto(address)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.load_seconds = self._thread_seconds() - begin

    def _thread_seconds(self) -> float:
        metrics = self.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol."""
        return self.devtools.send(method, params)

    def run(self, expression: str) -> Any:
        """The value of an expression in the page; a promise is awaited.

        Playwright's own `evaluate` calls the page's `eval`, which the policies of our pages forbid.
        """
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> Any:
        """The value of an expression, as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        """Write a text into the field that has the focus."""
        self.page.keyboard.insert_text(text)

    def key(self, key: str, shift: bool = False) -> None:
        """Press and release one key."""
        self.page.keyboard.press(f"Shift+{key}" if shift else key)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        self.page.screenshot(path=path, full_page=whole)


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium with one page, and end it with the context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Browser(chromium.new_page())
        chromium.close()
