"""JSON answers under speculation: masks against an enumerated language, and answers against its definition.

The language of the small schema below is finite and written out as strings, so what may come next
at any place follows from string prefixes alone, without the library the engine uses.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_rig import Changing, Rig, build_rig, counts_of, prompts, reference_models, request, shared_rigs
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits
from tiny_pair import END, write_tokenizer
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from adapter.contracts import Grammar, Sampling
from kernels.sampling import draw, shape_logits
from serving import ipc
from serving.engine import grammar as grammar_module
from serving.engine.admission import Admission, Refusal
from serving.engine.constraints import constraints_for
from serving.engine.grammar import MAX_SCHEMA_BYTES, GrammarError, Grammars
from serving.engine.parameters import row_params
from serving.engine.sequence import Sequence

SCHEMA = {
    "type": "object",
    "properties": {"the": {"enum": ["x", "the", "théier", "user"]}, "on": {"type": "boolean"}},
    "required": ["the", "on"],
    "additionalProperties": False,
}
SMALL = Grammar(kind="json_schema", schema=json.dumps(SCHEMA))
OBJECT = Grammar(kind="json_object")
LONGEST = 48  # tokens of the longest answer, a byte each and the end
ENDS = frozenset([END])


def _language() -> frozenset[bytes]:
    """Every answer of SMALL: at most one space beside each of the structural characters."""
    words = [json.dumps(word, ensure_ascii=False) for word in SCHEMA["properties"]["the"]["enum"]]
    texts = set()
    for word, flag in product(words, ("true", "false")):
        for gaps in product(("", " "), repeat=8):
            a, b, c, d, e, f, g, h = gaps
            texts.add(f'{{{a}"the"{b}:{c}{word}{d},{e}"on"{f}:{g}{flag}{h}}}'.encode())
    return frozenset(texts)


LANGUAGE = _language()
PREFIXES = frozenset(text[:length] for text in LANGUAGE for length in range(len(text) + 1))


@pytest.fixture(scope="module")
def spelled(folder) -> list[bytes | None]:
    """The bytes of every token, None for special ones; byte-level BPE writes bytes as printable characters."""
    tokenizer = Tokenizer.from_file(str(folder / "tiny-target" / "tokenizer.json"))
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in shown}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in shown)}
    names = [tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size())]
    return [None if name.startswith("<|") else bytes(byte_of[char] for char in name) for name in names]


@pytest.fixture(scope="module")
def grammars(folder, spelled) -> Grammars:
    return Grammars(folder / "tiny-target" / "tokenizer.json", len(spelled))


def allowed_by_definition(text: bytes, spelled: list[bytes | None], ends: frozenset[int] = ENDS) -> set[int]:
    """Tokens that keep the text a prefix of some answer, and the end tokens where it is one."""
    going_on = {token for token, more in enumerate(spelled) if more and text + more in PREFIXES}
    return going_on | (ends if text in LANGUAGE else set())


def allowed(matcher: Any, before: list[int], vocab: int) -> set[int]:
    logits = torch.zeros(vocab)
    matcher.restrict(logits, before)
    return set(torch.nonzero(logits == 0).flatten().tolist())


# -- masks -----------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_serving_g1_looking_ahead_leaves_no_trace(grammars, spelled, data):
    """Any drafts, legal or not, looked at in any order, and any commits: masks are the language's at every row (G1)."""
    matcher, said, over = grammars.open(SMALL, ENDS), [], False
    choose = st.integers(0, 10**6)
    while not over:
        for _ in range(data.draw(st.integers(0, 2))):  # drafts of which nothing may be kept
            drafted = []
            for _ in range(data.draw(st.integers(1, 6))):
                text = b"".join(spelled[token] or b"" for token in said + drafted)
                possible = sorted(allowed_by_definition(text, spelled)) if data.draw(st.booleans()) else []
                possible = possible or list(range(3, 120))
                drafted.append(possible[data.draw(choose) % len(possible)])
            rows = list(range(len(drafted) + 1))
            for j in data.draw(st.permutations(rows)):
                text = b"".join(spelled[token] or b"?" for token in said + drafted[:j])
                if text in PREFIXES and END not in drafted[:j]:
                    got = allowed(matcher, drafted[:j], len(spelled))
                    assert got == allowed_by_definition(text, spelled)
                else:
                    assert allowed(matcher, drafted[:j], len(spelled)) == ENDS
        count = data.draw(st.integers(1, 4))
        kept = []
        while len(kept) < count and not over:
            text = b"".join(spelled[token] for token in said + kept)
            possible = sorted(allowed_by_definition(text, spelled))
            kept.append(possible[data.draw(choose) % len(possible)])
            over = kept[-1] == END
        matcher.commit(kept)
        said += kept
    assert not matcher.failed
    assert b"".join(spelled[token] for token in said[:-1]) in LANGUAGE


def test_serving_s6_completion_allows_exactly_the_ends(grammars, spelled):
    """Behind a complete answer only the request's end tokens may come, also inside a drafted block (S6)."""
    text = b'{"the":"x","on":true}'
    tokens = [spelled.index(bytes([byte])) for byte in text]
    for ends in (frozenset([2]), frozenset([0, 2]), frozenset([1, 50])):
        matcher = grammars.open(SMALL, ends)
        matcher.commit(tokens[:5])
        assert allowed(matcher, tokens[5:], len(spelled)) == ends
        assert ends.isdisjoint(allowed(matcher, tokens[5:-1], len(spelled)))
        matcher.commit(tokens[5:])
        assert allowed(matcher, [], len(spelled)) == ends


def test_a_number_may_end_or_go_on(grammars, spelled):
    """Where an answer is complete and could be longer, both the end and what goes on are allowed."""
    matcher = grammars.open(Grammar(kind="json_schema", schema='{"type": "integer"}'), ENDS)
    digits = {spelled.index(bytes([byte])) for byte in b"0123456789"}
    matcher.commit([spelled.index(b"7")])
    assert allowed(matcher, [], len(spelled)) == digits | ENDS


def test_min_tokens_yields_to_a_complete_answer(grammars, spelled):
    """A minimum length holds the end back while the grammar knows another token, and no longer."""
    vocab, sampling = len(spelled), Sampling(min_tokens=60)
    number = [spelled.index(b"7")]
    for kind, tokens, end_allowed in (
        ('{"type": "integer"}', number, False), ('{"enum": [7]}', number, True), ('{"const": true}', [], False),
    ):  # fmt: skip
        matcher = grammars.open(Grammar(kind="json_schema", schema=kind), ENDS)
        rules = constraints_for(sampling, [5], ENDS, vocab, matcher)
        logits = torch.zeros(len(tokens) + 1, vocab)
        rules.apply(logits, tokens)
        assert bool((logits[-1] == 0)[END]) == end_allowed
        assert bool((logits == 0).any(-1).all())


def test_min_tokens_yields_where_only_a_stop_token_fits(grammars, spelled):
    """A stop token that is also text is not held back where the grammar knows nothing else."""
    brace = spelled.index(b"{")
    matcher = grammars.open(SMALL, frozenset([END, brace]))
    rules = constraints_for(Sampling(min_tokens=3), [5], frozenset([END, brace]), len(spelled), matcher)
    logits = torch.zeros(1, len(spelled))
    rules.apply(logits, [])
    assert torch.nonzero(logits[0] == 0).flatten().tolist() == [brace]


def test_an_answer_this_vocabulary_cannot_write_fails(grammars, spelled):
    """Where no token goes on, the end is forced and the answer is marked as failed, never a wrong one as good."""
    matcher = grammars.open(Grammar(kind="json_schema", schema='{"const": "ü"}'), ENDS)  # half of ü is no token
    said: list[int] = []
    while not said or said[-1] != END:
        said.append(min(allowed(matcher, [], len(spelled))))
        matcher.commit(said[-1:])
    assert matcher.failed


def test_serving_g1_a_limit_hit_beside_the_answer_does_not_count(folder, spelled, monkeypatch):
    """Drafts, and other requests, that run into the parser's limits leave an answer of the same grammar as it was."""
    limits = LLParserLimits(max_lexer_states=150, verbose_errors=False)
    monkeypatch.setattr(grammar_module, "_limits", lambda: limits)
    few = Grammars(folder / "tiny-target" / "tokenizer.json", len(spelled))
    schema = {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^(a|b)*a(a|b){12}$"}]}
    grammar = Grammar(kind="json_schema", schema=json.dumps(schema))
    matcher, mate = few.open(grammar, ENDS), few.open(grammar, ENDS)
    fresh = allowed(matcher, [], len(spelled))
    quote, a, b = (spelled.index(letter) for letter in (b'"', b"a", b"b"))
    generator, renewed, real = torch.Generator().manual_seed(0), [], grammar_module._Compiled.renew
    monkeypatch.setattr(grammar_module._Compiled, "renew", lambda self: (renewed.append(self), real(self))[1])
    for _ in range(30):
        drafted = [quote, *((a, b)[int(bit)] for bit in torch.randint(2, (14,), generator=generator))]
        for j in range(len(drafted)):
            assert allowed(matcher, drafted[:j], len(spelled)) != ENDS
        assert allowed(matcher, [], len(spelled)) == fresh
        assert allowed(mate, [], len(spelled)) == fresh
    assert renewed
    for one in (matcher, mate):
        one.commit([spelled.index(bytes([byte])) for byte in b"true"])
        assert allowed(one, [], len(spelled)) == ENDS
        one.commit([END])
        assert not one.failed


# -- compiling -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"type": "strin"}', "Invalid type"),
        ('{"type": "string", "minLength": 5, "maxLength": 2}', "Unsatisfiable"),
        ('{"not": {"type": "string"}}', "Unimplemented"),
        ('{"oneOf": [{"type": "string"}, {"maxLength": 3, "type": "string"}]}', "oneOf"),
        ('{"x-guidance": {"lenient": true}, "not": {}}', "not part of JSON Schema"),
        ('{"$ref": "http://example.com/s.json"}', "registry"),
        (json.dumps({"enum": ["x" * MAX_SCHEMA_BYTES]}), f"at most {MAX_SCHEMA_BYTES}"),
        (json.dumps({"allOf": [
            {"anyOf": [{"properties": {f"a{i}": {"type": "string"}, f"b{j}": {"type": "integer"}}} for i in range(6)]}
            for j in range(4)
        ]}), "cannot be compiled"),
    ],
)  # fmt: skip
def test_what_does_not_compile_is_refused(grammars, schema, reason):
    """The reason names what is wrong with the schema."""
    with pytest.raises(GrammarError, match=reason):
        grammars.open(Grammar(kind="json_schema", schema=schema), ENDS)


def test_an_answer_needs_an_end(grammars):
    """A grammar without any end token that could close the answer is refused."""
    with pytest.raises(GrammarError, match="end token"):
        grammars.open(OBJECT, frozenset())


def test_grammars_are_compiled_once_and_bounded(folder, spelled, monkeypatch):
    """The same schema compiles once; of many, the least recently used go."""
    monkeypatch.setattr(grammar_module, "_KEPT", 3)
    kept = Grammars(folder / "tiny-target" / "tokenizer.json", len(spelled))
    real, compiled = kept._compile, []
    monkeypatch.setattr(kept, "_compile", lambda grammar: (compiled.append(grammar.schema), real(grammar))[1])
    for number in (0, 1, 2, 0, 3, 0, 1):
        kept.open(Grammar(kind="json_schema", schema=f'{{"const": {number}}}'), ENDS)
    assert [json.loads(schema)["const"] for schema in compiled] == [0, 1, 2, 3, 1]
    assert len(kept._compiled) == 3


@pytest.mark.parametrize("content", [None, "{}", '{"model": 3}'])
def test_a_tokenizer_that_cannot_be_read_is_said(tmp_path, content):
    """No tokenizer.json, or one llguidance does not know, refuses grammars by name and nothing else."""
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(GrammarError, match="this target's tokenizer"):
        Grammars(tmp_path / "tokenizer.json", 120).open(OBJECT, ENDS)


def test_no_text_token_is_taken_for_the_end(tmp_path):
    """Special tokens of unknown names, and a letter as token 0: llguidance's guess at the end takes no text away."""
    text = write_tokenizer(tmp_path).to_str().replace("endoftext", "odd").replace("im_end", "shut")
    data = json.loads(text)
    ids = data["model"]["vocab"]
    ids["<|odd|>"], ids["A"] = ids["A"], ids["<|odd|>"]
    data["added_tokens"] = sorted(
        ({**item, "id": ids[item["content"]]} for item in data["added_tokens"]), key=lambda item: item["id"]
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    matcher = Grammars(tmp_path / "tokenizer.json", 120).open(
        Grammar(kind="json_schema", schema='{"const": "A"}'), frozenset([ids["<|shut|>"]])
    )
    assert ids["A"] == 0
    assert allowed(matcher, [ids['"']], 120) == {0}


# -- answers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rig_for(folder, tmp_path_factory) -> Iterator[Callable[..., Rig]]:
    with shared_rigs(folder, tmp_path_factory) as rig_for:
        yield rig_for


@pytest.fixture(scope="module")
def target(rig_for) -> Any:
    return reference_models(rig_for().pair)[0]


@pytest.fixture(scope="module")
def ids(spelled) -> list[list[int]]:
    return prompts(len(spelled), (5, 17, 40, 3, 30, 9, 21, 33), seed=2)


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 0.8, "seed": 1}, {"temperature": 1.5, "seed": 2, "top_k": 5},
    {"temperature": 1.0, "seed": 3, "min_p": 0.2}, {"temperature": 2.0, "seed": 4},
    {"temperature": 0.0, "frequency_penalty": 1.0}, {"temperature": 1.0, "seed": 5, "top_p": 0.7},
    {"temperature": 2.0, "seed": 6, "repetition_penalty": 1.5, "min_tokens": 40},
]  # fmt: skip


@torch.inference_mode()
def defined(model: Any, prompt: list[int], sampling: Sampling, spelled: list[bytes | None]) -> list[int]:
    """Plain decoding: a fresh forward a token, the language's own mask, penalties by counting."""
    said: list[int] = []
    while not said or said[-1] != END:
        logits = model(input_ids=torch.tensor([prompt + said]), use_cache=False).logits[0, -1].float()
        for token in range(len(logits)):
            if token in prompt or token in said:
                factor = sampling.repetition_penalty
                logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
            logits[token] -= said.count(token) * sampling.frequency_penalty
        possible = allowed_by_definition(b"".join(spelled[token] for token in said), spelled)
        if len(said) < sampling.min_tokens and len(possible) > 1:
            possible.discard(END)
        masked = torch.full((1, len(logits)), -torch.inf)
        for token in possible:
            masked[0, token] = logits[token]
        params = row_params([sampling], [len(prompt) + len(said)])
        said.append(int(draw(shape_logits(masked, params), params)[0]))
    return said


@pytest.fixture(scope="module")
def truth(target, ids, spelled) -> list[list[int]]:
    return [defined(target, ids[i], Sampling(**sampling), spelled) for i, sampling in enumerate(SAMPLINGS)]


def asked(rig: Rig, name: str, prompt: list[int], gamma: int | None = None, *, grammar: Grammar = SMALL,
          max_tokens: int = LONGEST, arrived_s: float = 0.0, **sampling: Any) -> Sequence:  # fmt: skip
    """A request for an answer of a grammar, built as admission builds it."""
    item = request(name, prompt, max_tokens, gamma=gamma, ends=[END], arrived_s=arrived_s, **sampling)
    matcher = rig.built.grammars.open(grammar, item.end_tokens)
    vocab = rig.engine.target.model.config.vocab_size
    item.constraints = constraints_for(item.sampling, prompt, item.end_tokens, vocab, matcher)
    return item


def batch(rig: Rig, ids: list[list[int]], gamma: int | None = None) -> list[Sequence]:
    return [asked(rig, str(i), ids[i], gamma, arrived_s=float(i), **how) for i, how in enumerate(SAMPLINGS)]


@pytest.mark.parametrize("gamma", [0, 1, 3, 8])
def test_answers_equal_the_definition(rig_for, ids, truth, gamma):
    """Eight requests, greedy and seeded, say what plain decoding over the enumerated language says, at every gamma."""
    rig = rig_for()
    requests = batch(rig, ids, gamma)
    assert rig.run(requests) == truth
    assert {item.finish_reason for item in requests} == {"stop"}
    assert bool(counts_of(requests).num_accepted) == bool(gamma)


def test_serving_g1_preemption_and_changing_gamma(rig_for, ids, truth):
    """Preempted requests at another draft length every round keep their place in the grammar (G1, A1)."""
    rig = rig_for(kv_tokens=208)
    rig.engine.controller = Changing(3)
    before = rig.engine.scheduler.num_preempted
    assert rig.run(batch(rig, ids)) == truth
    assert rig.engine.scheduler.num_preempted > before


def test_serving_g1_forbidden_drafts(rig_for, ids, truth, spelled):
    """Drafts of forbidden tokens, of end tokens and of random ones are rejected and change nothing (G1, S4)."""
    rig = rig_for()
    real, generator = rig.engine.proposers.draft.propose, torch.Generator().manual_seed(0)

    def propose(requests, gammas):
        proposals = real(requests, gammas)
        for index, proposal in enumerate(proposals):
            noise = torch.randint(0, len(spelled), (len(proposal.tokens),), generator=generator).tolist()
            proposal.tokens = [noise, [END] * len(noise), [*proposal.tokens[:1], *noise[1:]]][index % 3]
        return proposals

    rig.engine.proposers.draft.propose = propose
    try:
        assert rig.run(batch(rig, ids, 5)) == truth
    finally:
        rig.engine.proposers.draft.propose = real


@pytest.mark.parametrize("gamma", range(1, 9))
def test_serving_s6_grammar_completes_inside_a_block(folder, rig_for, ids, target, spelled, gamma):
    """The target drafts for itself: the answer completes at every offset of a wholly accepted block and ends (S6)."""
    rig = rig_for(exact=True, draft=str(folder / "tiny-target"))
    said = defined(target, ids[1], Sampling(temperature=0.0), spelled)
    item = asked(rig, "s6", ids[1], gamma, max_tokens=100)
    assert rig.run([item]) == [said]
    assert item.finish_reason == "stop"
    assert counts_of([item]).num_accepted >= counts_of([item]).num_examined - 1


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_a_draft_without_any_allowed_token(folder, tmp_path, target, ids, truth, coupling):
    """A draft whose vocabulary ends before the letters can often propose nothing that fits; the text stays (V1)."""
    shutil.copytree(folder / "tiny-target", tmp_path / "draft")
    config = copy.deepcopy(target.config)
    config.vocab_size = 75
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "draft")
    rig = build_rig(folder, tmp_path / "data", draft=str(tmp_path / "draft"), coupling=coupling)
    said = rig.run(batch(rig, ids, 3))
    greedy = [i for i, how in enumerate(SAMPLINGS) if coupling == "gumbel" or not how["temperature"]]
    assert [said[i] for i in greedy] == [truth[i] for i in greedy]
    rig.built.publisher.close()


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_answers_parse_and_validate(rig_for, spelled, coupling):
    """160 answers of a hot, random model, at changing gamma, all parse, fit the schema and end within the bound."""
    rig = rig_for(coupling=coupling, max_batch=32, kv_tokens=4096)
    rig.engine.controller = Changing(7)
    some = prompts(len(spelled), (4, 9, 13, 20) * 40, seed=5)
    requests = [asked(rig, str(i), prompt, temperature=2.0, seed=i) for i, prompt in enumerate(some)]
    for item, tokens in zip(requests, rig.run(requests), strict=True):
        answer = json.loads(b"".join(spelled[token] for token in tokens[:-1]))
        assert item.finish_reason == "stop"
        assert answer["the"] in SCHEMA["properties"]["the"]["enum"]
        assert isinstance(answer["on"], bool)
        assert list(answer) == ["the", "on"]


def test_objects_parse_when_they_end(rig_for, ids, spelled):
    """Any JSON object: what ends by itself parses; what hits max_tokens says so."""
    rig = rig_for()
    requests = [
        asked(rig, str(i), prompt, 4, grammar=OBJECT, max_tokens=60, temperature=1.0, seed=i)
        for i, prompt in enumerate(ids * 4)
    ]
    said = rig.run(requests)
    ended = [tokens for item, tokens in zip(requests, said, strict=True) if item.finish_reason == "stop"]
    assert ended
    for tokens in ended:
        assert isinstance(json.loads(b"".join(spelled[token] for token in tokens[:-1])), dict)
    assert {item.finish_reason for item in requests} <= {"stop", "length"}


@pytest.mark.parametrize("gamma", [0, 4])
def test_an_impossible_answer_ends_with_an_error(rig_for, ids, gamma):
    """An answer the vocabulary cannot write ends as an error at the same token with and without speculation."""
    rig = rig_for()
    item = asked(rig, "e", ids[0], gamma, grammar=Grammar(kind="json_schema", schema='{"const": "aü"}'))
    mate = asked(rig, "m", ids[1], gamma)
    said = rig.run([item, mate])
    assert len(said[0]) == 4  # quote, a, the first byte of ü, the forced end
    assert (item.finish_reason, mate.finish_reason) == ("error", "stop")


# -- admission -------------------------------------------------------------------------------


def submit(grammar: Grammar, ends: tuple[int, ...] = (END,)) -> ipc.Submit:
    return ipc.Submit(
        request_id="g", token_ids=[5, 6, 7], max_tokens=LONGEST, sampling=Sampling(temperature=0.0),
        end_tokens=list(ends), segment="s", gamma=3, grammar=grammar,
    )  # fmt: skip


def test_admission_builds_the_grammar(rig_for, spelled):
    """A message with a grammar becomes a request whose answer fits it."""
    rig = rig_for()
    [said] = rig.run([Admission(rig.built, 192).to_sequence(submit(SMALL), 0.0)])
    assert b"".join(spelled[token] for token in said[:-1]) in LANGUAGE


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (submit(Grammar(kind="json_schema", schema='{"type": 3}')), "cannot be compiled"),
        (submit(OBJECT, ends=()), "end token"),
    ],
)
def test_admission_names_response_format(rig_for, message, reason):
    """A grammar that cannot be served is a 400 that names response_format and says why."""
    with pytest.raises(Refusal, match=reason) as refused:
        Admission(rig_for().built, 192).to_sequence(message, 0.0)
    assert (refused.value.status, refused.value.param) == (400, "response_format")


def test_preloading_reads_the_tokenizer_beforehand(folder, spelled, tmp_path):
    """The tokenizer is read in a thread; one that cannot be read is said when it is asked for, not before."""
    for path in (folder / "tiny-target" / "tokenizer.json", tmp_path / "tokenizer.json"):
        grammars = Grammars(Path(path), len(spelled))
        grammars.preload()
        if path.exists():
            assert allowed(grammars.open(OBJECT, ENDS), [], len(spelled)) == {spelled.index(b"{")}
        else:
            with pytest.raises(GrammarError):
                grammars.open(OBJECT, ENDS)
