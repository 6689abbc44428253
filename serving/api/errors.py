"""Errors in the shape OpenAI clients expect: {"error": {message, type, param, code}}."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_MOST_PROBLEMS = 5  # listed in one message
_ALIKE = 0.8  # how much of a field's name a mistyped one must share; other APIs' fields are longer forms of ours
_JSON_KINDS: dict[type, str] = {
    type(None): "empty or null", list: "a list", str: "a string", int: "a number", float: "a number",
    bool: "true or false",
}  # fmt: skip
_CODES = {401: "invalid_api_key", 413: "body_too_large", 429: "server_busy"}


class FieldError(ValueError):
    """A field that does not fit the others of its object; `field` is its name inside that object."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class ApiError(Exception):
    """A request that is answered with an error.  `param` names the field that is wrong."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status)

    def body(self) -> dict[str, object]:
        """Return the JSON body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        param = None if self.param is None else _sendable(self.param)
        return {"error": {"message": _sendable(self.message), "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response; a busy server says when to come back."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def check_text(text: str, param: str) -> None:
    """Refuse a lone surrogate, which JSON can spell and no encoding can.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"'{param}' holds a lone surrogate, which is no text: {error.reason}"
        raise ApiError(400, problem, param=param, code="invalid_value") from None


def _sendable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def install_error_handlers(app: FastAPI) -> None:
    """Give every failure of `app` the OpenAI shape."""

    @app.exception_handler(ApiError)
    async def _api_error(_request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(list(error.errors()), _bodies(request.scope.get("endpoint"))).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        response = ApiError(error.status_code, _routing_problem(request, error)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        answer = ApiError(500, f"the server failed on this request ({type(error).__name__}); see its log").response()
        if request_id := request.scope.get("state", {}).get("request_id"):  # this handler is outside all middleware
            answer.headers["X-Request-Id"] = request_id
        return answer


def _routing_problem(request: Request, error: HTTPException) -> str:
    """Say what is wrong with a path or a method; anything else keeps its own words."""
    path = request.url.path[:80]
    if error.status_code == 404:
        return f"there is no {path} on this server"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{path} does not take {request.method}; use {allowed}"
    return str(error.detail)


def validation_error(problems: list[dict[str, object]], bodies: tuple[Any, ...] = ()) -> ApiError:
    """Turn pydantic's findings into one 400 that names the first field and lists the first few.

    Args:
        bodies: the types a body may have, so that a mistyped field can be told which one was meant.
    """
    named = [_named(problem, bodies) for problem in problems]
    texts = list(dict.fromkeys(text for _, text in named))
    shown = "; ".join(texts[:_MOST_PROBLEMS])
    more = f"; and {len(texts) - _MOST_PROBLEMS} more" if len(texts) > _MOST_PROBLEMS else ""
    return ApiError(400, shown + more, param=".".join(named[0][0]) or None, code="invalid_value")


def _bodies(endpoint: object) -> tuple[Any, ...]:
    """Return the types of an endpoint's arguments, its body among them."""
    return tuple(get_type_hints(endpoint).values()) if callable(endpoint) else ()


def _meant(location: list[str], bodies: tuple[Any, ...]) -> str:
    """Say which field a mistyped one was probably meant to be; nothing where none is like it."""
    kinds = _models(bodies)
    for part in location[:-1]:
        if not part.isdigit():  # the place in a list says nothing of its kind
            kinds = _models(tuple(kind.model_fields[part].annotation for kind in kinds if part in kind.model_fields))
    names = {item.alias or name for kind in kinds for name, item in kind.model_fields.items()}
    near = get_close_matches(location[-1], names, 1, _ALIKE) if location else []
    return f"; did you mean '{'.'.join([*location[:-1], *near])}'?" if near else ""


def _models(kinds: tuple[Any, ...]) -> list[type[BaseModel]]:
    """Return the models among these types, unions and lists of them taken apart."""
    found: list[type[BaseModel]] = []
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        else:
            found += _models(get_args(kind))
    return found


def _named(problem: dict[str, object], bodies: tuple[Any, ...]) -> tuple[list[str], str]:
    """Return where one problem is, and a sentence about it."""
    location = _field(problem.get("loc", ()))
    context = problem.get("ctx")
    cause = context.get("error") if isinstance(context, dict) else None
    if problem.get("type") == "extra_forbidden":
        meant = _meant(location, bodies) or "; leave it out"
        return location, f"'{'.'.join(location)}' is not supported by this server{meant}"
    if problem.get("type") == "json_invalid":
        return [], f"the body is not valid JSON: {_json_problem(problem)}"
    if isinstance(problem.get("input"), bytes):
        return [], "the body is not read as JSON; send it with 'Content-Type: application/json'"
    if isinstance(cause, FieldError):
        location = [*location, cause.field]
        return location, f"'{'.'.join(location)}': {cause}"
    given = problem.get("input")
    if not location and problem.get("type") in ("missing", "model_attributes_type"):
        return [], f"the body is {_JSON_KINDS.get(type(given), 'of another kind')}; send a JSON object"
    start = given[:80] if isinstance(given, str | list) else given  # a long one takes long to spell
    shown = "" if isinstance(given, dict) else f" (got {start!r:.80})"
    where = f"'{'.'.join(location)}': " if location else ""
    return location, f"{where}{_sentence(problem)}{shown}"


def _sentence(problem: dict[str, object]) -> str:
    """Return pydantic's own sentence, except where it speaks of Python to somebody who sent JSON."""
    context = problem.get("ctx")
    if problem.get("type") in ("model_attributes_type", "dict_type"):
        return "expected a JSON object"
    if problem.get("type") == "too_short" and isinstance(context, dict):
        return f"expected at least {context['min_length']}, found {context['actual_length']}"
    return str(problem.get("msg"))


def _field(location: object) -> list[str]:
    """Name a field as the client wrote it: without the branches of a union that pydantic tried."""
    parts = [str(part) for part in location if part != "body"]  # type: ignore[attr-defined]
    branch = next(
        (
            i
            for i, part in enumerate(parts)
            if "[" in part or part in ("str", "int", "float") or part.startswith(("constrained-", "literal"))
        ),
        len(parts),
    )
    return parts[:branch]


def _json_problem(problem: dict[str, object]) -> object:
    context = problem.get("ctx")
    return context.get("error", context) if isinstance(context, dict) else problem.get("msg")
