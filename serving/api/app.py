"""The HTTP application: routes, health, models, metrics.  Built by `create_app`, run by __main__."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version as installed_version
from pathlib import Path

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from adapter.pairs import Pair
from adapter.settings import Settings
from serving.api import routes, tokens
from serving.api.engine_client import EngineClient
from serving.api.errors import install_error_handlers
from serving.api.generation import Generator
from serving.api.limits import ApiKeys, BodyLimit, Drain, Draining, RequestIds
from serving.api.metrics import EngineCollector, ServingMetrics
from serving.api.origin import tenant_salt
from serving.api.text import TargetText

_probes = APIRouter()


def create_app(settings: Settings, pair: Pair) -> FastAPI:
    """Build the application for a pair; nothing is connected before it starts.

    `app.state` carries what the routes and __main__ need: `client`, `generator`, `drain`, and what is served.
    """
    client = EngineClient(settings.run_dir)
    name = settings.api.served_model_name or pair.target_name
    registry = CollectorRegistry()
    registry.register(EngineCollector(lambda: client.snapshot, name))
    metrics = ServingMetrics(registry, name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await client.start()
        yield
        await client.stop()

    app = FastAPI(title="Draftsmith", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    text = TargetText(Path(pair.target_path))
    app.state.model_name = name
    app.state.tenant_salt = tenant_salt(settings.data_dir)
    app.state.registry = registry
    app.state.client = client
    app.state.drain = drain = Drain(settings.api.drain_s)
    app.state.generator = Generator(client, text, settings.engine, settings.api, metrics)
    app.state.described = {
        "id": name, "object": "model", "created": int(time.time()), "owned_by": "draftsmith",
        "max_model_len": settings.engine.max_model_len,
    }  # fmt: skip
    install_error_handlers(app)
    for router in (routes.router, tokens.router, _probes):
        app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=settings.api.max_body_bytes)  # the last one added is the first one asked
    app.add_middleware(Draining, drain=drain)
    app.add_middleware(ApiKeys, keys=settings.api.keys)
    app.add_middleware(RequestIds)
    return app


@_probes.get("/health")
async def health() -> dict[str, str]:
    """Say that this process is alive."""
    return {"status": "ok"}


@_probes.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Say whether a request would be served now."""
    client: EngineClient = request.app.state.client
    if request.app.state.drain.draining:
        return JSONResponse({"status": "shutting down"}, status_code=503, headers={"Retry-After": "1"})
    if not client.alive or client.snapshot is None:
        return JSONResponse({"status": "waiting for the engine"}, status_code=503, headers={"Retry-After": "1"})
    return JSONResponse({"status": "ready", "version": client.snapshot.version})


@_probes.get("/version")
async def version() -> dict[str, str]:
    """Name the installed version."""
    return {"version": installed_version("draftsmith")}


@_probes.get("/v1/models")
async def models(request: Request) -> dict[str, object]:
    """List the one model that is served."""
    return {"object": "list", "data": [request.app.state.described]}


@_probes.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, object]:
    """Describe the one model that is served."""
    routes.check_model(request, name)
    described: dict[str, object] = request.app.state.described
    return described


@_probes.get("/metrics")
async def prometheus(request: Request) -> Response:
    """Export counters in Prometheus' text format."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


@_probes.get("/debug/engine")
async def debug_engine(request: Request) -> JSONResponse:
    """Show the engine's counters as they came last."""
    snapshot = request.app.state.client.snapshot
    return JSONResponse(msgspec.to_builtins(snapshot) if snapshot else None)


@_probes.get("/debug/controller")
async def debug_controller(request: Request) -> JSONResponse:
    """Show what the controller knows and why it chose last."""
    snapshot = request.app.state.client.snapshot
    return JSONResponse(snapshot.controller if snapshot else None)
