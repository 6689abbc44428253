"""The HTTP application: routes, health, models, metrics.  Built by `create_app`, run by __main__."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from adapter.pairs import Pair
from adapter.settings import Settings
from serving.api.engine_client import EngineClient
from serving.api.errors import ApiError, install_error_handlers
from serving.api.generation import Generator
from serving.api.metrics import EngineCollector, ServingMetrics
from serving.api.routes import router
from serving.api.text import TargetText


def create_app(settings: Settings, pair: Pair) -> FastAPI:
    """Build the application for a pair; nothing is connected before it starts."""
    client = EngineClient(settings.run_dir)
    registry = CollectorRegistry()
    registry.register(EngineCollector(lambda: client.snapshot, pair.target_name))
    metrics = ServingMetrics(registry, pair.target_name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await client.start()
        yield
        await client.stop()

    app = FastAPI(title="Draftsmith", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.model_name = pair.target_name
    app.state.generator = Generator(client, TargetText(Path(pair.target_path)), settings.engine, metrics)
    install_error_handlers(app)
    app.include_router(router)
    described = {
        "id": pair.target_name, "object": "model", "created": int(time.time()), "owned_by": "draftsmith",
        "max_model_len": settings.engine.max_model_len,
    }  # fmt: skip

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that this process is alive."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Say whether a request would be served now."""
        if not client.alive or client.snapshot is None:
            return JSONResponse({"status": "waiting for the engine"}, status_code=503)
        return JSONResponse({"status": "ready", "version": client.snapshot.version})

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        """List the one model that is served."""
        return {"object": "list", "data": [described]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        """Describe the one model that is served."""
        if name != pair.target_name:
            text = f"model {name!r} is not served here; this server has {pair.target_name!r}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return described

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Export counters in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/debug/engine")
    async def debug_engine() -> JSONResponse:
        """Show the engine's counters as they came last."""
        return JSONResponse(msgspec.to_builtins(client.snapshot) if client.snapshot else None)

    return app
