"""From the client to the log, over real processes: whose request it was, and who declined to be learned from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from conftest import poll_until
from processes import Processes, serving_tiny

from adapter import keys
from adapter.contracts import Verdict, VerifiedBlock
from adapter.sections import ApiSettings, LogSettings
from adapter.wire import block_from_wire, outcome_from_wire

KEYS = ("first-key-of-two", "second-key-of-two")
BODY = {"model": "tiny-target", "prompt": "the user and", "max_tokens": 40, "seed": 3, "temperature": 1.0}


@pytest.fixture(scope="module")
def service(_valkey_server) -> Iterator[Processes]:
    """Engine and API that ask for a key and log half of what was not rejected."""
    _valkey_server.start()
    with serving_tiny(
        redis_url=_valkey_server.url, log=LogSettings(accepted_share=0.5), api=ApiSettings(keys=KEYS)
    ) as service:
        yield service


def _logged(client: redis.Redis, outcomes: int) -> list[VerifiedBlock]:
    """Return the blocks of the stream once so many requests have left their outcome behind them."""
    poll_until(lambda: client.xlen(keys.OUTCOMES) >= outcomes, 30)
    entries = client.xrange(keys.BLOCKS)
    return [block_from_wire(fields[keys.PAYLOAD_FIELD]) for _, fields in entries]


def test_blocks_say_whose_they_are_and_declined_requests_leave_none(service, valkey_client):
    """Two keys are two tenants without a name; a request that declined leaves its outcome alone (I7)."""
    asked = [
        (KEYS[0], {}, "a"), (KEYS[0], {"x-draftsmith-learning": "on"}, "b"), (KEYS[1], {}, "c"),
        (KEYS[1], {"x-draftsmith-learning": "off"}, "d"),
    ]  # fmt: skip
    texts = {}
    for key, more, name in asked:
        headers = {"authorization": f"Bearer {key}", "x-request-id": name} | more
        response = service.post("/v1/completions", {**BODY, "user": f"person-{name}"}, headers=headers)
        assert response.status_code == 200, response.text
        texts[name] = response.json()["choices"][0]["text"]
    assert len(set(texts.values())) == 1
    blocks = _logged(valkey_client, len(asked))
    tenants = {name: {b.tenant for b in blocks if f"-{name}-" in b.request_id} for _, _, name in asked}
    assert tenants["a"] == tenants["b"] != tenants["c"]
    assert tenants["d"] == set()
    assert all(
        len(tenant) == 16 and set(tenant) <= set("0123456789abcdef") for one in tenants.values() for tenant in one
    )
    entries = [fields for stream in (keys.BLOCKS, keys.OUTCOMES) for _, fields in valkey_client.xrange(stream)]
    for secret in (*KEYS, "person-"):
        assert not any(secret.encode() in value for fields in entries for value in fields.values())
    outcomes = [outcome_from_wire(f[keys.PAYLOAD_FIELD]) for _, f in valkey_client.xrange(keys.OUTCOMES)]
    assert sum("-d-" in outcome.request_id for outcome in outcomes) == 1


def test_the_share_of_the_settings_reaches_the_log(service, valkey_client):
    """With a share of a half, blocks say so and hold fewer positions than tokens; all rejections stay for themselves.

    Eight requests of 40 tokens; that a half of all positions that were not rejected is kept whole has a chance below
    2^-40.
    """
    for seed in range(8):
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        assert service.post("/v1/completions", {**BODY, "seed": seed}, headers=headers).status_code == 200
    blocks = _logged(valkey_client, 8)
    assert {block.keep_probability for block in blocks} == {0.5}
    generated = sum(len(block.array("token_ids")) + block.first_position - block.prompt_tokens for block in blocks)
    assert 0 < sum(block.num_records for block in blocks) < generated
    for block in blocks:
        rejected = block.array("verdicts") == Verdict.REJECTED
        assert block.row_weights()[rejected].tolist() == [1.0] * int(rejected.sum())


@pytest.mark.parametrize("value", ["no", "", "Off", "0"])
def test_an_unclear_wish_is_refused(service, value):
    """Nobody who meant to decline is logged by a spelling: anything but on and off is a 400 that names the header."""
    headers = {"authorization": f"Bearer {KEYS[0]}", "x-draftsmith-learning": value}
    response = service.post("/v1/completions", BODY, headers=headers)
    assert response.status_code == 400
    assert "x-draftsmith-learning" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "x-draftsmith-learning"
