"""Every field the API serves, over real processes and through the official client where it has a word for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from engine_rig import plain
from processes import Processes, get, serving_tiny
from tiny_pair import END
from transformers import AutoTokenizer, LlamaForCausalLM

from adapter.contracts import Sampling
from adapter.sections import LogSettings
from serving.api.choices import derived_seed
from serving.api.text import TargetText

MODEL = "tiny-target"
N = 12
TOOLS_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    "<tool_call>{name, arguments}</tool_call>{% endif %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}"
    "\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "é", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def service(_valkey_server) -> Iterator[Processes]:
    """Engine and API on the tiny pair, whose chat template knows tools."""
    _valkey_server.start()
    with serving_tiny(
        redis_url=_valkey_server.url, chat_template=TOOLS_TEMPLATE, log=LogSettings(enabled=False),
        engine={"max_batch": 4, "max_waiting": 64, "max_model_len": 500, "kv_tokens": 4096},
    ) as service:  # fmt: skip
        yield service


def _post(service: Processes, path: str, **body: Any) -> dict[str, Any]:
    response = service.post(path, body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def _complete(service: Processes, **body: Any) -> dict[str, Any]:
    return _post(service, "/v1/completions", **({"model": MODEL, "prompt": "the", "max_tokens": N, "seed": 3} | body))


def _chat(service: Processes, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "the"}]
    return _post(service, "/v1/chat/completions", **({"model": MODEL, "messages": messages, "max_tokens": N} | body))


def _stream(service: Processes, path: str, **body: Any) -> list[dict[str, Any]]:
    with service.stream(path, {**body, "stream": True}) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def _answer(model: LlamaForCausalLM, text: TargetText, prompt: str, seed: int, count: int = N) -> list[int]:
    ids = plain(model, text.encode(prompt), count, Sampling(temperature=1.0, seed=seed))
    return ids[: ids.index(END) + 1] if END in ids else ids


# -- several answers -------------------------------------------------------------------------


def test_lists_of_prompts_and_n_are_answered_as_if_alone(service, client, model, text):
    """Choice prompt * n + i is what plain sampling says with the seed of answer i; usage adds up (N1, R1)."""
    prompts = ["the user", "in the thing", "on"]
    said = client.completions.create(model=MODEL, prompt=prompts, n=2, seed=3, max_tokens=N)
    expected = [_answer(model, text, prompt, derived_seed(3, i)) for prompt in prompts for i in range(2)]
    assert [choice.index for choice in said.choices] == list(range(6))
    assert [choice.text for choice in said.choices] == [text.decode(ids) for ids in expected]
    assert said.usage.completion_tokens == sum(map(len, expected))
    assert said.usage.prompt_tokens == sum(len(text.encode(prompt)) for prompt in prompts)
    ids = [text.encode(prompt) for prompt in prompts]
    again = client.completions.create(model=MODEL, prompt=ids, n=2, seed=3, max_tokens=N)
    assert [choice.text for choice in again.choices] == [choice.text for choice in said.choices]
    single = client.completions.create(model=MODEL, prompt=prompts[1], seed=3, max_tokens=N)
    assert single.choices[0].text == said.choices[2].text


def test_serving_n2_streams_of_several_answers_join_to_the_whole_ones(service):
    """Pieces of all choices arrive in one stream, each with its index, and usage at the end covers all (N2)."""
    body = {"model": MODEL, "prompt": ["the", "on"], "n": 2, "seed": 5, "max_tokens": N}
    whole = _complete(service, **body)
    events = _stream(service, "/v1/completions", **body, stream_options={"include_usage": True})
    texts = dict.fromkeys(range(4), "")
    reasons: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                assert choice["index"] not in reasons
                reasons[choice["index"]] = choice["finish_reason"]
    assert [texts[index] for index in range(4)] == [choice["text"] for choice in whole["choices"]]
    assert [reasons[index] for index in range(4)] == [choice["finish_reason"] for choice in whole["choices"]]
    assert not events[-1]["choices"]
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(event["usage"] is None for event in events[:-1])


def test_chats_with_n(client):
    """Each chat answer has its own index and role chunk, streamed or whole."""
    messages: Any = [{"role": "user", "content": "the"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, n=3, seed=5, max_tokens=N)
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=messages, n=3, seed=5, max_tokens=N, stream=True)
    )
    texts = dict.fromkeys(range(3), "")
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [texts[index] for index in range(3)] == [choice.message.content for choice in whole.choices]
    assert sum(chunk.choices[0].delta.role == "assistant" for chunk in chunks) == 3
    assert len(set(texts.values())) > 1


# -- what is reported ------------------------------------------------------------------------


def test_serving_n1_n2_counts_are_delivered_ids(service, text):
    """Usage counts the ids that were sent, streamed or whole, at any draft length, with stops and caps (N1, N2)."""
    for gamma in (0, 1, 8):
        for more in (
            {},
            {"stop": ["e", "q"]},
            {"stop_token_ids": [20, 40, 60]},
            {"ignore_eos": True, "max_tokens": 40},
        ):
            body = {"model": MODEL, "prompt": "the", "seed": 8, "max_tokens": N, "return_token_ids": True,
                    "logprobs": 1, "speculative": {"gamma": gamma}} | more  # fmt: skip
            whole = _complete(service, **body)
            [choice] = whole["choices"]
            assert whole["usage"]["completion_tokens"] == len(choice["token_ids"])
            assert choice["prompt_token_ids"] == text.encode("the")
            assert {len(values) for values in choice["logprobs"].values()} == {len(choice["token_ids"])}
            options = {"include_usage": True, "continuous_usage_stats": True}
            events = _stream(service, "/v1/completions", **body, stream_options=options)
            ids: list[int] = []
            for event in events[:-1]:
                ids += event["choices"][0]["token_ids"]
                assert event["usage"]["completion_tokens"] == len(ids)
            assert ids == choice["token_ids"]
            assert events[-1]["usage"]["completion_tokens"] == len(ids)
            parts = [event["choices"][0]["logprobs"] for event in events[1:-1]]
            for name, values in choice["logprobs"].items():
                if name in ("tokens", "text_offset"):
                    assert [value for part in parts for value in part[name]] == values


def test_serving_l1_logprobs_are_the_targets(client, model, text):
    """Log-probs of every answer token equal the model's own, chosen and alternatives, chat and completion (L1)."""
    said = client.completions.create(model=MODEL, prompt="the user", logprobs=3, seed=4, max_tokens=N)
    ids = _answer(model, text, "the user", 4)
    prompt = text.encode("the user")
    rows = torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float(), -1)
    got = said.choices[0].logprobs
    own = [rows[place, token].item() for place, token in enumerate(ids)]
    assert got.token_logprobs == pytest.approx(own, abs=1e-3)
    for place, token in enumerate(ids):
        best = rows[place].topk(3).indices.tolist()
        assert len(got.top_logprobs[place]) == len({*best, token})
        assert max(got.top_logprobs[place].values()) == pytest.approx(rows[place].max().item(), abs=1e-3)
    assert got.text_offset[0] == 0
    assert got.text_offset == sorted(got.text_offset)
    assert said.choices[0].text[got.text_offset[3] :].startswith(text.decode(ids[3:4]))


def test_chat_logprobs_carry_bytes(client, text):
    """The bytes of a chat's log-probs are the bytes of its answer; top_logprobs has as many as were asked for."""
    messages: Any = [{"role": "user", "content": "the"}]
    whole = client.chat.completions.create(
        model=MODEL, messages=messages, logprobs=True, top_logprobs=2, seed=4, max_tokens=N,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )  # fmt: skip
    entries = whole.choices[0].logprobs.content
    said = b"".join(bytes(entry.bytes or []) for entry in entries)
    assert said.decode(errors="replace") == whole.choices[0].message.content
    assert {len(entry.top_logprobs) for entry in entries} == {2}
    assert whole.usage.completion_tokens == len(entries) == N
    streamed = client.chat.completions.create(
        model=MODEL, messages=messages, logprobs=True, seed=4, max_tokens=N, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [entry.token for part in parts for entry in part.content] == [entry.token for entry in entries]


def test_serving_n3_speculation_is_reported_on_request_only(service):
    """By field or header, whole or streamed: counts that fit the answer; otherwise no word of it (N3, N4)."""
    assert "metrics" not in _complete(service)
    told = _complete(service, spec_metrics="summary", speculative={"gamma": 3})["metrics"]["speculative_decoding"]
    assert len(told["acceptance_histogram"]) == 4
    assert sum(told["acceptance_histogram"]) == told["num_spec_steps"] > 0
    assert told["num_accepted_draft_tokens"] == sum(told["num_accepted_tokens_per_pos"]) <= told["num_draft_tokens"]
    body = {"model": MODEL, "prompt": "the", "max_tokens": N, "seed": 3, "speculative": {"enabled": False}}
    response = service.post("/v1/completions", body, headers={"X-Draftsmith-Spec-Metrics": "summary"})
    plainly = response.json()["metrics"]["speculative_decoding"]
    assert (plainly["num_spec_steps"], plainly["num_draft_tokens"], plainly["draft_acceptance_rate"]) == (0, 0, None)
    assert plainly["num_plain_steps"] == response.json()["usage"]["completion_tokens"]
    body |= {"speculative": {"gamma": 3}}
    last = _stream(service, "/v1/completions", **body, spec_metrics="summary", stop=["e"])[-1]
    assert last["metrics"]["speculative_decoding"]["num_spec_tokens"] == 3
    assert last["choices"] == []


def test_cached_tokens_are_reported_behind_a_stop_string_too(service):
    """The engine's summary reaches usage however the answer ended."""
    for more in ({}, {"stop": ["e"]}, {"stop": ["e"], "n": 2}):
        usage = _complete(service, prompt="the user and the thing", max_tokens=30, **more)["usage"]
        assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


# -- how answers begin and end ---------------------------------------------------------------


def test_echo_repeats_the_prompt(service, text):
    """The prompt stands before the answer, text or ids, streamed or whole; with log-probs it is refused by name."""
    plain_text = _complete(service)["choices"][0]["text"]
    assert _complete(service, echo=True)["choices"][0]["text"] == "the" + plain_text
    assert _complete(service, echo=True, prompt=text.encode("the"))["choices"][0]["text"] == "the" + plain_text
    events = _stream(service, "/v1/completions", model=MODEL, prompt="the", max_tokens=N, seed=3, echo=True)
    assert "".join(event["choices"][0]["text"] for event in events) == "the" + plain_text
    body = {"model": MODEL, "prompt": "the", "echo": True, "logprobs": 1}
    refused = service.post("/v1/completions", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")


def test_serving_s2_stops_are_kept_when_asked_for(service, text):
    """include_stop_str_in_output keeps the string; the reason is named either way (S2)."""
    answer = _complete(service)["choices"][0]["text"]
    stop = next(answer[i : i + 2] for i in range(3, len(answer)) if answer[i : i + 2].isascii())
    cut = answer[: answer.index(stop)]
    [without] = _complete(service, stop=[stop])["choices"]
    [with_it] = _complete(service, stop=[stop], include_stop_str_in_output=True)["choices"]
    assert (without["text"], without["finish_reason"], without["stop_reason"]) == (cut, "stop", stop)
    assert (with_it["text"], with_it["stop_reason"]) == (cut + stop, stop)


def test_serving_s1_stop_token_ids_end_an_answer(service, model, text):
    """A named token ends the answer, counts, is no text, and is the stop reason; ignore_eos spares it (S1, S4)."""
    ids = plain(model, text.encode("the"), N, Sampling(temperature=1.0, seed=3))
    token = next(token for token in ids[2:] if token not in ids[:2] and token != END)
    cut = ids[: ids.index(token) + 1]
    for more in ({}, {"ignore_eos": True}):
        if END in cut and not more:
            continue
        said = _complete(service, stop_token_ids=[token], return_token_ids=True, **more)["choices"][0]
        assert (said["token_ids"], said["finish_reason"], said["stop_reason"]) == (cut, "stop", token)
        assert said["text"] == text.decode(cut[:-1])


def test_serving_s4_ignore_eos_runs_to_the_cap(service, model, text):
    """With ignore_eos an end token is an ordinary one (S4)."""
    for seed in range(400):
        ids = plain(model, text.encode("on"), N, Sampling(temperature=1.0, seed=seed))
        if END in ids[1:5]:
            break
    said = _complete(service, prompt="on", seed=seed, ignore_eos=True, return_token_ids=True)
    assert said["choices"][0]["token_ids"] == ids
    assert said["choices"][0]["finish_reason"] == "length"
    shown = _complete(service, prompt="on", seed=seed, ignore_eos=True, skip_special_tokens=False)
    assert "<|im_end|>" in shown["choices"][0]["text"]


def test_neutral_scheduling_fields_change_no_text(service):
    """Priority, cache salt, user, labels and a named live version are served and change nothing that is said."""
    answer = _complete(service)["choices"][0]["text"]
    for more in ({"priority": -3}, {"cache_salt": "tenant"}, {"user": "u"}, {"metadata": {"a": "b"}},
                 {"speculative": {"version": "live"}}, {"speculative": {"version": "floor"}},
                 {"response_format": {"type": "text"}}):  # fmt: skip
        assert _complete(service, **more)["choices"][0]["text"] == answer


# -- tools -----------------------------------------------------------------------------------


def test_tools_reach_the_prompt_as_transformers_renders_them(service, client, text):
    """The template gets tools, calls with objects as arguments, and tool answers; tool_choice none leaves tools out."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    messages: Any = [
        {"role": "user", "content": "the"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "on"},
    ]  # fmt: skip
    parsed = [messages[0], {"role": "assistant", "content": "",
              "tool_calls": [call | {"function": {"name": "f", "arguments": {"x": "é"}}}]}, messages[2]]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(service.settings.target)
    for tools, choice in (([TOOL], "auto"), ([TOOL], "none")):
        shown = tools if choice == "auto" else None
        ids = tokenizer.apply_chat_template(parsed, tools=shown, add_generation_prompt=True)["input_ids"]
        said = client.chat.completions.create(
            model=MODEL, messages=messages, tools=tools, tool_choice=choice, max_tokens=4, temperature=0,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        assert said.model_extra["prompt_token_ids"] == ids
        assert said.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"), ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools.0.function.strict"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ],
)  # fmt: skip
def test_what_tools_cannot_do_here_is_refused_by_name(service, more, param):
    """Forced calls, one call at a time and strict arguments are a 400."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "tools": [TOOL]} | more
    refused = service.post("/v1/chat/completions", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


# -- other endpoints -------------------------------------------------------------------------


def test_tokenize_and_detokenize(service, text):
    """Texts and chats to ids in vLLM's shape, and back."""
    ids = text.encode("the é🙂")
    told = _post(service, "/tokenize", model=MODEL, prompt="the é🙂", return_token_strs=True)
    assert told == {"count": len(ids), "max_model_len": 500, "tokens": ids, "token_strs": told["token_strs"]}
    assert len(told["token_strs"]) == len(ids)
    assert _post(service, "/detokenize", tokens=[*ids, END]) == {"prompt": "the é🙂<|im_end|>"}
    messages = [{"role": "user", "content": "the"}]
    chat = _post(service, "/tokenize", messages=messages)
    assert (chat["tokens"], chat["token_strs"]) == (text.encode_chat(messages), None)
    tools = _post(service, "/tokenize", messages=messages, tools=[TOOL])
    assert tools["tokens"] == text.encode_chat(messages, [TOOL]) != chat["tokens"]
    short = _post(service, "/tokenize", messages=messages, add_generation_prompt=False)
    assert short["tokens"] == text.encode_chat(messages, add_generation_prompt=False) != chat["tokens"]
    for path, body, param in (
        ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "a", "messages": messages}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "x"}, "model"), ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/tokenize", {"prompt": "a", "truncate": 1}, "truncate"),
        ("/tokenize", {"messages": messages, "tools": [TOOL] * 129}, "tools"),
    ):  # fmt: skip
        refused = service.post(path, body)
        assert refused.status_code in (400, 404)
        assert refused.json()["error"]["param"] == param


def test_version_and_request_ids(service):
    """The version is the installed one; a sane request id is the response's, an unsafe one is replaced."""
    assert json.loads(get(f"{service.url}/version")[1])["version"]
    for given, kept in (("my-id.1", True), ("a b", False)):
        for _ in range(2):  # the same id twice is two requests
            body = {"model": MODEL, "prompt": "a", "max_tokens": 2}
            response = service.post("/v1/completions", body, headers={"X-Request-Id": given})
            assert (response.headers["X-Request-Id"] == given) is kept
            assert response.json()["id"] == f"cmpl-{response.headers['X-Request-Id']}"
    assert httpx.get(f"{service.url}/nothing", headers={"X-Request-Id": "q"}).headers["X-Request-Id"] == "q"
