"""Folders of GLM-4, ChatGLM-6B and the GLM base models: their small files, and what is refused."""

import base64
import functools
import json

import pytest

from convert.layouts.hf_config import native_config
from convert.loading.folder import read_architecture, read_config
from glm2_jax import PRESETS, CheckpointError, GLMConfig, Tokenizer, UsageError
from glm2_jax.choices import FAMILIES
from glm2_jax.family import ROLE_TOKENS
from glm2_jax.schemes import SCHEMES
from glm2_jax.text.prompt import stop_ids
from glm2_jax.text.ranks import BYTE_LETTERS
from glm2_jax.text.tokenizer import SPECIAL
from tests.support.shared_data import shared_file
from tests.support.sp_model import sp_model, with_pieces

TOKENS = [*(bytes([byte]) for byte in range(256)), b"he", b"ll", b"hell", b"hello"]
RANKS = b"".join(b"%s %d\n" % (base64.b64encode(x), i) for i, x in enumerate(TOKENS))
FAST = {
    "model": {
        "type": "BPE",
        "vocab": {"".join(BYTE_LETTERS[b] for b in x): i for i, x in enumerate(TOKENS)},
    },
    "pre_tokenizer": {"type": "ByteLevel"},
    "added_tokens": [
        {"id": len(TOKENS) + i, "content": name, "special": True}
        for i, name in enumerate(SPECIAL["glm4"])
    ],
}
USER, OBSERVATION = len(TOKENS) + 7, len(TOKENS) + 9


@functools.cache
def ice_model():
    """A toy of ice_text.model: its special tokens are pieces, and so are blanks."""
    model = with_pieces(sp_model(), ["<pad>", *SPECIAL["chatglm"]], kind=3)
    return with_pieces(model, ["<n>", "<|tab|>", "<|blank_2|>"], kind=4)


COG = sp_model(byte_fallback=False)
COG_SIZE = Tokenizer.from_bytes(COG, None).num_pieces
ICE = Tokenizer.from_bytes(ice_model(), None)
OFFICIAL = {
    "model_type": "chatglm", "num_layers": 1, "padded_vocab_size": 640, "hidden_size": 32,
    "ffn_hidden_size": 48, "num_attention_heads": 4, "multi_query_group_num": 2, "kv_channels": 8,
    "seq_length": 64, "add_qkv_bias": True, "multi_query_attention": True,
    "eos_token_id": [260, USER, OBSERVATION], "pad_token_id": 260,
}  # fmt: skip
NATIVE = {
    "vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 260,
    "eos_token_id": [260, USER, OBSERVATION],
}  # fmt: skip
CHATGLM = {
    "model_type": "chatglm", "num_layers": 1, "vocab_size": 640, "hidden_size": 32,
    "num_attention_heads": 4, "inner_hidden_size": 48, "position_encoding_2d": True,
    "bos_token_id": ICE.special["<sop>"], "eos_token_id": ICE.special["<eop>"],
    "mask_token_id": ICE.special["[MASK]"], "gmask_token_id": ICE.special["[gMASK]"],
    "pad_token_id": ICE.pad_id,
}  # fmt: skip
BASE = {
    "model_type": "glm", "num_layers": 1, "vocab_size": 640, "hidden_size": 32,
    "num_attention_heads": 4, "max_sequence_length": 64, "block_position_encoding": True,
    "pad_token_id": COG_SIZE, "mask_token_id": COG_SIZE + 3, "sop_token_id": COG_SIZE + 6,
    "eop_token_id": COG_SIZE + 7,
}  # fmt: skip


def small_files(folder, config, **files):
    """A folder without weights; `files` are contents, with "_" for "." in their names."""
    folder.mkdir()
    for name, value in {"config_json": config, **files}.items():
        stem, _, end = name.rpartition("_")
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        (folder / f"{stem.replace('cog_', 'cog-')}.{end}").write_bytes(data)
    return folder


FOLDERS = {
    "official glm4": (OFFICIAL, {"tokenizer_model": RANKS}, "glm4"),
    "glm4 of transformers": ({**NATIVE, "model_type": "glm"}, {"tokenizer_json": FAST}, "glm4"),
    "0414": ({**NATIVE, "model_type": "glm4"}, {"tokenizer_json": FAST}, "glm4-0414"),
    "chatglm": (CHATGLM, {"ice_text_model": ice_model()}, "chatglm"),
    "glm": (BASE, {"cog_pretrain_model": COG}, "glm"),
}
TEMPLATES = {"glm4": "glm4", "glm4-0414": "glm4", "chatglm": "chatglm", "glm": "fill"}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_vocabulary_and_the_configuration_show_the_family(tmp_path, name):
    config, files, family = FOLDERS[name]
    found = read_architecture(small_files(tmp_path / "m", config, **files))
    assert (found.config.family, found.tokenizer.family) == (family, family)
    assert found.template == found.config.default_template == TEMPLATES[family]
    assert found.tokenizer.special == found.tokenizer.default_special(family)
    assert not any("family" in line for line in found.notes)
    own = {**found.config.to_hf(), "torch_dtype": "float16"}  # as our own folders have it
    again = read_architecture(
        small_files(tmp_path / "own", own, tokenizer_model=found.tokenizer.model_bytes)
    )
    assert again.config == found.config and again.tokenizer.special == found.tokenizer.special
    assert stop_ids(again.tokenizer) == stop_ids(found.tokenizer)


def test_the_tokens_of_glm_4(tmp_path):
    config, files, _ = FOLDERS["0414"]
    found = read_architecture(small_files(tmp_path / "m", config, **files)).tokenizer
    assert stop_ids(found) == (260, USER, OBSERVATION)
    assert found.model_bytes == RANKS and found.encode("hello<|user|>")[0] == 259
    assert not set(found.encode("<|user|>[gMASK]<sop>")) & set(found.special.values())
    # What added_tokens_decoder names goes first; a fine-tune's own token becomes one id.
    moved = {str(400 + i): {"content": x} for i, x in enumerate(SPECIAL["glm4"])}
    settings = {"added_tokens_decoder": {**moved, "500": {"content": "<sql>"}}}
    folder = small_files(
        tmp_path / "b", OFFICIAL, tokenizer_model=RANKS, tokenizer_config_json=settings
    )
    found = read_architecture(folder).tokenizer
    assert found.special["<|endoftext|>"] == 400 and found.prefix_ids == [402, 404]
    assert found.encode("<sql>") == [500] and found.decode([500]) == "<sql>"
    some = {str(len(TOKENS) + 2): {"content": "[gMASK]"}, "400": {"content": "<|user|>"}}
    settings = {"added_tokens_decoder": some}
    folder = small_files(
        tmp_path / "c", OFFICIAL, tokenizer_model=RANKS, tokenizer_config_json=settings
    )
    with pytest.raises(CheckpointError, match="not a published order"):
        read_architecture(folder)


def test_the_tokens_of_chatglm_6b_are_those_of_its_file(tmp_path):
    names = {**ICE.special, "<pad>": ICE.pad_id}
    decoder = {str(i): {"content": x} for x, i in names.items()}
    settings = {"added_tokens_decoder": {**decoder, "600": {"content": "<tool>"}}}
    for number, extra in enumerate(({}, {"tokenizer_config_json": settings})):
        folder = small_files(tmp_path / str(number), CHATGLM, ice_text_model=ice_model(), **extra)
        found = read_architecture(folder)
        assert found.tokenizer.special == ICE.special and found.notes == ()
        assert found.tokenizer.suffix_ids == [ICE.special["[gMASK]"], ICE.special["<sop>"]]
        assert set(found.tokenizer.added) == ({"<tool>"} if extra else set())


SP = {"tokenizer_model": sp_model()}
ICE_FILE, RANK_FILE = {"ice_text_model": ice_model()}, {"tokenizer_model": RANKS}
GLM4_SIZE = {**OFFICIAL, "padded_vocab_size": 151552}


@pytest.mark.parametrize(
    ("config", "files", "model", "vocabulary"),
    [
        (GLM4_SIZE, SP, "glm4", "chatglm2 or chatglm3"),
        ({**OFFICIAL, "_name_or_path": "x/chatglm3-6b"}, RANK_FILE, "chatglm3", "glm4"),
        ({**NATIVE, "model_type": "glm4"}, SP, "Glm4ForCausalLM", "chatglm2"),
        ({**NATIVE, "model_type": "glm"}, ICE_FILE, "GlmForCausalLM", "chatglm"),
        (CHATGLM, SP, "ChatGLM-6B", "chatglm2"),
        (CHATGLM, RANK_FILE, "ChatGLM-6B", "glm4"),
        (BASE, ICE_FILE, "GLM base models", "chatglm"),
        (OFFICIAL, {"cog_pretrain_model": COG}, "ChatGLM2 to GLM-4-9B", "glm"),
    ],
)
def test_a_model_with_the_tokenizer_of_another_is_refused(
    tmp_path, config, files, model, vocabulary
):
    folder = small_files(tmp_path / "m", config, **files)
    with pytest.raises(CheckpointError, match="belong to different models") as caught:
        read_architecture(folder)
    assert model in caught.value.why and f"vocabulary one of {vocabulary}" in caught.value.why
    with pytest.raises(CheckpointError):  # no flag makes them fit
        read_architecture(folder, family="glm4-0414" if files is not RANK_FILE else "chatglm2")


CONFIGS = {
    "official": OFFICIAL, "GlmForCausalLM": {**NATIVE, "model_type": "glm"},
    "Glm4ForCausalLM": {**NATIVE, "model_type": "glm4"}, "ChatGLM-6B": CHATGLM, "GLM": BASE,
}  # fmt: skip
VOCABULARIES = {
    "pieces": SP, "ranks": RANK_FILE, "fast": {"tokenizer_json": FAST}, "ice": ICE_FILE,
    "cog": {"cog_pretrain_model": COG},
}  # fmt: skip
# The family of each pair that is one model; of all others none is.
PAIRS = {
    **{("official", name): "glm4" for name in ("ranks", "fast")},
    **{("GlmForCausalLM", name): "glm4" for name in ("ranks", "fast")},
    **{("Glm4ForCausalLM", name): "glm4-0414" for name in ("ranks", "fast")},
    **{(name, "pieces"): "chatglm2" for name in ("official", "GlmForCausalLM")},
    ("ChatGLM-6B", "ice"): "chatglm",
    ("GLM", "cog"): "glm",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_pairs_of_a_configuration_and_a_vocabulary(tmp_path, name):
    for vocabulary, files in VOCABULARIES.items():
        folder = small_files(tmp_path / vocabulary, CONFIGS[name], **files)
        if (name, vocabulary) in PAIRS:
            assert read_architecture(folder).config.family == PAIRS[name, vocabulary]
            continue
        with pytest.raises(CheckpointError, match="belong to different models"):
            read_architecture(folder)
        for family in FAMILIES:  # no flag makes them fit
            with pytest.raises(CheckpointError):
                read_architecture(folder, family=family)


def test_the_flag_has_to_suit_the_configuration(tmp_path):
    folder = small_files(tmp_path / "m", OFFICIAL, **RANK_FILE)
    assert read_architecture(folder, family="glm4").config.family == "glm4"
    with pytest.raises(CheckpointError, match="not of a glm4-0414 model"):
        read_architecture(folder, family="glm4-0414")
    folder = small_files(tmp_path / "c", CHATGLM, **ICE_FILE)
    with pytest.raises(CheckpointError, match=r"that of ChatGLM-6B, not of a glm(.|\n)*--family"):
        read_architecture(folder, family="glm")
    both = {**OFFICIAL, "_name_or_path": "x/chatglm-6b"}
    with pytest.raises(CheckpointError, match="not of a chatglm model"):
        read_architecture(small_files(tmp_path / "n", both, **SP))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "is not JSON"),
        ({"model": {"vocab": {"a": "0"}}}, "The id of 'a' is '0'"),
        ({"model": {"vocab": {"▁a": 0}}}, "byte letters"),
        ({"model": {"vocab": {"a": 5}}}, "Rank 0 is missing"),
        ({"model": {"vocab": {"a": 0, "b": 1, "c": 1}}}, "The id of 'c' is 1, as that of 'b'"),
        ({"model": {}}, "model.vocab is not a table"),
    ],
)
def test_a_damaged_tokenizer_json(tmp_path, data, reason):
    folder = small_files(tmp_path / "m", {**NATIVE, "model_type": "glm4"}, tokenizer_json=data)
    with pytest.raises(CheckpointError, match=reason):
        read_architecture(folder)


def test_presets_that_are_quantized():
    schemes = {name: read_config(name)[1] for name in PRESETS if "-int" in name}
    assert schemes == {
        "chatglm2-6b-int4": "int4-row", "chatglm-6b-int4": "int4-row", "chatglm-6b-int8": "int8",
    }  # fmt: skip
    assert SCHEMES.keys() >= set(schemes.values())


def test_configurations_of_transformers():
    """`Glm4ForCausalLM` with and without biases; other networks are refused by name."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for name in ("glm-4-9b-chat", "glm-4-9b-0414", "glm-4-32b-0414"):
        config = PRESETS[name]
        raw = json.loads(json.dumps(native_config(config, "bfloat16", (151329, 151336, 151338))))
        found = GLMConfig.from_hf(raw)
        assert found == config
        theirs = transformers.AutoConfig.for_model(**raw)
        assert theirs.attention_bias is config.attention_bias
        assert theirs.rope_parameters["rope_theta"] == 10000 * config.rope_ratio
        assert (theirs.model_type == "glm4") == (config.family == "glm4-0414")
        assert GLMConfig.from_hf(theirs.to_dict()) == config  # as save_pretrained writes it
    for name in ("chatglm-6b", "glm-large-chinese"):
        with pytest.raises(UsageError, match="cannot be written as --layout glm"):
            native_config(PRESETS[name], "float16", (2,))


REAL = "glm-family/tokenizers/"


def test_the_published_vocabularies(tmp_path):
    launch = json.loads(shared_file("glm-family/configs/chatglm-6b-launch.json"))
    now = json.loads(shared_file("glm-family/configs/chatglm-6b.json"))
    settings = json.loads(shared_file("glm-family/configs/chatglm-6b.tokenizer_config.json"))
    glm4 = json.loads(shared_file("configs/glm-4-9b-chat.json"))
    base = PRESETS["glm-10b-chinese"].to_hf()
    for number, (raw, name, files, prefix, suffix) in enumerate((
        (now, "ice_text.model", {"tokenizer_config_json": settings}, [], [130001, 130004]),
        (launch, "ice_text_launch.model", {}, [], [150001, 150004]),
        (glm4, "glm4_tokenizer.model", {}, [151331, 151333], []),
        (base, "cog-pretrain.model", {}, [50002], [50000, 50006]),
    )):  # fmt: skip
        folder = small_files(
            tmp_path / str(number), raw, tokenizer_model=shared_file(REAL + name), **files
        )
        found = read_architecture(folder)
        assert (found.tokenizer.prefix_ids, found.tokenizer.suffix_ids) == (prefix, suffix)
        assert found.notes == ()
        for role, token in zip(ROLE_TOKENS, range(151335, 151339), strict=True):
            assert found.tokenizer.special.get(role, token) == token
        assert found.tokenizer.eos_id == found.config.eos_token_id


@pytest.mark.parametrize(
    ("name", "file", "kept", "says"),
    [
        ("official glm4", "tokenizer_model", RANKS[: RANKS.rindex(b"aGVsbG8=")], "is 260"),
        ("0414", "tokenizer_model", RANKS[: RANKS.rindex(b"aGVsbA==")], "is 260"),
        ("official glm4", "tokenizer_model", RANKS[:-2], "cut off in this line"),
        ("chatglm", "ice_text_model", ice_model()[: len(COG) // 2], "cut off"),
        ("glm", "cog_pretrain_model", with_pieces(COG, ["xyzzy"]), f"is {COG_SIZE + 3}"),
    ],
)
def test_a_vocabulary_that_lacks_tokens(tmp_path, name, file, kept, says):
    folder = small_files(tmp_path / "m", FOLDERS[name][0], **{file: kept})
    with pytest.raises(CheckpointError) as caught:
        read_architecture(folder)
    assert says in str(caught.value) and "INTERNAL" not in str(caught.value)


def _between_pieces(model, count):
    """The beginning of a SentencePiece model with so many pieces, each shorter than 128 bytes."""
    at = 0
    for _ in range(count):
        at += 2 + model[at + 1]
    return model[:at]


def test_a_vocabulary_that_is_cut_between_its_tokens(tmp_path):
    folder = small_files(tmp_path / "glm", BASE, cog_pretrain_model=_between_pieces(COG, 80))
    with pytest.raises(CheckpointError, match=r"incomplete(.|\n)*after 80 pieces"):
        read_architecture(folder)
    # Whatever tokenizer_config.json says of the special tokens.
    names = {str(151329 + i): {"content": x} for i, x in enumerate(SPECIAL["glm4"])}
    folder = small_files(
        tmp_path / "glm4", {**OFFICIAL, "padded_vocab_size": 151552, "eos_token_id": 151329},
        tokenizer_model=RANKS, tokenizer_config_json={"added_tokens_decoder": names},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="has 260 tokens; that of a model with 151,552 ids"):
        read_architecture(folder)
