"""A tiny SentencePiece model with the settings of the published one, trained in memory."""

import functools
import io

import sentencepiece

_SENTENCES = (
    "你好，世界。今天天气很好，我们去公园散步吧。",
    "请问这个模型有多少层？它有二十八层。",
    "我是一个人工智能助手，很高兴见到你，欢迎问我任何问题。",
    "问：晚上睡不着应该怎么办\n\n答：可以听一听轻音乐。\n\n",
    "[Round 1]\n\n问：你好\n\n答：你好！\n\n",
    "Hello world, this is a tiny tokenizer for the tests.",
    "What is the capital of France? The capital of France is Paris.",
    "The model answers questions in English and in Chinese.",
    "def main():\n    print('hello world')\t# greeting",
    "sophisticated people like 1234567890 and 3.14159 <|user|> </s> <0x0A>",
)


@functools.cache
def sp_model(*, add_dummy_prefix: bool = True, byte_fallback: bool = True) -> bytes:
    """Trains the model: BPE, byte fallback, nothing normalised, digits split. Deterministic."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for s in _SENTENCES * 4 for line in s.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
