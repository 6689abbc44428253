"""Who asked, without a name: stable within a deployment, meaningless outside it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import Request

from serving.api.errors import ApiError
from serving.api.origin import Origin, origin_of, tenant_salt


def asked(salt: bytes = b"salt", user: str | None = None, **headers: str) -> Origin:
    """Return where a request with these headers comes from."""
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    app = SimpleNamespace(state=SimpleNamespace(tenant_salt=salt))
    return origin_of(Request({"type": "http", "headers": named, "app": app}), user)


def test_a_tenant_is_the_key_else_the_user_else_nobody():
    """Equal keys are one tenant whatever `user` says; no key and no user is nobody in particular."""
    first, second = asked(authorization="Bearer one"), asked(authorization="bearer  one ", user="x")
    assert first.tenant == second.tenant != asked(authorization="Bearer two").tenant
    assert len(first.tenant) == 16
    assert asked(user="x").tenant == asked(user="x").tenant != asked(user="y").tenant
    assert asked() == Origin(segment="default", tenant="", learn=True)
    assert asked(authorization="Basic one").tenant == ""


def test_the_name_says_nothing_outside_the_deployment(tmp_path):
    """Another deployment's secret gives another name; a deployment keeps its own, readable by its owner alone."""
    first, second = tenant_salt(tmp_path / "a"), tenant_salt(tmp_path / "b")
    assert first == tenant_salt(tmp_path / "a") != second
    assert asked(first, user="x").tenant != asked(second, user="x").tenant
    assert (tmp_path / "a" / "tenant-salt").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("value", "learn"), [("on", True), ("off", False)])
def test_learning_can_be_declined(value, learn):
    """The header says whether a request may be logged for training."""
    assert asked(x_draftsmith_learning=value).learn is learn


def test_bad_headers_are_named():
    """A value nobody knows is a 400 that names header, value and what is valid."""
    with pytest.raises(ApiError, match="x-draftsmith-learning is 'yes'; use on or off"):
        asked(x_draftsmith_learning="yes")
    with pytest.raises(ApiError, match="x-draftsmith-segment is 'a b'"):
        asked(x_draftsmith_segment="a b")
