"""A local S3 server that turns away every so many writes, as a store that is asked too much does."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class FlakyS3:
    """Serves until it is stopped.

    Args:
        port: on loopback.
        every: the writes that fail: 10 = each tenth.

    Attributes:
        writes: so far.
        failed: of them.
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
                # What is not read would be taken for the connection's next request.
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [_SLOW_DOWN]
        return self._application(environ, start_response)
