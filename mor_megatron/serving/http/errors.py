"""Errors, in the form that OpenAI's clients expect."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mor_megatron.serving.http.worker import EngineDied, Overload, Unavailable

_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},  # or a client that goes on sending would keep it
    429: {"Retry-After": "1"},
}
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An error to tell the client.

    Args:
        message: in words.
        status: of HTTP.
        param: the field that is wrong.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None):
        super().__init__(status, message)
        self.param = param


def as_json(message: str, status: int, param: str | None = None) -> dict:
    """Body of an error."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def answer(message: str, status: int, param: str | None = None) -> JSONResponse:
    """An error as the whole answer."""
    return JSONResponse(as_json(message, status, param), status, _HEADERS.get(status))


def in_words(error: Exception) -> tuple[str, int]:
    """Message and status of an error of the engine."""
    if isinstance(error, Overload):
        return "the server has as many requests as it takes: try again later", 429
    if isinstance(error, EngineDied):
        return "the engine has failed: the server's log says why", 503
    if isinstance(error, Unavailable):
        return "the server is shutting down: try again later", 503
    return "internal error: the server's log says more", 500


async def _answer_in_words(request: Request, error: Exception) -> JSONResponse:
    return answer(*in_words(error))


def install(app: FastAPI) -> None:
    """Answer all errors in this form."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> JSONResponse:
        return answer(error.detail, error.status_code, error.param)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"][1:]]
        if first["type"] == "json_invalid":
            return answer(f"body is not JSON: {first['ctx']['error']}", 400, "body")
        return answer(f"{'.'.join(place) or 'body'}: {first['msg']}", 400, place[0] if place else "body")

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        return answer(str(error.detail), error.status_code, "body" if error.status_code == 400 else None)

    for kind in (Overload, Unavailable, Exception):
        app.add_exception_handler(kind, _answer_in_words)
