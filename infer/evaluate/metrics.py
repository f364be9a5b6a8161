"""Score texts against references: BLEU, ROUGE, METEOR, chrF. Needs the `evaluate` extra.

Per pair, then averaged, as the official script of ChatGLM2 (ptuning/main.py) does: ROUGE-1, -2 and
-L (F) of rouge-chinese over jieba's words; BLEU-4 of nltk over characters, smoothing method 3; each
times 100 and rounded to 4 digits. The script fails on an empty text, here it scores 0.

Over all pairs: METEOR of nltk over jieba's words (synonyms only where nltk's WordNet data are
installed; they are never downloaded), BLEU and chrF of sacrebleu.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from glm2_jax.text.chinese import CHINESE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jieba
    import sacrebleu
    from nltk.corpus import wordnet
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from nltk.translate.meteor_score import single_meteor_score
    from rouge_chinese import Rouge

jieba.setLogLevel(60)  # nothing on stderr

PER_PAIR = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


def score(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Return all scores of predictions against labels, none of which is blank."""
    pairs = [pair_scores(p, label) for p, label in zip(predictions, labels, strict=True)]
    chinese = any(map(CHINESE.search, labels))
    bleu, chrf = sacrebleu.BLEU(tokenize="zh" if chinese else "13a"), sacrebleu.CHRF()
    texts, references = list(predictions), [list(labels)]
    return {
        "rows": len(pairs),
        "empty_predictions": sum(not text.strip() for text in predictions),
        **{name: fmean(pair[name] for pair in pairs) for name in PER_PAIR},
        **_meteor(predictions, labels),
        "sacrebleu": bleu.corpus_score(texts, references).score,
        "sacrebleu_signature": str(bleu.get_signature()),
        "chrf": chrf.corpus_score(texts, references).score,
    }


def pair_scores(prediction: str, label: str) -> dict[str, float]:
    """Return the official script's four scores of one pair, each 0 to 100."""
    if not prediction.strip():
        return dict.fromkeys(PER_PAIR, 0.0)
    rouge: Any = Rouge(metrics=list(PER_PAIR[:2]))
    texts = [" ".join(jieba.cut(text)) for text in (prediction, label)]
    found = {name: score["f"] for name, score in rouge.get_scores(*texts)[0].items()}
    # ROUGE-L as rouge-chinese computes it, which keeps a table of all pairs of words.
    words, wanted = (_rouge_words(rouge, text) for text in texts)
    common = common_length(words, wanted)
    precision, recall = common / len(words), common / len(wanted)
    found["rouge-l"] = 2.0 * ((precision * recall) / (precision + recall + 1e-8))
    smooth = SmoothingFunction().method3
    with warnings.catch_warnings():  # nltk warns where a text shares no 4-gram
        warnings.simplefilter("ignore")
        bleu: Any = sentence_bleu([list(label)], list(prediction), smoothing_function=smooth)
    return {name: round(100 * value, 4) for name, value in (found | {"bleu-4": bleu}).items()}


def _rouge_words(rouge: Any, text: str) -> list[str]:
    """Return the words that rouge-chinese compares, of all its sentences."""
    sentences = (" ".join(part.split()) for part in rouge.cut_sent(text) if part)
    return [word for sentence in sentences for word in sentence.split(" ")]


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence (bit-parallel, Hyyrö 2004).

    Bit i of `rows` is 0 where the subsequence becomes longer with word i of `first`; memory is
    linear in the number of words.
    """
    places: dict[str, int] = {}
    for at, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << at
    mask = rows = (1 << len(first)) - 1
    for word in second:
        matches = rows & places.get(word, 0)
        rows = (rows + matches | rows - matches) & mask
    return len(first) - rows.bit_count()


def _meteor(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Return the mean METEOR, 0 to 100, and its stages: they depend on what is installed."""
    synonyms: Any = wordnet
    stages = "same words, stems, synonyms"
    try:
        wordnet.ensure_loaded()
    except LookupError:
        synonyms = SimpleNamespace(synsets=lambda word: [])  # no word has any
        stages = "same words, stems (no WordNet data)"
    scores = []
    for pair in zip(labels, predictions, strict=True):
        wanted, words = ([word for word in jieba.cut(text) if word.strip()] for text in pair)
        scores.append(single_meteor_score(wanted, words, wordnet=synonyms))
    return {"meteor": 100 * fmean(scores), "meteor_stages": stages}
