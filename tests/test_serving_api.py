"""The API over real processes: what OpenAI clients send and read, refusals by name, clients and servers that die."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engine_rig import plain
from processes import Processes, get, serving_tiny
from tiny_pair import END
from tokenizers import Tokenizer

from adapter.contracts import Sampling
from adapter.sections import LogSettings
from serving.api.text import TargetText

MODEL = "tiny-target"
N = 24


@pytest.fixture(scope="module")
def service(_valkey_server) -> Iterator[Processes]:
    """Engine and API on the tiny pair, with four places, eight seats to wait in and a log that holds four entries."""
    _valkey_server.start()
    with serving_tiny(
        redis_url=_valkey_server.url, log=LogSettings(queue_entries=4, timeout_s=0.3, retry_s=0.1),
        engine={"max_batch": 4, "max_waiting": 8, "max_model_len": 500, "kv_tokens": 4096},
    ) as service:  # fmt: skip
        yield service


@pytest.fixture(scope="module")
def known(model, text) -> tuple[str, int, list[int], str]:
    """A prompt, a seed, and the answer they must give: ids from plain sampling, and plain ASCII text."""
    prompt = "the user and the thing"
    for seed in range(1000):
        ids = plain(model, text.encode(prompt), N, Sampling(temperature=1.0, seed=seed))
        answer = text.decode(ids)
        if answer.isascii() and not {0, 1, END} & set(ids) and len(set(answer)) > 12:
            return prompt, seed, ids, answer
    raise AssertionError("no seed gives plain text")


def _complete(service: Processes, **body: Any) -> httpx.Response:
    return service.post("/v1/completions", {"model": MODEL, "prompt": "the", "max_tokens": 2} | body)


def _chat(service: Processes, **body: Any) -> httpx.Response:
    base = {"model": MODEL, "messages": [{"role": "user", "content": "the"}], "max_tokens": 2}
    return service.post("/v1/chat/completions", base | body)


def _assert_error(response: httpx.Response, status: int, param: str | None, *words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


# -- answers ---------------------------------------------------------------------------------


def test_completions_say_what_plain_sampling_says(client, known):
    """Text, usage and finish reason of a seeded answer are those of sampling without cache or draft (I1, N1)."""
    prompt, seed, ids, answer = known
    said = client.completions.create(model=MODEL, prompt=prompt, seed=seed, max_tokens=N)
    assert said.choices[0].text == answer
    assert said.choices[0].finish_reason == "length"
    assert said.usage.completion_tokens == len(ids)
    assert said.usage.total_tokens == said.usage.prompt_tokens + len(ids)


def test_a_seed_gives_one_text(service, client, known):
    """Speculation off, every draft length, streamed or not, token ids or text as prompt: the same text (R1)."""
    prompt, seed, _, answer = known
    for speculative in ({"enabled": False}, {"gamma": 0}, {"gamma": 1}, {"gamma": 8}, {"enabled": True}):
        said = client.completions.create(
            model=MODEL, prompt=prompt, seed=seed, max_tokens=N, extra_body={"speculative": speculative}
        )
        assert said.choices[0].text == answer
    ids = TargetText(Path(service.settings.target)).encode(prompt)
    assert client.completions.create(model=MODEL, prompt=ids, seed=seed, max_tokens=N).choices[0].text == answer
    other = client.completions.create(model=MODEL, prompt=prompt, seed=seed + 1, max_tokens=N)
    assert other.choices[0].text != answer


def test_without_a_seed_answers_differ(client):
    """No seed means a fresh one a request, and a fresh one for every answer of it, to equal prompts too."""
    said = {client.completions.create(model=MODEL, prompt="the", max_tokens=N).choices[0].text for _ in range(4)}
    assert len(said) > 1
    listed = client.completions.create(model=MODEL, prompt=["the"] * 4, n=2, max_tokens=N).choices
    assert len({choice.text for choice in listed}) > 2  # with one seed a place in n there are two at most


def test_streams_join_to_the_whole_answer(client, known):
    """Chunks of text, one finish reason, and at the end one chunk with usage and no choices (N1, N2)."""
    prompt, seed, ids, answer = known
    chunks = list(
        client.completions.create(
            model=MODEL, prompt=prompt, seed=seed, max_tokens=N, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == answer
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == len(ids)
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_streams_and_wholes_agree(client):
    """A chat says the same streamed and whole; the first chunk carries the role, only the last a reason."""
    parts = [{"type": "text", "text": "é"}, {"type": "text", "text": "the"}]
    messages = [{"role": "system", "content": "in the end"}, {"role": "user", "content": parts}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, seed=5, max_completion_tokens=N)
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=messages, seed=5, max_completion_tokens=N, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.choices[0].message.role == "assistant"


def test_chat_prompts_are_the_templates(service, client, model, text):
    """What the engine continues is what transformers' own template makes of the messages."""
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "the thing"}, {"role": "assistant", "content": "and"},
                {"role": "user", "content": "on"}]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(service.settings.target)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert text.encode_chat(messages) == ids
    said = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)
    expected = plain(model, ids, 8, Sampling(temperature=0.0))
    expected = expected[: expected.index(END)] if END in expected else expected
    assert said.choices[0].message.content == text.decode(expected)
    assert said.usage.prompt_tokens == len(ids)


def test_many_clients_at_once_get_their_own_texts(service, known):
    """Thirty seeded requests through four places, asked by async clients, each get what they get alone (R1, D4)."""
    prompt, seed, _, answer = known

    async def ask(count: int) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="x", max_retries=0, timeout=120) as client:
            gate = asyncio.Semaphore(10)

            async def one(index: int) -> str:
                async with gate:
                    said = await client.completions.create(
                        model=MODEL, prompt=prompt, seed=seed + index % 3, max_tokens=N,
                        extra_body={"speculative": {"gamma": index % 6}},
                    )  # fmt: skip
                return said.choices[0].text

            return await asyncio.gather(*(one(index) for index in range(count)))

    said = asyncio.run(ask(30))
    assert set(said[::3]) == {answer}
    assert len(set(said)) == 3


def test_an_end_token_is_not_text(client, model, text):
    """An answer that ends by itself says stop, and counts its end token (S1)."""
    for seed in range(400):
        ids = plain(model, text.encode("on"), 6, Sampling(temperature=1.0, seed=seed))
        if END in ids[1:5]:
            break
    said = client.completions.create(model=MODEL, prompt="on", seed=seed, max_tokens=6)
    cut = ids[: ids.index(END) + 1]
    assert (said.choices[0].finish_reason, said.usage.completion_tokens) == ("stop", len(cut))
    assert said.choices[0].text == text.decode(cut)


# -- stop strings ----------------------------------------------------------------------------


def _tokens_until(tokenizer: Tokenizer, ids: list[int], stop: str) -> int:
    return next(n for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n]))


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_at_every_place(service, known, stream):
    """A stop string of one to five characters at every place, across tokens and blocks, cuts text and usage (S2)."""
    prompt, seed, ids, answer = known
    tokenizer = Tokenizer.from_file(f"{service.settings.target}/tokenizer.json")
    stops = [answer[start : start + 1 + start % 5] for start in range(len(answer))]

    more: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}

    def ask(stop: str) -> tuple[str, str | None, int]:
        with service.client() as client:
            said = client.completions.create(
                model=MODEL, prompt=prompt, seed=seed, max_tokens=N, stop=[stop, "never there"], stream=stream,
                extra_body={"speculative": {"gamma": 5}}, **more,
            )  # fmt: skip
            if not stream:
                return said.choices[0].text, said.choices[0].finish_reason, said.usage.completion_tokens
            chunks = list(said)
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
        reasons = [piece.finish_reason for piece in pieces if piece.finish_reason]
        assert len(reasons) == 1
        return "".join(piece.text for piece in pieces), reasons[0], chunks[-1].usage.completion_tokens

    with ThreadPoolExecutor(6) as pool:
        for stop, (said, reason, used) in zip(stops, pool.map(ask, stops), strict=True):
            assert said == answer[: answer.index(stop)], repr(stop)
            assert reason == "stop"
            assert used == _tokens_until(tokenizer, ids, stop)


def test_what_may_become_a_stop_string_is_not_lost(client, known):
    """Text that only begins like a stop string is delivered in full."""
    prompt, seed, _, answer = known
    said = client.completions.create(
        model=MODEL, prompt=prompt, seed=seed, max_tokens=N, stop=[answer[-3:] + "!", answer[4:8] + "\x01"]
    )
    assert (said.choices[0].text, said.choices[0].finish_reason) == (answer, "length")


def test_stop_and_max_tokens_in_one_block(client, known):
    """When the stop string completes with the last allowed token the reason is stop; one token less, length (S3)."""
    prompt, seed, _, answer = known
    stop = answer[-2:]
    for limit, reason in ((N, "stop"), (N - 2, "length")):
        said = client.completions.create(model=MODEL, prompt=prompt, seed=seed, max_tokens=limit, stop=stop)
        first = answer.index(stop)
        if first == len(answer) - 2:
            assert said.choices[0].finish_reason == reason
        assert said.usage.completion_tokens <= limit


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 3), ("suffix", "x"), ("store", True), ("functions", [{}]), ("modalities", ["audio"]),
        ("guided_json", {}), ("prompt_logprobs", 1), ("use_beam_search", True), ("bad_words", ["x"]),
        ("logits_processors", []), ("truncate_prompt_tokens", 5), ("reasoning_effort", "low"), ("no_such_field", 1),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(service, field, value):
    """A field that would change the output is never silently ignored."""
    _assert_error(_complete(service, **{field: value}), 400, field, field, "not supported")
    _assert_error(_chat(service, **{field: value}), 400, field, field, "not supported")


def test_a_best_of_other_than_n_is_refused_by_name(service):
    """The best one of three is not three answers; a `best_of` that equals n, or is null, picks nothing."""
    for more in ({"n": 3, "best_of": 1}, {"n": 3, "best_of": 4}, {"best_of": 2}, {"n": None, "best_of": 2},
                 {"best_of": True}):  # fmt: skip
        _assert_error(_complete(service, **more), 400, "best_of", "best_of")
        _assert_error(_chat(service, **more), 400, "best_of", "best_of")
    for more in ({"n": 3, "best_of": 3}, {"n": 3, "best_of": None}, {"n": None, "best_of": 1}, {"best_of": 1}):
        answered = _complete(service, **more)
        assert len(answered.json()["choices"]) == (more.get("n") or 1)


def test_neutral_values_are_accepted(service):
    """Clients that spell out defaults are served."""
    neutral = {
        "n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0,
        "min_tokens": 0, "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "store": False, "seed": None, "stop": None, "top_k": -1, "user": "u",
        "stream_options": None, "suffix": None, "service_tier": None,
    }  # fmt: skip
    assert _chat(service, **neutral).status_code == 200
    assert _complete(service, **neutral, echo=False).status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", -0.1, "temperature"), ("temperature", 2.1, "temperature"),
        ("temperature", "warm", "temperature"),
        ("top_p", 0, "top_p"), ("top_p", 1.01, "top_p"), ("top_k", -2, "top_k"), ("max_tokens", 0, "max_tokens"),
        ("seed", 2**64, "seed"), ("seed", "x", "seed"), ("stop", "", "stop"), ("stop", ["a"] * 17, "stop"),
        ("speculative", {"gamma": 99}, "speculative.gamma"), ("speculative", {"gamma": -1}, "speculative.gamma"),
        ("speculative", {"draft": "x"}, "speculative.draft"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("prompt", "", "prompt"), ("prompt", [], "prompt"), ("prompt", [5, 99999], "prompt"),
        ("prompt", [-1], "prompt"), ("prompt", [[5], []], "prompt"), ("prompt", [True], "prompt"), ("n", 0, "n"),
        ("n", 65, "n"), ("min_p", 1.1, "min_p"), ("presence_penalty", 2.1, "presence_penalty"),
        ("frequency_penalty", -2.1, "frequency_penalty"), ("repetition_penalty", 0, "repetition_penalty"),
        ("logit_bias", {"5": 101}, "logit_bias.5"), ("logit_bias", {"99999": 1}, "logit_bias"),
        ("logprobs", True, "logprobs"), ("logprobs", 21, "logprobs"), ("min_tokens", 3, "min_tokens"),
        ("stop_token_ids", [99999], "stop_token_ids"), ("cache_salt", "", "cache_salt"),
        ("response_format", {"type": "xml"}, "response_format.type"),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
        ("speculative", {"enabled": False, "gamma": 2}, "speculative.enabled"),
        ("speculative", {"version": 99}, "speculative.version"), ("spec_metrics", "detailed", "spec_metrics"),
        ("tools", [{"type": "function", "function": {"name": "f"}}], "tools"), ("top_logprobs", 2, "top_logprobs"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(service, field, value, param):
    """What cannot be meant gets a 400 that names the field."""
    _assert_error(_complete(service, **{field: value}), 400, param)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"), ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content.0.type"),
        ([{"role": "user"}], "messages.0.content"), ("hello", "messages"),
    ],
)  # fmt: skip
def test_bad_messages_are_refused(service, messages, param):
    """Roles and contents that are not served are a 400."""
    response = _chat(service, messages=messages)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_wrong_model_too_long_bad_json_unknown_path(service):
    """404 for another model or path, 400 for too many tokens and for a body that is not JSON; all OpenAI-shaped."""
    _assert_error(_complete(service, model="gpt-x"), 404, "model", "gpt-x", MODEL)
    _assert_error(_complete(service, prompt=[5] * 501), 400, "prompt", "500")
    _assert_error(_chat(service, messages=[{"role": "user", "content": "?" * 501}]), 400, "messages", "500")
    _assert_error(_complete(service, prompt=[5] * 100, max_tokens=401), 400, "max_tokens", "500")
    assert _complete(service, prompt=[5] * 100, max_tokens=400, temperature=0, stop=["the"]).status_code == 200
    broken = service.post("/v1/completions", content=b'{"model": ', headers={"content-type": "application/json"})
    _assert_error(broken, 400, None, "JSON")
    _assert_error(service.post("/v1/embeddings", {}), 404, None)
    body = {"model": MODEL, "prompt": "a"}
    response = service.post("/v1/completions", body, headers={"x-draftsmith-segment": "a b"})
    _assert_error(response, 400, "x-draftsmith-segment")
    response = service.post("/v1/completions", body, headers={"x-draftsmith-learning": "no"})
    _assert_error(response, 400, "x-draftsmith-learning", "on or off")


def test_openai_raises_its_own_errors(client):
    """The official client turns the bodies into its exception types with our message."""
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="'store' is not supported"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], store=True)
    with pytest.raises(openai.BadRequestError, match="'suffix' is not supported"):
        client.completions.create(model=MODEL, prompt="x", suffix="y", stream=True)


# -- health and metrics ----------------------------------------------------------------------


def test_health_ready_models(service, client):
    """Liveness, readiness and the one model."""
    assert json.loads(get(f"{service.url}/health")[1]) == {"status": "ok"}
    assert json.loads(get(f"{service.url}/ready")[1])["status"] == "ready"
    assert [model.id for model in client.models.list()] == [MODEL]


def test_metrics_carry_vllms_names(service, wait_for):
    """The counters dashboards read are there under their usual names, and count this traffic."""
    _complete(service, max_tokens=20, temperature=0)
    wait_for(lambda: service.metric("vllm:generation_tokens_total") > 0)
    text = get(f"{service.url}/metrics")[1]
    for name in (
        "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_accepted_tokens_per_pos_total",
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
        "vllm:num_preemptions_total", "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket", "vllm:e2e_request_latency_seconds_count",
        "draftsmith_examined_tokens_total", "draftsmith_log_dropped_total", "draftsmith_draft_generation",
    ):  # fmt: skip
        assert f"\n{name}{{" in text, name
    drafted = service.metric("vllm:spec_decode_num_draft_tokens_total")
    examined = service.metric("draftsmith_examined_tokens_total")
    assert drafted >= examined >= service.metric("vllm:spec_decode_num_accepted_tokens_total") > 0


# -- clients that leave, servers that are full -----------------------------------------------


def _cancelled(service: Processes) -> int:
    return int(service.debug()["finished_by_reason"].get("cancelled", 0))


def test_a_stream_that_is_left_frees_its_place(service, endless, wait_for):
    """Closing the connection after the first chunk ends the request in the engine (A4)."""
    before = _cancelled(service)
    body = {"model": MODEL, "prompt": endless, "max_tokens": 440, "temperature": 0, "stream": True}
    with service.stream("/v1/completions", body, timeout=60) as response:
        next(response.iter_lines())
    wait_for(lambda: _cancelled(service) == before + 1)
    wait_for(service.idle)


def test_a_whole_answer_that_is_left_frees_its_place(service, endless, wait_for):
    """A client that gives up waiting for an unstreamed answer frees its places, too.

    It asks for more answers than any machine gives in the time it waits.
    """
    before = _cancelled(service)
    body = {"model": MODEL, "prompt": endless, "max_tokens": 440, "min_tokens": 440, "n": 8, "temperature": 1.0}
    with pytest.raises(httpx.ReadTimeout):
        service.post("/v1/completions", body, timeout=0.15)
    wait_for(lambda: _cancelled(service) > before)
    wait_for(service.idle)


def test_clients_that_leave_before_the_first_token_free_their_seats(service, endless, wait_for):
    """Streams given up while they still waited for a place leave neither a place nor a seat taken."""
    body = {"model": MODEL, "prompt": endless, "max_tokens": 440, "temperature": 0, "stream": True}

    def leave(_index: int) -> None:
        with suppress(httpx.TimeoutException), service.stream("/v1/completions", body, timeout=0.2) as response:
            next(response.iter_lines())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(8)))
    wait_for(service.idle)


def test_a_full_server_says_429(service, endless, wait_for):
    """Beyond four places and eight seats requests are refused at once, with a hint when to come back."""

    def ask(_index: int) -> httpx.Response:
        return _complete(service, prompt=endless, max_tokens=200, temperature=0)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 12
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["Retry-After"]
    assert "busy" in refused.json()["error"]["message"]
    assert len({answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}) == 1
    wait_for(service.idle)


# -- neighbours that fail --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pause", "stop"])
def test_requests_do_not_notice_a_dead_valkey(service, valkey, known, wait_for, how):
    """With Valkey frozen or gone every request succeeds, drops are counted, and logging returns with it (I2, I5)."""
    prompt, seed, _, answer = known
    before = service.metric("draftsmith_log_dropped_total")
    getattr(valkey, how)()
    try:

        def ask(_index: int) -> str:
            return _complete(service, prompt=prompt, seed=seed, max_tokens=N).json()["choices"][0]["text"]

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(ask, range(24))) == {answer}
        wait_for(lambda: service.metric("draftsmith_log_dropped_total") > before)
        wait_for(lambda: service.metric("draftsmith_log_connected") == 0)
    finally:
        valkey.resume() if how == "pause" else valkey.start()

    def logged() -> bool:
        _complete(service)
        return service.metric("draftsmith_log_connected") == 1

    wait_for(logged, 60)


def test_a_killed_engine_loses_its_requests_in_words(service, endless, known, wait_for):
    """Requests that ran get an error, not a silence; after the restart the same API serves again."""
    prompt, seed, _, answer = known
    started = threading.Barrier(3)
    errors: list[str] = []

    def stream() -> None:
        with service.client() as client:
            said = client.completions.create(model=MODEL, prompt=endless, max_tokens=440, temperature=0, stream=True)
            next(said)
            started.wait(60)
            with pytest.raises(openai.APIError) as caught:
                list(said)
        errors.append(str(caught.value))

    threads = [threading.Thread(target=stream) for _ in range(2)]
    for thread in threads:
        thread.start()
    started.wait(60)
    service.kill_engine()
    service.start_engine()
    for thread in threads:
        thread.join(120)
    assert len(errors) == 2
    assert all("engine went away" in error for error in errors)
    wait_for(lambda: service.status("/ready") == 200, 60)
    wait_for(lambda: _complete(service, prompt=prompt, seed=seed, max_tokens=N).status_code == 200, 60)
    assert _complete(service, prompt=prompt, seed=seed, max_tokens=N).json()["choices"][0]["text"] == answer
    wait_for(service.idle)


def test_a_restarted_api_finds_the_engine(service, endless, known, wait_for):
    """An API process that was killed leaves requests behind; its successor ends them and serves on."""
    prompt, seed, _, answer = known
    body = {"model": MODEL, "prompt": endless, "max_tokens": 440, "temperature": 0, "stream": True}
    with service.stream("/v1/completions", body, timeout=60) as response:
        next(response.iter_lines())
        service.api.kill()
        service.api.wait(10)
    service.start_api()
    service.wait_ready()
    assert _complete(service, prompt=prompt, seed=seed, max_tokens=N).json()["choices"][0]["text"] == answer
    wait_for(service.idle)
