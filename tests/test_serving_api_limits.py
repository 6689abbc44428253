"""What one request may cost the others, what an engine that goes away leaves, and names: of models and of people."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import openai
import pytest
import zmq
import zmq.asyncio
from processes import Processes, get, short_folder
from pydantic import BaseModel
from tiny_pair import TEMPLATE, pair_settings, write_draft, write_spaced_tokenizer, write_target, write_tokenizer
from tokenizers import Tokenizer, normalizers

from adapter.addresses import url_of
from adapter.contracts import Sampling, SettingsError, TokenLogprob
from adapter.models import prepare_pair
from adapter.pairs import find_draft
from adapter.sections import ApiSettings, LogSettings
from adapter.settings import Settings
from serving import ipc
from serving.api.answer import AnswerText
from serving.api.app import create_app
from serving.api.engine_client import EngineClient
from serving.api.errors import ApiError
from serving.api.text import TargetText
from serving.snapshot import Snapshot

MODEL = "house/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LENGTH = 120
_SAMPLING = Sampling(temperature=0.0)
NAMES_TEMPLATE = TEMPLATE.replace("+ message['content']", "+ (message.name or '') + message['content']")
TOOL_TEMPLATE = NAMES_TEMPLATE + "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def _spell_every_byte(folder: Path) -> None:
    """Give a written tokenizer the bytes it lacks, with ids behind all others."""
    path = folder / "tokenizer.json"
    spelled = json.loads(path.read_text())
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(byte) for byte in shown] + [chr(256 + place) for place in range(256 - len(shown))]
    vocab = spelled["model"]["vocab"]
    for name in names:
        vocab.setdefault(name, len(vocab))
    path.write_text(json.dumps(spelled))


def _write_hub(folder: Path) -> Path:
    """Write a pair whose target lies in a hub cache; return the target's folder."""
    cached = folder / "hub" / "models--house--tiny"
    target = cached / "snapshots" / COMMIT
    target.parent.mkdir(parents=True)
    model = write_target(target)
    _spell_every_byte(target)
    (target / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    write_draft(folder / "tiny-draft", target, model)
    return target


@pytest.fixture(scope="module")
def service() -> Iterator[Processes]:
    """Engine and API on a tiny target found by its hub name, listening on IPv6 where there is such a thing."""
    with pytest.MonkeyPatch.context() as patch, short_folder() as folder:
        target = _write_hub(folder)
        patch.setenv("HF_HUB_CACHE", str(folder / "hub"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        settings = pair_settings(
            folder, folder / "data", redis_url=f"unix://{folder}/nobody.sock", port=0, log=LogSettings(enabled=False),
            engine={"max_model_len": LENGTH}, host="::1" if _has_ipv6() else "127.0.0.1",
        )  # fmt: skip
        processes = Processes(settings.model_copy(update={"target": MODEL}))
        try:
            processes.start()
            processes.settings = settings.model_copy(update={"target": str(target)})  # for fixtures that read its files
            yield processes
        finally:
            processes.stop()


def _complete(service: Processes, **body: Any) -> httpx.Response:
    return service.post("/v1/completions", {"model": MODEL, "prompt": "the", "max_tokens": 8, "seed": 3} | body)


def _chat(service: Processes, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "the"}]
    return service.post("/v1/chat/completions", {"model": MODEL, "messages": messages, "max_tokens": 8} | body)


def _error(response: httpx.Response, status: int, param: str | None) -> str:
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param, response.text
    return str(response.json()["error"]["message"])


# -- an API in this process, and an engine that does what the test says -------------------------


@pytest.fixture(scope="module")
def local() -> Iterator[Settings]:
    """Settings of an ordinary tiny pair that nothing serves yet."""
    with short_folder() as folder:
        write_draft(folder / "tiny-draft", folder / "tiny-target", write_target(folder / "tiny-target"))
        yield pair_settings(folder, folder / "data")


@asynccontextmanager
async def _asking(settings: Settings) -> AsyncIterator[tuple[Any, httpx.AsyncClient]]:
    """An application on this event loop and a client of it."""
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    app = create_app(settings, prepare_pair(settings))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://t", timeout=60) as client,
    ):
        yield app, client


class Engine:
    """The engine's end of the line, moved by the test."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ipc.engine_endpoint(run_dir))
        self._peer = b""

    async def hear(self, kind: type[BaseModel] | type) -> Any:
        """Return the next message of a kind."""
        while True:
            self._peer, data = await self._socket.recv_multipart()
            message = ipc.decode_for_engine(data)
            if isinstance(message, kind):
                return message

    async def say(self, message: ipc.ToApi | bytes) -> None:
        """Send a message, or bytes that are none."""
        await self._socket.send_multipart([self._peer, message if isinstance(message, bytes) else ipc.encode(message)])

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def _snapshot() -> Snapshot:
    empty = {str: "a", int: 0, float: 0.0, bool: False, list[int]: [], dict[str, int]: {}}
    return Snapshot(
        **{name: empty.get(kind) for name, kind in get_type_hints(Snapshot).items() if name != "controller"}
    )


async def _until(condition: Callable[[], object]) -> None:
    """Let the loop go on until `condition` holds; the test's own time limit ends it."""
    while not condition():
        await asyncio.sleep(0.01)


@asynccontextmanager
async def _ready(app: Any, settings: Settings) -> AsyncIterator[Engine]:
    """An engine that an application has heard of."""
    engine = Engine(settings.run_dir)
    try:
        await engine.hear(ipc.Hello)
        await engine.say(_snapshot())
        await _until(lambda: app.state.client.alive)
        yield engine
    finally:
        engine.close()


def _run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, 60)

    asyncio.run(limited())


# -- names -------------------------------------------------------------------------------------


def test_a_target_is_served_under_the_name_it_was_given_by(service):
    """A hub name stays the model's name; the commit that its folder is called by is nobody's."""
    with service.client() as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
    assert _complete(service).json()["model"] == MODEL
    assert MODEL in _error(_complete(service, model=COMMIT), 404, "model")
    assert f'vllm:generation_tokens_total{{model_name="{MODEL}"}}' in get(f"{service.url}/metrics")[1]


def test_the_served_name_can_be_set(local):
    """`api.served_model_name` is what is listed, what requests must name, and what metrics say."""

    async def go() -> None:
        settings = local.model_copy(update={"api": ApiSettings(served_model_name="our/own")})
        async with _asking(settings) as (_, client):
            assert [row["id"] for row in (await client.get("/v1/models")).json()["data"]] == ["our/own"]
            body = {"model": "tiny-target", "prompt": "the"}
            assert "our/own" in _error(await client.post("/v1/completions", json=body), 404, "model")
            served = await client.post("/v1/completions", json=body | {"model": "our/own"})
            assert served.json()["error"]["code"] == "engine_unavailable"
            assert 'model_name="our/own"' in (await client.get("/metrics")).text

    _run(go())


def test_addresses_are_urls(service):
    """An IPv6 address is in brackets, and one that hears everything is named by one that can be opened."""
    for host, family, shown in (("127.0.0.1", socket.AF_INET, "127.0.0.1"), ("0.0.0.0", socket.AF_INET, "127.0.0.1")):
        with socket.create_server((host, 0), family=family) as listener:
            assert url_of(listener) == f"http://{shown}:{listener.getsockname()[1]}"
    if _has_ipv6():
        assert service.url.startswith("http://[::1]:")


def test_participant_names_reach_templates_that_show_them(service, local, text):
    """A name is in the prompt as the template writes it; where the template has no place for one, it is refused."""
    messages = [{"role": "user", "content": "the", "name": "ana"}]
    ids = text.encode_chat(messages)
    assert ids != text.encode_chat([{"role": "user", "content": "the"}])
    assert _chat(service, messages=messages, return_token_ids=True).json()["prompt_token_ids"] == ids

    async def go() -> None:
        async with _asking(local) as (_, client):
            body = {"model": "tiny-target", "messages": [{"role": "user", "content": "a"}, *messages]}
            said = _error(await client.post("/v1/chat/completions", json=body), 400, "messages.1.name")
            assert "leave it out" in said

    _run(go())


def test_strict_tools_are_told_what_to_send(service):
    """What the official client's helper makes is refused with the way out, and the way out is served."""

    class Look(BaseModel):
        where: str

    tool: Any = openai.pydantic_function_tool(Look)
    said = _error(_chat(service, tools=[tool]), 400, "tools.0.function.strict")
    assert '"strict": false' in said
    tool["function"]["strict"] = False
    assert _chat(service, tools=[tool], max_tokens=1).status_code in (200, 400)
    assert "strict" not in _chat(service, tools=[tool], max_tokens=1).text


def test_a_missing_draft_is_told_what_none_means(tmp_path):
    """`--draft none` means no draft model; other proposers go on."""
    with pytest.raises(SettingsError, match="without a draft model with `--draft none`"):
        find_draft("auto", "nobody's", tmp_path, "f" * 64)


# -- long bodies -------------------------------------------------------------------------------


def test_too_many_answers_are_refused_before_anything_is_read(service):
    """The number of answers is judged first: not one of these prompts could be read."""
    assert "65" in _error(_complete(service, prompt=[[99999]] * 65), 400, "n")
    assert "65" in _error(_chat(service, n=65, messages=[{"role": "user", "content": "é" * 9999}]), 400, "n")
    _error(_complete(service, prompt=[[5]] * 1025), 400, "prompt")


def test_text_that_cannot_fit_is_refused_by_its_length(service, text):
    """More characters than the context's tokens could ever spell are a 400 that gives the sizes."""
    most = LENGTH * text.longest_token
    long = "the " * most
    for response, param in (
        (_complete(service, prompt=long), "prompt"), (_complete(service, prompt=["the", long]), "prompt"),
        (_chat(service, messages=[{"role": "user", "content": long}]), "messages"),
    ):  # fmt: skip
        said = _error(response, 400, param)
        assert str(most) in said
        assert "characters" in said
        assert response.json()["error"]["code"] == "context_length_exceeded"
    _error(_complete(service, prompt=[99999] * LENGTH), 400, "prompt")
    text.check_length("x" * most, LENGTH)


@pytest.mark.parametrize("normalizer", [None, "NFC"])
def test_no_text_is_longer_than_its_tokens_can_spell(tmp_path, normalizer):
    """200 texts of up to 40 odd characters (seed 0): never fewer tokens than their length allows."""
    write_tokenizer(tmp_path)
    assert TargetText(tmp_path).longest_token is None  # it lacks bytes, so it drops what it cannot spell
    _spell_every_byte(tmp_path)
    if normalizer:
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        tokenizer.normalizer = getattr(normalizers, normalizer)()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = TargetText(tmp_path)
    rng = random.Random(0)
    pieces = [
        "the",
        " the",
        "é",
        "e\u0301",
        "\u03b1\u0313\u0300\u0345",
        "🙂",
        "\u1112\u1161\u11ab",
        "<|im_end|>",
        "\u2028",
    ]
    for _ in range(200):
        said = "".join(rng.choices(pieces, k=rng.randrange(1, 11)))
        assert len(text.encode(said)) * text.longest_token >= len(said)
    for broken in ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
                   {"pre_tokenizer": {"type": "WhitespaceSplit"}}):  # fmt: skip
        spelled = json.loads((tmp_path / "tokenizer.json").read_text())
        other = tmp_path / next(iter(broken))
        other.mkdir()
        (other / "tokenizer.json").write_text(json.dumps(spelled | broken))
        assert TargetText(other).longest_token is None


class _Where(TargetText):
    """A target's text that notes on which threads it encodes."""

    def encode(self, text: str, *, special: bool = True, param: str = "prompt") -> list[int]:
        self.threads = [*getattr(self, "threads", []), threading.get_ident()]
        return super().encode(text, special=special, param=param)


def test_long_texts_are_encoded_beside_the_event_loop(local):
    """Whichever endpoint takes a long text, others are answered meanwhile: no encoding on the loop's own thread."""
    said = "the user and " * 2000

    async def go() -> None:
        async with _asking(local) as (app, client):
            text = app.state.generator.text = _Where(Path(local.target))
            chat = {"model": "tiny-target", "messages": [{"role": "user", "content": said}]}
            for path, body in (
                ("/tokenize", {"prompt": said}), ("/tokenize", {"messages": chat["messages"]}),
                ("/v1/chat/completions", chat), ("/v1/completions", {"model": "tiny-target", "prompt": [said, "the"]}),
            ):  # fmt: skip
                await client.post(path, json=body)
            assert len(text.threads) == 5
            assert threading.get_ident() not in text.threads

    _run(go())


class _Counting(TargetText):
    """A target's text that counts the tokens it decodes."""

    decoded = 0

    def decode(self, token_ids: list[int], *, skip_special: bool = True) -> str:
        self.decoded += len(token_ids)
        return super().decode(token_ids, skip_special=skip_special)


@pytest.mark.parametrize("silent", [1, 5000])
def test_tokens_without_text_cost_no_more_than_others(tmp_path, silent):
    """A thousand special or unknown tokens in a row, in the middle of a character too, are read in linear work."""
    write_tokenizer(tmp_path)
    text = _Counting(tmp_path)
    smile = text.encode("🙂")
    ids = [*text.encode("the"), *[silent] * 1000, smile[0], *([silent] * 1000 if silent == 1 else []), *smile[1:],
           *text.encode(" end")]  # fmt: skip
    answer = AnswerText(text, [])
    said = "".join([*map(answer.push, ids), answer.finish()])
    assert said == "the🙂 end"
    assert answer.num_tokens == len(ids)
    assert text.decoded < 20 * len(ids)


def test_a_long_prompt_costs_its_answer_nothing(tmp_path):
    """However long the prompt, the same few of its tokens are decoded with the answer's."""
    write_tokenizer(tmp_path)
    costs = set()
    for length in (10, 5000):
        text = _Counting(tmp_path)
        answer = AnswerText(text, [], prompt=text.encode("a" * length))
        assert [answer.push(token) for token in text.encode("ab")] == ["a", "b"]
        costs.add(text.decoded)
    assert len(costs) == 1


# -- what is counted ---------------------------------------------------------------------------


def test_only_answers_have_a_latency(service):
    """A request that the engine refuses is in no histogram; an answered one is."""
    name = "vllm:e2e_request_latency_seconds_count"
    before = service.metric(name)
    _error(_complete(service, speculative={"version": 99}), 400, "speculative.version")
    assert service.metric(name) == before
    assert _complete(service).status_code == 200
    assert service.metric(name) == before + 1


def test_generation_tokens_are_those_of_usage(service):
    """What speculation committed behind a stop string is no token that anybody got."""
    answer = _complete(service, max_tokens=24).json()["choices"][0]["text"]
    before = service.metric("vllm:generation_tokens_total")
    used = 0
    for stop in answer[1:12]:
        body = {"max_tokens": 24, "stop": [stop], "speculative": {"gamma": 8}}
        used += _complete(service, **body).json()["usage"]["completion_tokens"]
    assert service.metric("vllm:generation_tokens_total") - before == used


@pytest.mark.parametrize(("controller", "own"), [("fixed", 3), ("adaptive", 8)])
def test_the_most_a_round_may_draft_is_told(local, controller, own):
    """Nothing when off, the request's own length, else the controller's most; the histogram has one entry more."""
    engine_settings = local.engine.model_copy(update={"controller": controller, "gamma": 3, "gamma_max": 8})
    settings = local.model_copy(update={"engine": engine_settings})

    async def go() -> None:
        async with _asking(settings) as (app, client), _ready(app, settings) as engine:
            for speculative, most in (({"enabled": False}, 0), ({"gamma": 0}, 0), ({"gamma": 5}, 5), ({}, own)):
                body = {"model": "tiny-target", "prompt": "the", "spec_metrics": "summary", "speculative": speculative}
                asked = asyncio.create_task(client.post("/v1/completions", json=body))
                submit = await engine.hear(ipc.Submit)
                await engine.say(ipc.Tokens(request_id=submit.request_id, token_ids=[20], finish_reason="length"))
                told = (await asked).json()["metrics"]["speculative_decoding"]
                assert told["num_spec_tokens"] == most
                assert len(told["acceptance_histogram"]) == most + 1

    _run(go())


# -- what is said of limits and of text --------------------------------------------------------


def test_lone_surrogates_are_refused_by_name(service):
    """Wherever a body spells half a character, the answer is a 400 that can itself be sent."""
    schema = {"type": "json_schema", "json_schema": {"schema": {"enum": ["\ud800"]}}}
    for more, param in (
        ({"response_format": schema}, "response_format.json_schema.schema"), ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"prompt": "\ud800"}, "prompt"), ({"\ud800": 1}, None), ({"logit_bias": {"\ud800": 1}}, None),
    ):  # fmt: skip
        content = json.dumps({"model": MODEL, "prompt": "the"} | more)
        response = service.post("/v1/completions", content=content, json=None,
                                headers={"Content-Type": "application/json"})  # fmt: skip
        assert response.status_code == 400, response.text
        assert param in (None, response.json()["error"]["param"]), response.text


def test_limits_that_were_not_sent_are_not_complained_of(service):
    """The room left is named against the field that was sent, and the default of a plain completion shrinks to it."""
    prompt = [5] * (LENGTH - 4)
    said = _complete(service, prompt=prompt, max_tokens=None, ignore_eos=True)
    assert said.json()["usage"]["completion_tokens"] == 4
    for more in ({}, {"max_tokens": None}):
        chat = _chat(service, min_tokens=LENGTH, **({"max_tokens": None} | more))
        assert f"'min_tokens' is {LENGTH}" in _error(chat, 400, "min_tokens")
    assert "'min_tokens' is 5" in _error(_complete(service, prompt=prompt, max_tokens=None, min_tokens=5), 400,
                                        "min_tokens")  # fmt: skip
    assert "'max_tokens' is 5" in _error(_complete(service, prompt=prompt, max_tokens=5), 400, "max_tokens")
    for older in (None, 5):  # the newer name wins
        newer = _chat(service, max_tokens=older, max_completion_tokens=LENGTH)
        assert f"'max_completion_tokens' is {LENGTH}" in _error(newer, 400, "max_completion_tokens")
        newer = _chat(service, max_tokens=older, max_completion_tokens=2, min_tokens=3)
        assert "more than max_completion_tokens, which is 2" in _error(newer, 400, "min_tokens")
    assert "more than max_tokens, which is 8" in _error(_chat(service, min_tokens=9), 400, "min_tokens")


# -- engines that go away, and loops that were busy ----------------------------------------------


def test_a_complete_answer_survives_the_engine(local):
    """When the stop string was found and the engine dies before its summary, the answer is a 200."""

    async def go() -> None:
        for stream in (False, True):
            async with _asking(local) as (app, client), _ready(app, local) as engine:
                body = {"model": "tiny-target", "prompt": "the", "stop": ["user"], "stream": stream}
                asked = asyncio.create_task(client.post("/v1/completions", json=body))
                submit = await engine.hear(ipc.Submit)
                ids = app.state.generator.text.encode("and user")
                await engine.say(ipc.Tokens(request_id=submit.request_id, token_ids=ids, finish_reason=None))
                await engine.hear(ipc.End)
                engine.close()
                answer = await asked
                assert answer.status_code == 200
                assert '"and "' in answer.text
                assert '"error"' not in answer.text

    _run(go())


def test_events_survive_clients_that_split_lines_as_python_does(local):
    """Line separators in a text are escaped, so that every line of a stream is an event."""
    prompt = "a\u2028b\u2029c\u0085d"

    async def go() -> None:
        async with _asking(local) as (app, client), _ready(app, local) as engine:
            body = {"model": "tiny-target", "prompt": prompt, "echo": True, "stream": True}
            asked = asyncio.create_task(client.post("/v1/completions", json=body))
            submit = await engine.hear(ipc.Submit)
            await engine.say(ipc.Tokens(request_id=submit.request_id, token_ids=[20], finish_reason="length"))
            lines = [line.removeprefix("data: ") for line in (await asked).text.splitlines() if line]
        said = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
        assert said.startswith(prompt)

    _run(go())


def test_an_answer_keeps_the_space_it_begins_with(local, tmp_path):
    """Where the tokenizer drops a text's first space, answers have theirs: echoed, streamed, in offsets and chats."""
    tokenizer = write_spaced_tokenizer(tmp_path)
    template = "{% for message in messages %}{{ message.content }}</s><s>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    ids = [tokenizer.token_to_id(piece) for piece in ("▁Paris", ".")]
    prompt = "The capital is"
    logprobs = [TokenLogprob(logprob=-1.0), TokenLogprob(logprob=-2.0)]
    chat = {"messages": [{"role": "user", "content": prompt}]}

    async def go() -> None:
        async with _asking(local) as (app, client), _ready(app, local) as engine:
            text = app.state.generator.text = TargetText(tmp_path)

            async def ask(path: str, **body: Any) -> httpx.Response:
                asked = asyncio.create_task(client.post(path, json={"model": "tiny-target"} | body))
                submit = await engine.hear(ipc.Submit)
                await engine.say(
                    ipc.Tokens(request_id=submit.request_id, token_ids=ids, finish_reason="length", logprobs=logprobs)
                )
                return await asked

            for given in (prompt, text.encode(prompt)):
                for more, said in (({}, " Paris."), ({"echo": True}, f"{prompt} Paris."), ({"stop": ["is."]}, " Par")):
                    whole = await ask("/v1/completions", prompt=given, **more)
                    assert whole.json()["choices"][0]["text"] == said
                    streamed = await ask("/v1/completions", prompt=given, stream=True, **more)
                    lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
                    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == said
            told = (await ask("/v1/completions", prompt=prompt, logprobs=0)).json()["choices"][0]["logprobs"]
            assert (told["tokens"], told["text_offset"]) == ([" Paris", "."], [0, 6])
            answer = await ask("/v1/chat/completions", **chat)
            assert answer.json()["choices"][0]["message"]["content"] == " Paris."

    _run(go())


def test_a_message_that_cannot_be_read_is_skipped(local):
    """Bytes of another version do not end the reading: what comes after them is heard."""

    async def go() -> None:
        client = EngineClient(local.run_dir)
        await client.start()
        engine = Engine(local.run_dir)
        try:
            await engine.hear(ipc.Hello)
            await engine.say(b"\xc1 no message")
            await engine.say(b"\x81\xa4type\xa7Unknown")
            await engine.say(_snapshot())
            await _until(lambda: client.alive)
        finally:
            engine.close()
            await client.stop()

    _run(go())


def test_a_loop_that_was_busy_takes_nobody_for_dead(local):
    """An hour in which this process read nothing is no hour of silence: the request it had still ends well."""

    async def go() -> None:
        now, pace, looks = [0.0], [0.0], [0]

        async def sleep(seconds: float) -> None:
            await asyncio.sleep(0.001)
            now[0] += pace[0] * seconds
            looks[0] += 1

        client = EngineClient(local.run_dir, clock=lambda: now[0], sleep=sleep)
        await client.start()
        engine = Engine(local.run_dir)
        try:
            await engine.hear(ipc.Hello)
            await engine.say(_snapshot())
            await _until(lambda: client.alive)
            submit = ipc.Submit(request_id="r", token_ids=[5], max_tokens=1, sampling=_SAMPLING, end_tokens=[],
                                segment="default", gamma=None)  # fmt: skip
            got: list[ipc.Tokens] = []

            async def ask() -> None:
                got.extend([tokens async for tokens in client.generate(submit)])

            asked = asyncio.create_task(ask())
            await engine.hear(ipc.Submit)
            now[0] += 3600.0
            assert client.alive
            seen = looks[0]
            await _until(lambda: looks[0] > seen + 2)  # it had an occasion to judge
            await engine.say(ipc.Tokens(request_id="r", token_ids=[5], finish_reason="length"))
            await asked
            assert [tokens.token_ids for tokens in got] == [[5]]
            pace[0] = 1.0  # an engine that says nothing while this process listens is dead all the same, in the end
            await _until(lambda: not client.alive)
            assert now[0] > 3600.0 + 120.0
            with pytest.raises(ApiError):
                await ask()
        finally:
            engine.close()
            await client.stop()

    _run(go())
