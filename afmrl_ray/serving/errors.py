"""Errors of requests as problem+json (RFC 9457): one line, never a stack trace."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"
_MOST_ERRORS = 10
_MOST_CHARACTERS = 200


class Problem(Exception):
    """A request is refused.

    Args:
        status: HTTP status.
        detail: what is wrong and what to do instead.
        headers: of the response.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


class Overloaded(Problem):
    """503: all queues are full, or replicas are being restarted; the client should repeat the request."""

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        super().__init__(503, detail, {"Retry-After": str(retry_after_s)})


def problem_response(
    status: int, detail: str, headers: dict[str, str] | None = None, errors: list[dict[str, Any]] | None = None
) -> JSONResponse:
    """The response to a request that failed; `errors` lists invalid fields."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    if errors is not None:
        body["errors"] = errors
    return JSONResponse(body, status_code=status, headers=headers, media_type=MEDIA_TYPE)


def handle_errors(api: FastAPI) -> None:
    """Let the application answer every error with `problem_response`."""

    @api.exception_handler(Problem)
    async def on_problem(request: Request, error: Problem) -> Response:
        return problem_response(error.status, error.detail, error.headers)

    @api.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return problem_response(error.status_code, str(error.detail), dict(error.headers or {}))

    @api.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> Response:
        errors = [
            {
                "where": ".".join(str(part) for part in each["loc"])[:_MOST_CHARACTERS],
                "what": each["msg"][:_MOST_CHARACTERS],
            }
            for each in error.errors()[:_MOST_ERRORS]
        ]
        detail = f"{errors[0]['where']}: {errors[0]['what']}" if errors else "invalid"
        return problem_response(422, detail, errors=errors)

    @api.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> Response:
        return problem_response(500, "the server failed; its log has the cause")
