"""A server of OpenAI's completion protocol with deterministic answers and optional faults.

    completion_server.py PORT LOG FAULTS

LOG gets one line per answered prompt. FAULTS is the share of requests that fail, in one of four ways.
"""

import hashlib
import json
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer_to(prompt: str | list[int], seed: int) -> str:
    return " " + hashlib.sha256(json.dumps([prompt, seed]).encode()).hexdigest()[:10]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which holds a body back for 40 ms
    faults = 0.0  # share of the requests that fail
    log_path: str | None = None
    lock = threading.Lock()
    running = 0  # requests in flight
    most = 0  # largest number of requests in flight so far

    def log_message(self, *args: object) -> None:
        """Keep the standard error stream empty."""

    def reply(self, code: int, body: dict | bytes, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "toy"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            Handler.running += 1
            Handler.most = max(Handler.most, Handler.running)
        try:
            time.sleep(0.005)
            self.handle_prompt(body)
        finally:
            with self.lock:
                Handler.running -= 1

    def handle_prompt(self, body: dict) -> None:
        if self.headers.get("Authorization") == "Bearer wrong":
            return self.reply(401, {"error": {"message": "no such key"}})
        if body["prompt"] in ("never", [110, 101, 118, 101, 114]):
            return self.reply(400, {"error": {"message": "this prompt is refused"}})
        if random.random() < self.faults:
            fault = random.randrange(4)
            if fault == 0:
                return self.reply(500, {"error": {"message": "worker died"}})
            if fault == 1:
                return self.reply(429, {"error": {"message": "slow down"}}, Retry_After="0.05")
            if fault == 2:
                return self.reply(200, b'{"choices": [{"te')
            self.close_connection = True
            return None
        text = answer_to(body["prompt"], body["seed"])
        if self.log_path:
            with self.lock, open(self.log_path, "a") as file:
                file.write(json.dumps([body["prompt"], body["seed"]]) + "\n")
        return self.reply(
            200, {"choices": [{"text": text, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
        )


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close their connection."""


def start(port: int = 0, faults: float = 0.0, log_path: str | None = None) -> Server:
    """Start a server in a thread. `server.server_port` is its port."""
    Handler.faults = faults
    Handler.log_path = log_path
    Handler.most = 0
    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


if __name__ == "__main__":
    start(int(sys.argv[1]), float(sys.argv[3]), sys.argv[2])
    while True:
        time.sleep(1)
