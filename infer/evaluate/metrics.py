"""How like a text is to the one that is wanted: BLEU, ROUGE, METEOR.

Per pair, and then the mean, as the official script of ChatGLM2 (ptuning/main.py) does: ROUGE-1, -2
and -L of rouge-chinese, F, over jieba's words; BLEU-4 of nltk over characters, smoothing method 3;
each times 100 and rounded to 4 digits. The script stops at an empty text, here it counts 0.

Over all pairs at once: BLEU and chrF of sacrebleu. METEOR of nltk over jieba's words; its synonyms
take nltk's WordNet data, which is never fetched: without it only same words and same stems count.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from glm2_jax.errors import UsageError
from infer.evaluate.rows import CHINESE

PER_PAIR = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
_PACKAGES = ("jieba", "rouge_chinese", "nltk", "sacrebleu")


def check_packages() -> None:
    """Raises UsageError if the packages for this are not installed; a moment later jieba's
    dictionary is there."""
    for name in _PACKAGES:
        try:
            _import(name)
        except ImportError as error:
            raise UsageError(
                f"{name} is not installed, --task generation needs it",
                str(error),
                "pip install 'glm2-jax[evaluate]'",
            ) from None


def _import(name: str) -> Any:
    """A package; what it warns of when it is imported is not the user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
    if name == "jieba":
        module.setLogLevel(60)  # it tells how it loads its dictionary
    return module


def score(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """All figures for texts and those that were wanted; none of the latter is blank."""
    pairs = [pair_scores(p, label) for p, label in zip(predictions, labels, strict=True)]
    means = {name: fmean(pair[name] for pair in pairs) for name in PER_PAIR}
    return {
        "rows": len(pairs),
        "empty_predictions": sum(not text.strip() for text in predictions),
        **means,
        **_meteor(predictions, labels),
        **_corpus(predictions, labels),
    }


def pair_scores(prediction: str, label: str) -> dict[str, float]:
    """The official script's four figures for a pair, 0 to 100."""
    if not prediction.strip():
        return dict.fromkeys(PER_PAIR, 0.0)
    nltk_bleu = _import("nltk.translate.bleu_score")
    rouge = _import("rouge_chinese").Rouge(metrics=list(PER_PAIR[:2]))
    texts = [" ".join(_import("jieba").cut(text)) for text in (prediction, label)]
    found = {name: score["f"] for name, score in rouge.get_scores(*texts)[0].items()}
    found["rouge-l"] = _rouge_l(*(_rouge_words(rouge, text) for text in texts))
    scores = {name: round(100 * found[name], 4) for name in PER_PAIR[:3]}
    smooth = nltk_bleu.SmoothingFunction().method3
    with warnings.catch_warnings():  # nltk tells that a text shares no four characters in a row
        warnings.simplefilter("ignore")
        bleu = nltk_bleu.sentence_bleu([list(label)], list(prediction), smoothing_function=smooth)
    return scores | {"bleu-4": round(100 * bleu, 4)}


def _rouge_words(rouge: Any, text: str) -> list[str]:
    """The words that rouge-chinese compares, of its sentences one after another."""
    sentences = (" ".join(part.split()) for part in rouge.cut_sent(text) if part)
    return [word for sentence in sentences for word in sentence.split(" ")]


def _rouge_l(prediction: Sequence[str], label: Sequence[str]) -> float:
    """ROUGE-L of rouge-chinese, F; its own function keeps a table of all pairs of words."""
    common = common_length(prediction, label)
    precision, recall = common / len(prediction), common / len(label)
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence (bit-parallel, Hyyrö 2004).

    Bit i of `rows` is 0 where the subsequence becomes longer with word i of `first`. The memory is
    linear in the words, and a step is a few operations on one long integer.
    """
    places: dict[str, int] = {}
    for at, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << at
    every = (1 << len(first)) - 1
    rows = every
    for word in second:
        matches = rows & places.get(word, 0)
        rows = (rows + matches | rows - matches) & every
    return len(first) - rows.bit_count()


class _NoSynonyms:
    """In place of WordNet: no word has a synonym."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _meteor(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """The mean of METEOR, 0 to 100, and which of its stages were computed."""
    meteor = _import("nltk.translate.meteor_score").single_meteor_score
    wordnet: Any = _NoSynonyms()
    stages = "same words, stems (no WordNet data)"
    if _has_wordnet():
        wordnet, stages = _import("nltk.corpus").wordnet, "same words, stems, synonyms"
    scores = [
        meteor(_words(label), _words(prediction), wordnet=wordnet)
        for prediction, label in zip(predictions, labels, strict=True)
    ]
    return {"meteor": 100 * fmean(scores), "meteor_stages": stages}


def _has_wordnet() -> bool:
    find = _import("nltk.data").find
    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            find(name)
            return True
        except LookupError:
            continue
    return False


def _words(text: str) -> list[str]:
    return [word for word in _import("jieba").cut(text) if word.strip()]


def _corpus(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """BLEU and chrF of sacrebleu over everything, with the signature that names how."""
    sacrebleu = _import("sacrebleu")
    chinese = any(map(CHINESE.search, labels))
    bleu = sacrebleu.BLEU(tokenize="zh" if chinese else "13a")
    chrf = sacrebleu.CHRF()
    references = [list(labels)]
    return {
        "sacrebleu": bleu.corpus_score(list(predictions), references).score,
        "sacrebleu_signature": str(bleu.get_signature()),
        "chrf": chrf.corpus_score(list(predictions), references).score,
    }
