"""A real HTTP server that speaks OpenAI's chat protocol and the classify protocols, and can be told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Told:
    """answer(path, body) -> JSON value, or bytes to send as they are; faults: each used up by one request, as (status,
    headers) or "close"; fault(body) -> the same for this request, or None; delay(body) -> seconds."""

    def __init__(self):
        self.answer = lambda path, body: chat("5")
        self.faults = []
        self.fault = lambda body: None
        self.delay = lambda body: 0.0
        self.seen = []
        self.headers = []
        self.running = self.most = 0
        self.lock = threading.Lock()


def chat(text):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


@contextmanager
def serving():
    told = Told()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            with told.lock:
                told.seen.append((self.path, body))
                told.headers.append(dict(self.headers))
                told.running += 1
                told.most = max(told.most, told.running)
                fault = told.faults.pop(0) if told.faults else told.fault(body)
            time.sleep(told.delay(body))
            with told.lock:
                told.running -= 1
            if fault == "close":
                self.close_connection = True
                self.connection.close()
                return
            status, headers = fault or (200, {})
            value = told.answer(self.path, body) if fault is None else {"error": "told so"}
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for key, text in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, text)
            self.end_headers()
            with suppress(BrokenPipeError):  # a client that would not wait
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
