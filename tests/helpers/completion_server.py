"""A server with OpenAI's completion protocol whose answers follow from the request, with faults on demand.

    completion_server.py PORT LOG FAULTS

LOG: a line per answered prompt. FAULTS: the share of the requests that fail, in one of several ways.
"""

import hashlib
import json
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer_to(prompt, seed):
    return " " + hashlib.sha256(json.dumps([prompt, seed]).encode()).hexdigest()[:10]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults, lock, path_of_log = 0.0, threading.Lock(), None
    running = most = 0

    def log_message(self, *args):
        pass

    def reply(self, code, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply(200, {"data": [{"id": "toy"}]} if self.path == "/v1/models" else {})

    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            Handler.running += 1
            Handler.most = max(Handler.most, Handler.running)
        try:
            time.sleep(0.005)
            self.handle_prompt(given)
        finally:
            with self.lock:
                Handler.running -= 1

    def handle_prompt(self, given):
        if self.headers.get("Authorization") == "Bearer wrong":
            return self.reply(401, {"error": {"message": "no such key"}})
        if given["prompt"] in ("never", [110, 101, 118, 101, 114]):
            return self.reply(400, {"error": {"message": "this prompt is refused"}})
        if random.random() < self.faults:
            kind = random.randrange(4)
            if kind == 0:
                return self.reply(500, {"error": {"message": "worker died"}})
            if kind == 1:
                return self.reply(429, {"error": {"message": "slow down"}}, Retry_After="0.05")
            if kind == 2:
                return self.reply(200, b'{"choices": [{"te')
            self.close_connection = True  # hangs up
            return None
        text = answer_to(given["prompt"], given["seed"])
        if self.path_of_log:
            with self.lock, open(self.path_of_log, "a") as file:
                file.write(json.dumps([given["prompt"], given["seed"]]) + "\n")
        return self.reply(
            200, {"choices": [{"text": text, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
        )


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""


def start(port=0, faults=0.0, path_of_log=None):
    """A running server; `server.server_port` says where."""
    Handler.faults, Handler.path_of_log, Handler.most = faults, path_of_log, 0
    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    start(int(sys.argv[1]), float(sys.argv[3]), sys.argv[2])
    while True:
        time.sleep(1)
