"""A headless Chromium, spoken to over a pipe: its DevTools protocol, JSON texts that end with a zero byte."""

import base64
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One window. Use as a context; `errors` collects what the page's console complains about."""

    def __init__(self, folder, width=1000, height=800, dark=False):
        to_read, self.commands = os.pipe()
        self.events, to_write = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
        flags += f" --remote-debugging-pipe --user-data-dir={folder} --hide-scrollbars about:blank"
        script = f'exec "$0" {flags} 3<&{to_read} 4>&{to_write}'
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM], pass_fds=(to_read, to_write), stdout=quiet, stderr=quiet
        )
        os.close(to_read)
        os.close(to_write)
        self.rest, self.number, self.session, self.errors = b"", 0, None, []
        (page, *_) = [
            each for each in self.send("Target.getTargets")["targetInfos"] if each["type"] == "page"
        ]
        attach = {"targetId": page["targetId"], "flatten": True}
        self.session = self.send("Target.attachToTarget", attach)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", {"features": [scheme]})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.close(self.commands)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.events)

    def send(self, method, params=None):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params or {}}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def receive(self):
        while b"\0" not in self.rest:
            more = os.read(self.events, 1 << 16)
            assert more, "the browser ended"
            self.rest += more
        text, _, self.rest = self.rest.partition(b"\0")
        event = json.loads(text)
        if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(event["params"])
        return event

    def open(self, url):
        self.send("Page.navigate", {"url": url})
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def run(self, script):
        """The value of a JavaScript expression, awaited where it is a promise."""
        given = {"expression": script, "returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.send("Runtime.evaluate", given)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script, seconds=15):
        deadline = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, script
            time.sleep(0.05)
        return found

    def type(self, text):
        """What a person types into the field that has the focus."""
        self.send("Input.insertText", {"text": text})

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            codes = {"Enter": ("\r", 13), "Tab": ("\t", 9)}
            text, code = codes[key]
            given = {"type": kind, "key": key, "code": key, "text": text, "windowsVirtualKeyCode": code}
            self.send("Input.dispatchKeyEvent", given)

    def screenshot(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
