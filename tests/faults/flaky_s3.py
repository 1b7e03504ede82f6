"""A local S3 server that rejects every n-th write with SlowDown, like an overloaded store."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class FlakyS3:
    """The server; it runs from `start` to `stop`.

    Args:
        port: on the loopback interface.
        every: every such write fails.

    Attributes:
        writes: number of writes so far.
        failed: number of failed writes so far.
    """

    def __init__(self, port: int, every: int) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self._every = every
        self._lock = threading.Lock()
        self.writes = self.failed = 0
        self._server = make_server("127.0.0.1", port, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("PUT", "POST"):
            with self._lock:
                self.writes += 1
                fails = self.writes % self._every == 0
                self.failed += fails
            if fails:
                # The body must be read, or it would be parsed as the next request of the connection.
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [_SLOW_DOWN]
        return self._application(environ, start_response)
