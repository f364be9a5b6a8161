"""Answers that must match a JSON schema: random tokens, random models, refused schemas."""

import functools
import json

import jsonschema
import llguidance
import numpy as np
import pytest

from glm2_jax import Tokenizer
from glm2_jax.errors import InputError
from glm2_jax.text.tokenizer import AddedToken
from infer.batching.batcher import Batcher
from infer.batching.grammar import ANY_OBJECT, MAX_SCHEMA, Grammars
from infer.batching.job import Failure, Job
from infer.batching.options import BatchOptions
from infer.engine.params import SamplingParams
from tests.support.engine_toy import TOY, compilations, finished, toy_engine
from tests.support.sp_model import real_model, sp_model, without_dummy_prefix

TREE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    },
    "required": ["name", "children"],
    "additionalProperties": False,
}
PERSON = {
    "type": "object",
    "properties": {
        "名字": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": ["string", "null"], "maxLength": 5},
        "tags": {"type": "array", "items": {"enum": ["a", "红", "x\"y"]}, "maxItems": 3},
    },
    "required": ["名字", "age"],
    "additionalProperties": False,
}  # fmt: skip
STRING, INTEGER = {"type": "string"}, {"type": "integer"}
PAIR = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
SCHEMAS = {
    "anything": {},
    "any object": ANY_OBJECT,
    "a person": PERSON,
    "recursive": TREE,
    "required but not described": {"type": "object", "required": ["x", "y z"]},
    "optional": {"type": "object", "properties": {"a": INTEGER, "b": STRING}},
    "empty": {"type": "object", "additionalProperties": False},
    "a map": {"type": "object", "additionalProperties": {"type": "number"}},
    "patterns of keys": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,5}$": INTEGER},
        "additionalProperties": False,
    },
    "at most one": {"type": "object", "maxProperties": 1, "additionalProperties": INTEGER},
    "strings": STRING,
    "lengths": {"type": "string", "minLength": 2, "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{1,4} \\d+$"},
    "pattern anywhere": {"type": "string", "pattern": "天气", "maxLength": 9},
    "Chinese": {"type": "string", "pattern": "^[\\u4e00-\\u9fff]{1,6}$"},
    "bytes": {"const": "龘𝄞é😀"},
    "escapes": {"enum": ['"', "\\", "\n\t", "\u0001", "</s> <|user|>"]},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "mail": {"type": "string", "format": "email"},
    "address": {"type": "string", "format": "ipv4"},
    "integers": INTEGER,
    "a range": {"type": "integer", "minimum": -7, "exclusiveMaximum": 1200},
    "numbers": {"type": "number"},
    "a range of numbers": {"type": "number", "exclusiveMinimum": 0.5, "maximum": 2.25},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 999},
    "cents": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 99},
    "yes or no": {"type": "boolean"},
    "null": {"type": "null"},
    "several types": {"type": ["integer", "boolean", "null"]},
    "mixed enum": {"enum": [1, "1", None, [1, {"a": 2.5}], {"b": []}]},
    "array": {"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [INTEGER, STRING], "items": False, "minItems": 2},
    "matrix": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
        "maxItems": 2,
    },
    "any of": {"anyOf": [PAIR, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    "one of": {"oneOf": [{"const": "one"}, {"type": "integer", "minimum": 5}]},
    "all of": {"allOf": [PAIR, {"type": "object", "properties": {"b": {"type": "boolean"}}}]},
    "definitions": {
        "$defs": {"name": {"type": "string", "maxLength": 3}, "pair": {"$ref": "#/$defs/two"},
                  "two": {"type": "array", "items": {"$ref": "#/$defs/name"}, "maxItems": 2}},
        "type": "object", "properties": {"p": {"$ref": "#/$defs/pair"}}, "required": ["p"],
    },
    "described": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "T", "description": "d", "default": 1, "examples": [2], "type": "integer",
    },
}  # fmt: skip
ANY_TOKEN = SamplingParams(temperature=1, top_k=0, top_p=1, max_new_tokens=80)


@functools.cache
def grammars(family: str = "chatglm2") -> Grammars:
    return Grammars(Tokenizer.from_bytes(sp_model(), family), TOY.vocab_size)


def ids_of(allowed: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(allowed.view(np.uint8), bitorder="little")).tolist())


def matches(text: str, schema: dict) -> None:
    """AssertionError, or that of a library: the text is not JSON of the schema."""
    assert "\ufffd" not in text
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def walk(tokenizer: Tokenizer, schema: dict, seed: int, steps: int = 150) -> str | None:
    """Draw allowed tokens, those that may close something more often; None: it did not end.

    Wherever it may end, the text so far has to match.
    """
    rng, matcher, ids = np.random.default_rng(seed), grammars(tokenizer.family).matcher(schema), []
    ends = {2, tokenizer.special["<|user|>"]} if tokenizer.family == "chatglm3" else {2}
    special = {0, 1, *tokenizer.special.values(), *range(tokenizer.size, TOY.vocab_size)} - ends
    for _ in range(steps):
        allowed = ids_of(matcher.allowed)
        assert allowed and not allowed & special
        assert not allowed & ends or ends <= allowed
        if allowed & ends:
            matches(tokenizer.decode(ids), schema)
        quotes = {one for one in allowed if b'"' in tokenizer.token_bytes(one)}
        closing = quotes or {one for one in allowed if set(tokenizer.token_bytes(one)) & set(b"}]")}
        chosen = (allowed & ends or closing) if rng.random() < 0.4 else ()
        token = int(rng.choice(sorted(chosen or allowed)))
        if token in ends:
            return tokenizer.decode(ids)
        ids.append(token)
        matcher.take(token)
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_drawn_matches_the_schema(name):
    tokenizer = Tokenizer.from_bytes(sp_model(), "chatglm3" if len(name) % 2 else "chatglm2")
    texts = {walk(tokenizer, SCHEMAS[name], seed) for seed in range(12)} - {None}
    assert texts
    small = ("bytes", "null", "empty", "yes or no", "escapes", "any of", "mixed enum")
    assert len(texts) > 1 or name in small


@pytest.mark.parametrize("model", ["toy", "no dummy prefix", "published"])
def test_text_is_accepted_in_the_tokens_that_it_is_encoded_to(model):
    data = {"toy": sp_model, "no dummy prefix": lambda: without_dummy_prefix(sp_model())}
    if model == "published":
        tokenizer, size = Tokenizer.from_file(real_model() / "tokenizer.model"), 65024
    else:
        tokenizer, size = Tokenizer.from_bytes(data[model]()), TOY.vocab_size
    schema = {**PERSON, "properties": {**PERSON["properties"], "x": {}}}
    compiled = Grammars(tokenizer, size)
    value = {"名字": '小明 "\\\n', "age": 42, "tags": ["红", 'x"y'], "x": {"a b": [1.5e-3, "龘"]}}
    for indent in (None, 2, "\t"):
        text = json.dumps(value, indent=indent, ensure_ascii=False)
        matcher, ids = compiled.matcher(schema), tokenizer.encode(text)
        for token in ids:
            assert token in ids_of(matcher.allowed)
            matcher.take(token)
        assert ids_of(matcher.allowed) == {tokenizer.eos_id}
        assert tokenizer.decode(ids) == text


def test_only_the_first_space_is_free():
    """One leading space is not shown; between values there is as much as models write."""
    tokenizer, matcher = Tokenizer.from_bytes(sp_model()), grammars().matcher(PERSON)
    space = tokenizer.piece_id("\u2581")
    assert space in ids_of(matcher.allowed)
    matcher.take(space)
    assert space not in ids_of(matcher.allowed)
    (brace,) = tokenizer.encode("{")[-1:]
    matcher.take(brace)
    matcher.take(space)
    assert space not in ids_of(matcher.allowed)


def test_added_tokens_are_not_text():
    plain = Tokenizer.from_bytes(sp_model(), "chatglm3")
    added = [AddedToken("你好", 600), AddedToken("<end>", 601)]
    tokenizer = plain.with_tokens("chatglm3", added=added, end_ids=[601])
    matcher = Grammars(tokenizer, TOY.vocab_size).matcher({"type": "integer"})
    matcher.take(plain.piece_id("1"))
    assert {2, 601, tokenizer.special["<|user|>"]} == {
        token for token in ids_of(matcher.allowed) if not plain.token_bytes(token).isdigit()
    }
    string = Grammars(tokenizer, TOY.vocab_size).matcher({"const": "你好"})
    string.take(plain.piece_id('"') or 3 + 34)
    assert 600 not in ids_of(string.allowed)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"not": STRING}, 'Unimplemented keys: ["not"]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"if": STRING, "then": STRING}, "Unimplemented"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": 5}, "type must be"),
        ({"$ref": "https://example.com/schema.json"}, "does not fetch"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "format": "color"}, "Unknown format: color"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"type": "integer", "multipleOf": 10_007}, "least common multiple"),
        ({"type": "integer", "multipleOf": -3}, "above 0"),
        ({"type": "integer", "multipleOf": 0.0}, "above 0"),
        ({"allOf": [{"multipleOf": 101}, {"multipleOf": 1.03}]}, "least common multiple"),
        ({"const": "\ud800"}, "hex escape"),
        ({"const": float("nan")}, "not JSON"),
        ({"const": {1, 2}}, "not JSON"),
        ({"x-guidance": {"lenient": True}, "not": STRING}, "Unimplemented"),
        ({"description": "x" * MAX_SCHEMA}, "at most 65,536"),
        (functools.reduce(lambda inner, _: {"items": inner}, range(200), {}), "recursion limit"),
        ({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"const": j}}} for j in range(2)]}
                    for i in range(16)]}, "schema too large"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(schema, why):
    with pytest.raises(InputError, match="the JSON schema cannot be enforced") as raised:
        grammars().matcher(schema)
    assert why in raised.value.why and "\n" not in raised.value.what + raised.value.fix


def test_a_schema_of_thousands_of_levels_does_not_end_the_process():
    levels = 100  # in each definition; llguidance itself allows 128
    schemas = {}
    for index in range(50):
        schemas[str(index)] = functools.reduce(
            lambda inner, _: {"items": inner}, range(levels), {"$ref": f"#/$defs/{index + 1}"}
        )
    schema = {"$defs": {**schemas, "50": INTEGER}, "$ref": "#/$defs/0"}
    assert 50_000 < len(json.dumps(schema, separators=(",", ":"))) < MAX_SCHEMA
    assert ids_of(grammars().matcher(schema).allowed)


def test_answers_that_use_up_the_lexer_do_not_spoil_the_schema(monkeypatch):
    """Its states are shared by all answers to a schema."""
    limits = llguidance.LLParserLimits
    fewer = lambda **given: limits(**{**given, "max_lexer_states": 300})  # noqa: E731
    monkeypatch.setattr(llguidance, "LLParserLimits", fewer)
    schema = {"type": "string", "pattern": "^.*a.{30}$"}
    rng = np.random.default_rng(0)
    for _ in range(2):  # the first leaves no states for the second
        matcher = grammars().matcher(schema)
        with pytest.raises(InputError, match="too many states"):
            for _ in range(100):
                matcher.take(int(rng.choice(sorted(ids_of(matcher.allowed)))))


class Heard(list):
    def __call__(self, event):
        self.append(event)

    @property
    def completion(self):
        return self[-1].completion


@pytest.fixture(scope="module", params=[0, 3], ids=["", "speculate"])
def engine(request):
    return toy_engine(max_length=128, speculate=request.param)


@pytest.fixture
def batcher(engine):
    return Batcher(engine, BatchOptions(slots=3, size=128, tokens_per_prefill=64))


def submit(batcher, engine, ids, seed=0, schema=None, *, clean=False, **changes) -> Heard:
    sampling = SamplingParams(**{**vars(ANY_TOKEN), "seed": seed, **changes})
    heard, (row,) = Heard(), engine.rows([ids], sampling, clean=clean)
    matcher = None if schema is None else grammars(engine.tokenizer.family).matcher(schema)
    batcher.submit(Job(row, heard, grammar=matcher))
    return heard


def run(batcher) -> None:
    while batcher.step():
        pass


def test_rows_with_and_without_schemas_do_not_touch_each_other(engine, batcher):
    asked = []
    for seed, schema in enumerate([PERSON, None, TREE, None, PERSON, SCHEMAS["any of"], None]):
        ids = [5 + seed] * (1 + 9 * seed)
        asked.append((ids, seed, schema, submit(batcher, engine, ids, seed, schema)))
        batcher.step()
    run(batcher)
    complete = 0
    for ids, seed, schema, heard in asked:
        completion = heard.completion
        if schema is None:
            sampling = SamplingParams(**{**vars(ANY_TOKEN), "seed": seed})
            assert completion.output_ids == finished(engine.run([ids], sampling)).output_ids
            continue
        with compilations() as compiled:
            alone = submit(batcher, engine, ids, seed, schema)
            run(batcher)
        assert alone.completion == completion and not compiled
        if completion.finish_reason == "stop":
            complete += 1
            matches(completion.text, schema)
    assert complete >= 2


def test_an_answer_that_is_too_long_is_cut_off(engine, batcher):
    heard = submit(batcher, engine, [7, 8], schema=PERSON, max_new_tokens=3)
    run(batcher)
    assert heard.completion.finish_reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(heard.completion.text)


def test_a_schema_without_any_text_fails_alone(engine, batcher):
    """Every step has to go on: what llguidance gives then would look like a complete answer."""
    stuck = submit(batcher, engine, [7, 8], schema={"$ref": "#"})
    other = submit(batcher, engine, [9], 1)
    run(batcher)
    assert isinstance(stuck[-1], Failure) and stuck[-1].reason == "grammar"
    assert "No text can complete the answer." in str(stuck[-1].error)
    assert other.completion.finish_reason == "length"


def test_the_content_of_a_chatglm3_answer_matches(engine):
    """The line of metadata is read as part of the prompt, so that no tool can be called."""
    chatglm3 = toy_engine(family="chatglm3", share=engine, max_length=128)
    batcher = Batcher(chatglm3, BatchOptions(slots=3, size=128, tokens_per_prefill=64))
    ids = [*chatglm3.build_prompt("你好"), *chatglm3.tokenizer.encode("\n")]
    asked = [submit(batcher, chatglm3, ids, seed, PERSON, clean=True) for seed in range(6)]
    run(batcher)
    done = [one.completion for one in asked if one.completion.finish_reason == "stop"]
    assert done
    for completion in done:
        assert [message[:2] for message in completion.messages] == [("assistant", "")]
        assert completion.messages[0].content == completion.text
        matches(completion.text, PERSON)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(InputError, match="pip install fastapi llguidance"):
        Grammars(Tokenizer.from_bytes(sp_model()), TOY.vocab_size)
