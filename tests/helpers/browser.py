"""Headless Chromium for the tests, by the DevTools protocol over a pipe: no package, no port."""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
# Windows' code of a key that is no letter or digit, and the text that it types.
KEYS = {"/": (191, "/"), "Escape": (27, ""), "Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}
KEYS |= {"ArrowLeft": (37, ""), "ArrowUp": (38, ""), "ArrowRight": (39, ""), "ArrowDown": (40, "")}
SHIFT = 8  # as the protocol counts modifiers


class Browser:
    """One page. `said` holds what it logged or threw."""

    def __init__(self, folder: Path, *flags: str) -> None:
        to_read, self.write = os.pipe()
        self.read, to_write = os.pipe()

        def third_and_fourth():  # where the browser expects the pipe
            os.dup2(os.dup(to_read), 3)
            os.dup2(os.dup(to_write), 4)

        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu"]
        command += [
            f"--user-data-dir={folder}",
            "--no-first-run",
            "--disable-dev-shm-usage",
            *flags,
            "about:blank",
        ]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(
            command,
            pass_fds=(3, 4, to_read, to_write),
            preexec_fn=third_and_fourth,
            start_new_session=True,
            **quiet,
        )
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.count, self.events, self.said, self.session = b"", 0, [], [], None
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)
        self.send("Performance.enable", timeDomain="threadTicks")

    def message(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], 30)[0], "the browser says nothing"
            piece = os.read(self.read, 1 << 20)
            assert piece, "the browser ended"
            self.buffer += piece
        found, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(found)

    def send(self, method: str, **params) -> dict:
        """What a command answers; raises where the browser refuses it."""
        self.count += 1
        value = {"id": self.count, "method": method, "params": params}
        if self.session:
            value["sessionId"] = self.session
        os.write(self.write, json.dumps(value).encode() + b"\0")
        while True:
            found = self.message()
            if found.get("id") == self.count:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self.note(found)

    def note(self, event: dict) -> None:
        self.events.append(event["method"])
        if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.said.append(event["params"])

    def open(self, address: str, width: int = 1400, height: int = 900, scheme: str = "light") -> None:
        """Load a page at a width in a colour scheme and wait until it was drawn once."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.load("about:blank")
        self.load(address)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def processor_seconds(self) -> float:
        """Processor time of the page's main thread since the navigation; other programs do not add to it."""
        metrics = self.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def load(self, address: str) -> None:
        self.events.clear()
        self.send("Page.navigate", url=address)
        while "Page.loadEventFired" not in self.events:
            self.note(self.message())

    def run(self, expression: str):
        """The value of an expression in the page, awaited where it is a promise."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 60):
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)
        return found

    def type(self, text: str) -> None:
        """What a person writes into the field that has the focus."""
        self.send("Input.insertText", text=text)

    def key(self, key: str, shift: bool = False) -> None:
        """One key pressed and released, with the text that it types."""
        code, text = KEYS.get(key) or (ord(key.upper()), key)
        press = {"key": key, "windowsVirtualKeyCode": code, "modifiers": SHIFT if shift else 0}
        self.send("Input.dispatchKeyEvent", type="keyDown", **press, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **press)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.session = None
            self.send("Browser.close")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.read)
        os.close(self.write)
