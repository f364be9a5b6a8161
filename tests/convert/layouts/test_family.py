"""The family of a folder's model, its special and added tokens, and what contradicts."""

import json

import pytest

from convert import export_folder, open_folder
from convert.adapters.adapter import Adapter, open_adapter, save_adapter
from convert.loading.folder import fingerprint
from convert.writing.gguf import gguf_vocabulary
from glm2_jax import CheckpointError, Tokenizer, UsageError
from glm2_jax.datasets.encode import Encoder
from glm2_jax.family import config_signs, decide_family, named_family, prompt_signs, tokenizer_signs
from glm2_jax.text.prompt import build_prompt, stop_ids
from tests.convert.writing.test_to_pytorch import random_lora
from tests.support.checkpoints import convert_folder, edit_json, tiny_config, write_official
from tests.support.sp_model import sp_model, with_pieces, without_dummy_prefix

PIECES = Tokenizer.from_bytes(sp_model()).num_pieces
NAMES = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
USER, OBSERVATION = PIECES + 6, PIECES + 8
PROMPT3 = build_prompt(Tokenizer.from_bytes(sp_model(), "chatglm3"), "chatglm3", "你好")
PROMPT2 = build_prompt(Tokenizer.from_bytes(sp_model(), "chatglm2"), "chatglm2", "你好")
ROLE_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>\n {{ m['content'] }}{% endfor %}"
ROUND_TEMPLATE = (
    "{% for m in messages %}[Round {{ loop.index }}]\n\n问：{{ m.content }}{% endfor %}"
)


def decoder(tokens, **flags):
    return {
        "added_tokens_decoder": {
            str(i): {"content": name, "special": True} | flags for name, i in tokens.items()
        }
    }


def folder(path, *, raw=None, pieces=None, config=None, **files):
    """An official folder that does not say its family, with further files."""
    unsaid = {"family": None, "rope_kind": None, "interleaved_qkv": None, "rotary_percent": None}
    config = config or tiny_config(num_layers=1)
    write_official(path, config, shards=1, raw=unsaid | (raw or {}), tokenizer=pieces)
    for name, value in files.items():
        name = {"jinja": "chat_template.jinja", "code": "tokenization_chatglm.py"}.get(
            name, f"{name}.json"
        )
        text = value if isinstance(value, str) else json.dumps(value)
        (path / name).write_text(text, encoding="utf-8")
    return path


def prompt(found):
    return build_prompt(found.tokenizer, found.template, "你好")


ROLE_IDS = {"<|user|>": USER, "<|observation|>": OBSERVATION}
END_IDS = {"eos_token_id": [2, *ROLE_IDS.values()]}
CHATGLM3 = (
    {"tokenizer_config": decoder(ROLE_IDS)},
    {"tokenizer_config": {"additional_special_tokens": list(ROLE_IDS)}},
    {"added_tokens": ROLE_IDS},
    {"special_tokens_map": {"additional_special_tokens": [{"content": "<|user|>"}]}},
    {"tokenizer": {"added_tokens": [{"id": USER, "content": "<|user|>", "special": True}]}},
    {"tokenizer_config": {"chat_template": [{"name": "default", "template": ROLE_TEMPLATE}]}},
    {"jinja": "<|user|>\n {{ messages[0].content }}"},
    {"raw": END_IDS},
    {"generation_config": END_IDS},
    {"code": f"role_special_tokens = {list(ROLES)}"},
    {"tokenizer_config": {"name_or_path": "THUDM/chatglm3-6b"}},
)


@pytest.mark.parametrize("sign", CHATGLM3)
def test_one_sign_of_chatglm3_is_enough_and_is_reported(tmp_path, sign):
    found = open_folder(folder(tmp_path / "m", **sign))
    assert (found.config.family, found.template) == ("chatglm3", "chatglm3")
    assert prompt(found) == PROMPT3
    assert stop_ids(found.tokenizer) == (2, USER, OBSERVATION)
    assert sum("the family is chatglm3" in line for line in found.notes) == 1


def test_what_the_configuration_says_is_not_reported(tmp_path):
    for number, raw in enumerate((
        {"_name_or_path": "/data/chatglm2-runs/ChatGLM3-6B/checkpoint-300"},
        {"auto_map": {"AutoModel": "THUDM/chatglm3-6b--modeling_chatglm.ChatGLMModel"}},
        {"family": "chatglm3"},
    )):  # fmt: skip
        found = open_folder(folder(tmp_path / str(number), raw=raw))
        assert prompt(found) == PROMPT3
        assert not any("family" in line for line in found.notes)


def test_what_counts_where_there_is_no_sign(tmp_path):
    """The folder's name, the dummy prefix, the flags; or an assumption, which is reported."""
    path = folder(tmp_path / "m")
    found = open_folder(path)
    assert found.config.family == "chatglm2"
    assert "chatglm2 is assumed" in found.notes[0] and "--family chatglm3" in found.notes[0]
    for asked in ({"family": "chatglm3"}, {"template": "chatglm3"}):
        found = open_folder(path, **asked)
        assert prompt(found) == PROMPT3 and found.config.family == "chatglm3"
        assert not any("family" in line for line in found.notes)
    with pytest.raises(UsageError, match="chatglm4"):
        open_folder(path, family="chatglm4")
    for name, family in (("chatglm3-6b", "chatglm3"), ("my-codegeex2", "codegeex2")):
        found = open_folder(folder(tmp_path / name))
        assert found.config.family == family and "folder's name" in found.notes[0]
        found = open_folder(folder(tmp_path / name, raw={"_name_or_path": "x/chatglm2-6b"}))
        assert found.config.family == "chatglm2"
    found = open_folder(folder(tmp_path / "n", pieces=without_dummy_prefix(sp_model())))
    assert (found.config.family, found.template) == ("codegeex2", "raw")


@pytest.mark.parametrize(
    "signs",
    [
        {"raw": {"_name_or_path": "x/chatglm2-6b"}, "tokenizer_config": decoder(ROLE_IDS)},
        {"raw": {"_name_or_path": "x/chatglm3-6b"}, "jinja": ROUND_TEMPLATE},
        {"raw": {"_name_or_path": "x/chatglm2", **END_IDS}},
        {"raw": {"rotary_percent": 0.5}, "tokenizer_config": {"name_or_path": "chatglm3"}},
        {"jinja": ROUND_TEMPLATE, "added_tokens": ROLE_IDS},
    ],
)
def test_contradicting_signs_are_refused_and_the_flag_settles_them(tmp_path, signs):
    path = folder(tmp_path / "m", **signs)
    with pytest.raises(CheckpointError, match="matches more than one model family") as caught:
        open_folder(path)
    assert "--family chatglm3" in str(caught.value)
    assert prompt(open_folder(path, family="chatglm3")) == PROMPT3
    assert prompt(open_folder(path, family="chatglm2")) == PROMPT2


def test_names_and_templates():
    names = {
        "THUDM/chatglm2-6b-32k": "chatglm2",
        "C:\\models\\ChatGLM3-6B": "chatglm3",
        "/data/chatglm2/out/chatglm-3": "chatglm3",
        "ChatGLM3Tokenizer": "chatglm3",
        "THUDM/chatglm-6b": "chatglm",
        "chatglm_6b-int4-qe": "chatglm",
        "THUDM/glm-4-9b-chat-1m": "glm4",
        "glm4-9b-chat": "glm4",
        "ZhipuAI/glm-4-9b-chat-hf": "glm4",
        "ChatGLM4Tokenizer": "glm4",
        "zai-org/GLM-4-9B-0414": "glm4-0414",
        "GLM-4-32B-Base-0414": "glm4-0414",
        "GLM-Z1-Rumination-32B-0414": "glm4-0414",
        "Glm4ForCausalLM": "glm4-0414",
        "THUDM/glm-large-chinese": "glm",
        "glm-10b-chinese": "glm",
        "THUDM/chatglm-10b": None,
        "zai-org/GLM-4.5-Air": None,
        "zai-org/GLM-4.1V-9B-Thinking": None,
        "THUDM/glm-4v-9b": None,
        "glm-4-voice-9b": None,
        "GlmForCausalLM": None,
        "glm-40b": None,
        "chatglm-32k": None,
        "chatglm2-and-chatglm3": None,
    }
    assert {name: named_family(name) for name in names} == names
    assert named_family(["chatglm3"]) is None
    for neither in ("<|im_start|>{{ message['role'] }}<|im_end|>", ROLE_TEMPLATE + ROUND_TEMPLATE):
        assert prompt_signs(neither, "x") == []
    signs = tokenizer_signs({"name_or_path": "THUDM/chatglm2-6b"})  # that of CodeGeeX2, too
    assert decide_family(signs) == "chatglm2"
    assert decide_family([*signs, *config_signs({"rotary_percent": 0.5})]) == "codegeex2"


# Nine pieces in the places of the special ids, and two more, as public fine-tunes are made.
EXTENDED = with_pieces(sp_model(), [*(f"zq{i}v" for i in range(9)), "ありがとう", "です"])


def special_table(start, names=(*NAMES, *ROLES)):
    return {name: start + i for i, name in enumerate((*NAMES, *ROLES)) if name in names}


@pytest.mark.parametrize(
    "names", [(*NAMES, *ROLES), ("[gMASK]", "sop", "<|user|>", "<|assistant|>"), ROLES]
)
def test_special_ids_come_from_the_folder(tmp_path, names):
    path = folder(
        tmp_path / "m", pieces=EXTENDED, tokenizer_config=decoder(special_table(PIECES, names))
    )
    found = open_folder(path)
    assert prompt(found) == PROMPT3 and found.tokenizer.special == special_table(PIECES)
    assert found.tokenizer.num_pieces == found.tokenizer.size == PIECES + 11
    text = "zq1v zq6v です <|user|> [gMASK]"
    ids = found.tokenizer.encode(text)
    assert not set(ids) & set(found.tokenizer.special.values())
    assert found.tokenizer.decode(ids) == text
    assert found.tokenizer.decode(found.tokenizer.special.values()) == ""


def test_a_piece_in_a_special_place_is_never_the_id_of_text():
    plain = Tokenizer.from_bytes(with_pieces(sp_model(), ["[gMASK]"], kind=4))
    text = "a[gMASK]b"  # a user-defined piece is found in any text
    assert PIECES in plain.encode(text)
    tokens = plain.with_tokens("chatglm2", special_table(PIECES - 1, NAMES))
    assert PIECES not in tokens.encode(text)
    assert tokens.decode(tokens.encode(text)) == text


def test_an_extended_tokenizer_whose_special_ids_nothing_names_is_reported(tmp_path):
    path = folder(tmp_path / "m", raw={"_name_or_path": "x/chatglm3-ja"}, pieces=EXTENDED)
    (line,) = open_folder(path).notes
    assert f"{PIECES + 11:,} pieces" in line and f"[gMASK] = {PIECES + 12}" in line


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"<sql>": 640}, "640.*beyond"),
        ({"<sql>": PIECES + 3}, "the id of sop"),
        ({"[gMASK]": PIECES, "sop": PIECES + 1, "<|user|>": PIECES + 2}, "not a published order"),
        ({"<sql>": -1}, "not an added token"),
        ({"": 600}, "not an added token"),
    ],
)
def test_impossible_tokens_are_refused(tmp_path, tokens, message):
    path = folder(tmp_path / "m", tokenizer_config=decoder(tokens))
    with pytest.raises(CheckpointError, match=message):
        open_folder(path, family="chatglm3")
    path = folder(tmp_path / "ends", generation_config={"eos_token_id": [2, 151336]})
    with pytest.raises(CheckpointError, match="151336.*beyond"):
        open_folder(path)


ADDED = {"<sql>": PIECES + 5, "</sql>": PIECES + 6}


@pytest.mark.parametrize("layout", ["own", "chatglm", "glm"])
def test_every_layout_keeps_family_and_tokens(tmp_path, layout):
    if layout != "own":
        pytest.importorskip("tokenizers")
    assumed, extended, added = (tmp_path / name for name in ("assumed", "extended", "added"))
    folder(assumed)
    folder(extended, pieces=EXTENDED, tokenizer_config=decoder(special_table(PIECES)))
    folder(
        added,
        raw={"_name_or_path": "chatglm2", "eos_token_id": [2, PIECES + 9]},
        tokenizer_config=decoder(ADDED | {"<end>": PIECES + 9}),
    )
    for path, family in ((assumed, "chatglm3"), (extended, None), (added, None)):
        source, new = open_folder(path, family=family), path / "new"
        if layout == "own":
            convert_folder(source, new)
        else:
            export_folder(source, new, layout=layout)
        found = open_folder(new)
        assert found.notes == () and prompt(found) == prompt(source)
        assert found.template == source.template and found.config.family == source.config.family
        assert stop_ids(found.tokenizer) == stop_ids(source.tokenizer)
        assert found.tokenizer.special == source.tokenizer.special
        for text in ("<sql>a</sql><end>", "zq1v です sop <sop>"):
            assert found.tokenizer.encode(text) == source.tokenizer.encode(text)
        if layout == "own" and path == assumed:  # another family comes with its template
            assert prompt(open_folder(new, family="chatglm2")) == PROMPT2


def test_tokens_at_their_ids_in_gguf_files_and_in_training(tmp_path):
    kinds = pytest.importorskip("gguf").TokenType
    table = special_table(PIECES) | {"<sql>": PIECES + 15}
    path = folder(tmp_path / "m", pieces=EXTENDED, tokenizer_config=decoder(table))
    tokenizer = open_folder(path).tokenizer
    found = gguf_vocabulary(tokenizer, 640)
    assert found.texts[PIECES + 6] == "<|user|>" and found.texts[PIECES + 10] == "です"
    assert found.types[PIECES + 6] == kinds.CONTROL
    assert (found.texts[PIECES + 15], found.types[PIECES + 15]) == ("<sql>", kinds.USER_DEFINED)
    messages = [{"role": "user", "content": "です"}, {"role": "assistant", "content": "<sql>好"}]
    ids, learned = Encoder(tokenizer, "chatglm3").encode(messages, 0)
    start = ids.index(PIECES + 7) + 1
    assert learned == [False] * start + [True] * (len(ids) - start)
    assert PIECES + 15 in ids[start:] and PIECES + 6 not in ids[start:]


def test_an_adapter_of_the_other_family_names_the_flag(tmp_path):
    """By its template, the name of its base, and the tokenizer next to it."""
    path, lora = folder(tmp_path / "m"), random_lora(tiny_config(num_layers=1))
    base, asked = open_folder(path), open_folder(path, family="chatglm3")
    known = fingerprint(asked)
    save_adapter(tmp_path / "a", Adapter(lora, base=known, template="chatglm3"))
    for name in "bcd":
        save_adapter(tmp_path / name, Adapter(lora))
    edit_json(tmp_path / "b" / "adapter_config.json", base_model_name_or_path="THUDM/chatglm3-6b")
    settings = json.dumps({"additional_special_tokens": list(ROLE_IDS)})
    (tmp_path / "c" / "tokenizer_config.json").write_text(settings)
    (tmp_path / "d" / "tokenizer_config.json").write_text('{"name_or_path": "chatglm2-6b"}')
    for name in "abc":
        with pytest.raises(CheckpointError, match="--family chatglm3"):
            open_adapter(tmp_path / name, base)
    assert open_adapter(tmp_path / "a", asked, family="chatglm3").notes == ()
    assert open_adapter(tmp_path / "c", asked, family="chatglm3").base is None
    assert open_adapter(tmp_path / "d", base).base is None


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": decoder(ADDED)},
        {"tokenizer_config": decoder(ADDED, special=False)},
        {"added_tokens": ADDED},
        {"tokenizer": {"added_tokens": [{"id": i, "content": x} for x, i in ADDED.items()]}},
    ],
)
def test_added_tokens_are_encoded_to_their_ids(tmp_path, files):
    found = open_folder(folder(tmp_path / "m", raw={"_name_or_path": "x/chatglm2"}, **files))
    tokenizer, plain = found.tokenizer, Tokenizer.from_bytes(sp_model())
    text = "<sql>run</sql> [gMASK]<|user|></s>"
    ids = tokenizer.encode(text)
    assert ids == [
        ADDED["<sql>"], *plain.encode("run"), ADDED["</sql>"],
        *plain.encode(" [gMASK]<|user|></s>"),
    ]  # fmt: skip
    assert tokenizer.decode(ids) == text and tokenizer.size == PIECES + 7
    assert stop_ids(tokenizer) == (2,)


def test_the_longest_added_token_counts_and_its_flags_do(tmp_path):
    tokens = {"<a>": PIECES + 5, "<a><b>": PIECES + 6, "yes": PIECES + 7}
    table = decoder(tokens)
    table["added_tokens_decoder"][str(PIECES + 5)] |= {"lstrip": True, "rstrip": True}
    table["added_tokens_decoder"][str(PIECES + 7)] |= {"single_word": True}
    path = folder(tmp_path / "m", raw={"_name_or_path": "chatglm2"}, tokenizer_config=table)
    tokenizer = open_folder(path).tokenizer
    encode = Tokenizer.from_bytes(sp_model()).encode
    assert tokenizer.encode("<a><b>x") == [PIECES + 6, *encode("x")]
    assert tokenizer.encode("x <a> y") == [*encode("x"), PIECES + 5, *encode("y")]
    assert tokenizer.encode("yes yes") == [PIECES + 7, *encode(" "), PIECES + 7]
    assert tokenizer.encode("yesterday") == encode("yesterday")


@pytest.mark.parametrize(
    ("name", "end", "files"),
    [
        ("chatglm2", PIECES + 4, {}),  # eop, which is a special token
        ("chatglm3", PIECES + 4, {}),
        ("chatglm2", PIECES + 5, {"tokenizer_config": decoder({"<end>": PIECES + 5})}),
    ],
)
def test_every_token_that_ends_answers_is_a_stop_id(tmp_path, name, end, files):
    generation = {"eos_token_id": [2, end]}
    path = folder(
        tmp_path / "m", raw={"_name_or_path": name}, generation_config=generation, **files
    )
    found = open_folder(path)
    assert end in stop_ids(found.tokenizer)
    convert_folder(found, tmp_path / "own")
    assert end in stop_ids(open_folder(tmp_path / "own").tokenizer)


def test_two_files_that_name_tokens_have_to_agree(tmp_path):
    """`transformers` reads the other one only where the first is absent."""
    settings = decoder(ADDED) | {"name_or_path": "chatglm2"}
    other = ADDED | {"<x>": PIECES + 9}
    found = open_folder(folder(tmp_path / "a", tokenizer_config=settings, added_tokens=other))
    assert found.tokenizer.added.keys() == ADDED.keys()
    assert any("'<x>'" in line and "not known" in line for line in found.notes)
    same = open_folder(folder(tmp_path / "b", tokenizer_config=settings, added_tokens=ADDED))
    assert same.notes and not any("not known" in line for line in same.notes)
    other = ADDED | {"<sql>": PIECES + 9}
    path = folder(tmp_path / "c", tokenizer_config=settings, added_tokens=other)
    with pytest.raises(CheckpointError, match=f"two ids: {PIECES + 5} in .*, {PIECES + 9} in"):
        open_folder(path)
    empty = {"added_tokens_decoder": {}, "name_or_path": "chatglm2"}
    found = open_folder(folder(tmp_path / "d", tokenizer_config=empty, added_tokens=ADDED))
    assert found.tokenizer.added.keys() == ADDED.keys()
    settings = {"additional_special_tokens": ["<tool>"], "name_or_path": "chatglm2"}
    found = open_folder(folder(tmp_path / "e", tokenizer_config=settings))
    assert any("'<tool>'" in line and "not known" in line for line in found.notes)
