"""Errors in the shape OpenAI clients expect: {"error": {message, type, param, code}}."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class ApiError(Exception):
    """A request that is answered with an error.  `param` names the field that is wrong."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, object]:
        """Return the JSON body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response; a busy server says when to come back."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Give every failure of `app` the OpenAI shape."""

    @app.exception_handler(ApiError)
    async def _api_error(_request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(list(error.errors())).response()

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail)).response()

    @app.exception_handler(Exception)
    async def _unexpected(_request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"the server failed on this request ({type(error).__name__}); see its log").response()


def validation_error(problems: list[dict[str, object]]) -> ApiError:
    """Turn pydantic's findings into one 400 that names the first field and lists all."""
    named = []
    for problem in problems:
        location = _field(problem.get("loc", ()))
        if problem.get("type") == "extra_forbidden":
            named.append((location, f"'{'.'.join(location)}' is not supported by this server; leave it out"))
        elif problem.get("type") == "json_invalid":
            named.append(([], f"the body is not valid JSON: {_json_problem(problem)}"))
        elif isinstance(problem.get("input"), bytes):
            named.append(([], "the body is not read as JSON; send it with 'Content-Type: application/json'"))
        else:
            given = problem.get("input")
            shown = "" if isinstance(given, dict) else f" (got {given!r:.80})"
            where = f"'{'.'.join(location)}': " if location else ""
            named.append((location, f"{where}{problem.get('msg')}{shown}"))
    param = ".".join(named[0][0]) or None
    return ApiError(400, "; ".join(text for _, text in named), param=param, code="invalid_value")


def _field(location: object) -> list[str]:
    """Name a field as the client wrote it: without the branches of a union that pydantic tried."""
    parts = [str(part) for part in location if part != "body"]  # type: ignore[attr-defined]
    branch = next((i for i, part in enumerate(parts) if "[" in part or part in ("str", "int", "float")), len(parts))
    return parts[:branch]


def _json_problem(problem: dict[str, object]) -> object:
    context = problem.get("ctx")
    return context.get("error", context) if isinstance(context, dict) else problem.get("msg")
