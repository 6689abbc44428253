"""The operator's web application: one page, two verbs, three JSON addresses, metrics.

Reads SQL through `views`; writes through the registry, with the generation the operator looked at.
A request that changes something must come from the page itself.  There is no log-in: it listens on
the loopback address unless told otherwise, and then belongs behind a proxy that authenticates.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Form, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from sqlalchemy import Engine, text

from adapter.contracts import ConflictError, RegistryError
from adapter.hints import announcer
from adapter.registry import Registry
from adapter.settings import Settings
from adapter.versions import Live
from monitors.dashboard import views
from monitors.dashboard.wording import FILTERS

ACTOR = "dashboard"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_HERE = Path(__file__).parent
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")

Reason = Annotated[str, Form(max_length=500)]
Generation = Annotated[int, Form(ge=1)]


def create_app(
    settings: Settings,
    engine: Engine,
    *,
    metrics: CollectorRegistry | None = None,
    clock: Callable[[], float] = time.time,
) -> FastAPI:
    """Build the application over a migrated database."""
    app = FastAPI(title="Draftsmith", docs_url=None, redoc_url=None, openapi_url=None)
    registry = Registry(engine, clock=clock, announce=announcer(settings))
    env = Environment(
        loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    env.filters.update(FILTERS)
    templates = Jinja2Templates(env=env)
    app.middleware("http")(_guard(settings))
    app.mount("/static", StaticFiles(directory=_HERE / "static"), name="static")

    def page(request: Request, name: str, values: dict[str, Any], status: int = 200) -> HTMLResponse:
        return templates.TemplateResponse(request, name, values, status_code=status)

    @app.get("/", response_class=HTMLResponse)
    def show_page(request: Request) -> HTMLResponse:
        return page(request, "page.html", {"o": views.overview(engine, clock()), "ranges": list(views.RANGES)})

    @app.get("/fragments/overview", response_class=HTMLResponse)
    def show_overview(request: Request) -> HTMLResponse:
        return page(request, "refresh.html", {"o": views.overview(engine, clock())})

    @app.get("/api/overview")
    def api_overview() -> JSONResponse:
        return JSONResponse(views.overview(engine, clock()))

    @app.get("/api/series")
    def api_series(range_: Annotated[str, Query(alias="range")] = "1h") -> JSONResponse:
        if range_ not in views.RANGES:
            sentence = f"range is {range_!r}; expected one of {', '.join(views.RANGES)}"
            return JSONResponse({"error": sentence}, status_code=422)
        return JSONResponse(views.series(engine, clock(), views.RANGES[range_]))

    @app.get("/health")
    def health() -> JSONResponse:
        with engine.execution_options(readonly=True).begin() as connection:
            connection.execute(text("SELECT 1"))
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    def show_metrics() -> Response:
        body = generate_latest(metrics) if metrics is not None else b""
        return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.post("/actions/roll-back", response_class=HTMLResponse)
    def roll_back(request: Request, expected_generation: Generation, reason: Reason = "") -> HTMLResponse:
        return change(
            request,
            lambda: registry.roll_back(
                actor=ACTOR, reason=reason.strip() or "no reason given", expected_generation=expected_generation
            ),
        )

    @app.post("/actions/promote", response_class=HTMLResponse)
    def promote(
        request: Request, version: Annotated[int, Form(ge=0)], expected_generation: Generation, reason: Reason = ""
    ) -> HTMLResponse:
        return change(
            request,
            lambda: registry.promote(
                version,
                actor=ACTOR,
                reason=reason.strip() or "no reason given",
                expected_generation=expected_generation,
            ),
        )

    def change(request: Request, act: Callable[[], Live]) -> HTMLResponse:
        try:
            live = act()
        except ConflictError as error:
            return page(request, "notice.html", {"kind": "bad", "sentence": str(error)}, 409)
        except RegistryError as error:
            return page(request, "notice.html", {"kind": "bad", "sentence": str(error)}, 422)
        response = page(request, "notice.html", {"kind": "good", "sentence": f"v{live.live} is live now."})
        response.headers["HX-Trigger"] = "moved"
        return response

    return app


def _guard(settings: Settings) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    local = _is_loopback(settings.dashboard_host)

    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        refusal = _refusal(request, local)
        response = PlainTextResponse(refusal, status_code=403) if refusal else await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return guard


def _refusal(request: Request, local: bool) -> str | None:
    """Say why a request is refused, or None.

    A page on another site may post here from the operator's browser, and a name that somebody else
    points at 127.0.0.1 may even read; the browser's own headers tell both.
    """
    host = request.headers.get("host", "")
    if local and (urlsplit(f"//{host}").hostname or "") not in _LOCAL_NAMES:
        return f"the dashboard listens on this machine only and does not answer as {host!r}; use localhost"
    if request.method in _SAFE_METHODS:
        return None
    site = request.headers.get("sec-fetch-site")
    if site in ("same-origin", "none"):
        return None
    origin = request.headers.get("origin")
    if site is None and origin and urlsplit(origin).netloc == host:
        return None
    return "a change must come from the dashboard's own page; scripts use the draftsmith command instead"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
