"""Tokens that the files of a folder name beyond those of its family, and ids that end an answer."""

import json

import pytest

from convert import open_folder
from convert.adapters.adapter import EXTRAS
from convert.adapters.attach import open_adapter
from convert.writing.own import convert_folder
from glm2_jax import CheckpointError, Tokenizer
from glm2_jax.text.prompt import stop_ids
from tests.convert.adapters.test_adapter import written
from tests.convert.layouts.test_family import ADDED, PIECES, decoder, folder
from tests.support.checkpoints import TINY, write_official
from tests.support.sp_model import sp_model


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


def test_the_tokenizer_next_to_an_adapter_shows_its_family(tmp_path):
    base = write_official(tmp_path / "base", TINY)
    adapter = written(tmp_path / "adapter")
    (adapter / EXTRAS).unlink()
    path = adapter / "tokenizer_config.json"
    path.write_text(json.dumps({"name_or_path": "chatglm2-6b"}))
    assert open_adapter(adapter, base).base is None
    path.write_text(json.dumps({"additional_special_tokens": ["<|user|>", "<|observation|>"]}))
    with pytest.raises(
        CheckpointError, match="trained on a chatglm3 model(.|\\n)*--family chatglm3"
    ):
        open_adapter(adapter, base)
    assert open_adapter(adapter, base, family="chatglm3").base is None
