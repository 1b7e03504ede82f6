"""What goes wrong with a request, as problem+json (RFC 9457): one line, never a stack trace."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """A request that is refused.

    Args:
        status: HTTP status.
        detail: what is wrong and what to do instead.
        headers: of the answer.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


class Overloaded(Problem):
    """All queues are full, or what is needed is being started again: to be asked again soon."""

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        super().__init__(503, detail, {"Retry-After": str(retry_after_s)})


def problem_response(
    status: int, detail: str, headers: dict[str, str] | None = None, errors: list[dict[str, Any]] | None = None
) -> JSONResponse:
    """The answer."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    if errors is not None:
        body["errors"] = errors
    return JSONResponse(body, status_code=status, headers=headers, media_type=MEDIA_TYPE)
