"""Whose request it is, which slice of traffic it belongs to, and whether anybody may learn from it.

Nobody is named: a tenant is a short hash, salted with a secret of the deployment, of the API key or, where none
was sent, of the body's `user`.
Called by `serving.api.routes`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

import msgspec
from fastapi import Request

from serving.api.errors import ApiError
from serving.api.limits import bearer_key

SEGMENT_HEADER = "x-draftsmith-segment"
LEARNING_HEADER = "x-draftsmith-learning"
DEFAULT_SEGMENT = "default"
_SEGMENT = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request comes from. `tenant` is empty where nobody is told apart."""

    segment: str = DEFAULT_SEGMENT
    tenant: str = ""
    learn: bool = True


def tenant_salt(data_dir: Path) -> bytes:
    """Return the deployment's secret for the names of tenants, made at its first start."""
    path = data_dir / "tenant-salt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f"{path.name}.tmp")
        with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)  # whole or not at all: half a secret would stay for good
    return path.read_bytes()


def origin_of(request: Request, user: str | None) -> Origin:
    """Read the headers; `user` is the body's field of that name.

    Raises:
        ApiError: 400, naming the header.
    """
    segment = request.headers.get(SEGMENT_HEADER, DEFAULT_SEGMENT)
    if not _SEGMENT.fullmatch(segment):
        raise ApiError(
            400, f"header {SEGMENT_HEADER} is {segment!r:.80}; use 1 to 64 of A-Z a-z 0-9 _ . : -",
            param=SEGMENT_HEADER,
        )  # fmt: skip
    learning = request.headers.get(LEARNING_HEADER, "on")
    if learning not in ("on", "off"):
        raise ApiError(400, f"header {LEARNING_HEADER} is {learning!r:.80}; use on or off", param=LEARNING_HEADER)
    named = bearer_key(request.scope) or user or ""
    salt: bytes = request.app.state.tenant_salt
    tenant = hmac.new(salt, named.encode(), hashlib.sha256).hexdigest()[:16] if named else ""
    return Origin(segment=segment, tenant=tenant, learn=learning == "on")
