"""A real server of the S3 protocol (moto's, in this process), and ways for it to fail: it falls silent at the n-th
change, loses an answer, or does not know conditional requests."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from aisp_dist.config import StorageOptions
from aisp_dist.output.filesystem import Place

BUCKET = "bucket"
KEYS = {"access_key": "id-that-is-planted", "secret_key": "secret+that/is-planted"}


class _Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True


class Server:
    """left: changes until the client is dead to it, after which it hears nothing; lost: numbers of the changes that are
    done and answered with an error; deaf: conditions are ignored; before_change: told the path of each change before it
    is done. requests: what was asked."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.app = DomainDispatcherApplication(create_backend_app)
        self.lock, self.changing, self.requests = threading.Lock(), threading.Lock(), []
        self.left, self.lost, self.deaf = float("inf"), (), False
        self.before_change = lambda path: None
        self.http = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"127.0.0.1:{self.http.port}"
        self.options = StorageOptions(endpoint_override=self.address, scheme="http", region="us-east-1", **KEYS)
        self.env = {
            "AWS_ENDPOINT_URL": f"http://{self.address}",
            "AWS_ACCESS_KEY_ID": KEYS["access_key"],
            "AWS_SECRET_ACCESS_KEY": KEYS["secret_key"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://{self.address}",
            region_name="us-east-1",
            aws_access_key_id=KEYS["access_key"],
            aws_secret_access_key=KEYS["secret_key"],
        )
        self.client.create_bucket(Bucket=BUCKET)

    def __call__(self, environ, start_response):
        change = environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE")
        with self.lock:
            self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]))
            number = sum(method in ("PUT", "POST", "DELETE") for method, *_ in self.requests)
            self.left -= change
            dead = self.left < 0
        if change:
            self.before_change(environ["PATH_INFO"])
        if self.deaf:
            for condition in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"):
                environ.pop(condition, None)
        if dead:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Length", "0")])
            return [b""]
        if change and number in self.lost:
            b"".join(self.app(environ, lambda *answer: None))
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        if change:
            with self.changing:  # moto looks at the condition first and writes later
                return self.app(environ, start_response)
        return self.app(environ, start_response)

    def place(self, name: str = "") -> Place:
        return Place.at(f"s3://{BUCKET}/{name or secrets.token_hex(4)}", self.options)

    @contextmanager
    def killed_after(self, changes: float) -> Iterator[list[bool]]:
        """As killing.killed_after: runs its block until so many changes are done; the list says whether it died."""
        died: list[bool] = []
        self.left = changes
        try:
            yield died
        except OSError:
            assert self.left < 0
            died.append(True)
        finally:
            self.left = float("inf")

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
