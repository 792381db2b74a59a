"""What an answer is worth: pure functions of texts and of negative log-likelihoods.

Shares, probabilities, ROUGE and BLEU are in [0, 1]; forgetting rate and retention in percent. NLL is the mean over an
answer's tokens, natural logarithm. nan in gives nan out. docs/metrics.md says where a formula
differs from the published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from mipfast.errors import InputError, MipfastError


def chosen_letter(text: str) -> str:
    """The first non-blank character, upper case; "" for a blank text. MLLMU-Bench's reading of a multiple choice."""
    return text.strip()[:1].upper()


def likeliest(nlls: Sequence[float], true: int) -> float:
    """1 where option number true has the smallest NLL, the first of equals, else 0; nan where one of them is nan."""
    return math.nan if any(map(math.isnan, nlls)) else float(np.argmin(nlls) == true)


def contains(text: str, truth: str) -> bool:
    """truth.lower() in text.lower(): MLLMU-Bench's cloze."""
    return truth.lower() in text.lower()


def exact_match(text: str, truth: str) -> bool:
    """Equal but for case and the blanks around them."""
    return text.strip().lower() == truth.strip().lower()


def rouge_l(text: str, truth: str) -> tuple[float, float]:
    """(F, recall) of the longest common subsequence of stemmed words: rouge-score's rougeL with use_stemmer=True.

    F = 2 P R / (P + R), R = LCS / words of truth, P = LCS / words of text (Lin 2004). Words are runs of a-z and 0-9: a
    text in another script has none and scores 0."""
    found = _rouge_scorer().score(truth, text)["rougeL"]
    return found.fmeasure, found.recall


def bleu(text: str, truth: str) -> float:
    """sacrebleu.sentence_bleu / 100: up to 4-grams, effective order, exponential smoothing, tokeniser 13a."""
    return _library("sacrebleu").sentence_bleu(text, [truth]).score / 100


def probability(nll: float) -> float:
    """p = exp(-NLL): the geometric mean of the answer's token probabilities (TOFU)."""
    return math.exp(-nll)


def normalised_probability(true: float, wrong: Sequence[float]) -> float:
    """p_true / (p_true + sum of p_wrong), from NLLs: TOFU's and CLEAR's probability where wrong answers are given."""
    with np.errstate(invalid="ignore"):  # nan is the right word
        return float(np.exp(-true - np.logaddexp.reduce([-true, *(-w for w in wrong)])))


def truth_ratio(true: float, wrong: Sequence[float]) -> float:
    """r = p_wrong / p_true, from NLLs, p_wrong the arithmetic mean over the wrong answers (TOFU).

    true: of the paraphrased answer where there is one. Raises InputError without wrong answers."""
    if not len(wrong):
        raise InputError("a truth ratio needs at least one wrong answer; found none")
    with np.errstate(over="ignore", invalid="ignore"):  # inf and nan are the right words
        return float(np.exp(np.logaddexp.reduce(-np.asarray(wrong)) - math.log(len(wrong)) + true))


def truth_ratio_forget(ratio: float) -> float:
    """min(r, 1/r): 1 where true and wrong answers are equally likely, as they should be on a forget set (TOFU)."""
    with np.errstate(divide="ignore"):
        return float(np.minimum(ratio, np.divide(1, ratio)))


def truth_ratio_retain(ratio: float) -> float:
    """max(0, 1 - r): 1 where wrong answers have no probability, as they should on a retain set (TOFU)."""
    return float(np.maximum(0, 1 - ratio))


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> float:
    """The p-value of a two-sample Kolmogorov-Smirnov test (scipy) of a forget set's truth ratios against those of a
    model trained without it: large where the two cannot be told apart (TOFU). Raises InputError for no ratios."""
    if not len(ratios) or not len(reference):
        raise InputError(f"forget quality compares truth ratios; found {len(ratios)} and {len(reference)} of them")
    return float(_library("scipy.stats").ks_2samp(ratios, reference).pvalue)


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """How often a value of the first is above one of the second, ties half: the area under the ROC curve
    (scikit-learn). nan where a value is not finite. Raises InputError where either is empty."""
    if not len(higher) or not len(lower):
        raise InputError(f"an AUC compares two sets of values; found {len(higher)} and {len(lower)} of them")
    values = [*higher, *lower]
    if not all(map(math.isfinite, values)):
        return math.nan
    truth = [1] * len(higher) + [0] * len(lower)
    return float(_library("sklearn.metrics").roc_auc_score(truth, values))


def model_utility(values: Sequence[float]) -> float:
    """The harmonic mean (scipy) of what should stay high: TOFU takes ROUGE-L recall, probability and truth ratio of
    each of its kept sets. 0 as soon as one is 0. Raises InputError for none, or one below 0."""
    if not len(values) or min(values) < 0:
        raise InputError(f"model utility is a harmonic mean of values of at least 0; found {list(values)}")
    return float(_library("scipy.stats").hmean(values))


def forgetting_rate(vanilla: float, now: float) -> float:
    """100 (vanilla - now) / vanilla: percent of the vanilla model's score that is gone; negative where it rose. nan
    where vanilla is 0: nothing was known that could be forgotten. Of a forget set's accuracy, ROUGE or BLEU."""
    return 100 - retention(vanilla, now)


def retention(vanilla: float, now: float) -> float:
    """100 now / vanilla: percent of the vanilla model's score that is left; nan where vanilla is 0."""
    return 100 * now / vanilla if vanilla else math.nan


@cache
def _rouge_scorer() -> Any:
    return _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MipfastError(f"this metric needs {name} ({error}); run: pip install 'mipfast[eval]'") from error
