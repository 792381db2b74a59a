"""What an answer is worth: pure functions of texts and of negative log-likelihoods.

Shares, probabilities, ROUGE and BLEU are in [0, 1]; forgetting rate and retention in percent. NLL is the mean over an
answer's tokens, natural logarithm. nan in gives nan out. docs/metrics.md says where a formula differs from the
published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from statistics import fmean
from typing import Any

import numpy as np

from mipfast.errors import InputError, MipfastError


def chosen_letter(text: str) -> str:
    """The first non-blank character, upper case: MLLMU-Bench's reading of a multiple choice.

    Args:
        text: what the model wrote.

    Returns:
        The letter; "" for a blank text.

    Example:
        >>> from mipfast import metrics
        >>> metrics.chosen_letter(" b) Oslo")
        'B'
    """
    return text.strip()[:1].upper()


def likeliest(nlls: Sequence[float], true: int) -> float:
    """Whether the true option is the most probable one.

    Args:
        nlls: of every option.
        true: the true option's place among them.

    Returns:
        1 where it has the smallest NLL, the first of equals, else 0; nan where an NLL is nan.

    Example:
        >>> from mipfast import metrics
        >>> metrics.likeliest([2.0, 0.5, 0.7], true=1)
        1.0
    """
    return math.nan if any(map(math.isnan, nlls)) else float(np.argmin(nlls) == true)


def contains(text: str, truth: str) -> bool:
    """truth.lower() in text.lower(): MLLMU-Bench's cloze.

    Example:
        >>> from mipfast import metrics
        >>> metrics.contains("He lives in OSLO now", "Oslo")
        True
    """
    return truth.lower() in text.lower()


def exact_match(text: str, truth: str) -> bool:
    """Equal but for case and the blanks around them.

    Example:
        >>> from mipfast import metrics
        >>> metrics.exact_match(" oslo ", "Oslo"), metrics.exact_match("Oslo.", "Oslo")
        (True, False)
    """
    return text.strip().lower() == truth.strip().lower()


def rouge_l(text: str, truth: str) -> tuple[float, float]:
    """ROUGE-L, by the longest common subsequence of stemmed words: rouge-score's rougeL with use_stemmer=True.

    F = 2 P R / (P + R), R = LCS / words of truth, P = LCS / words of text (Lin 2004). Words are runs of a-z and 0-9: a
    text in another script has none and scores 0.

    Args:
        text: what the model wrote.
        truth: the answer.

    Returns:
        (F, recall).

    Raises:
        MipfastError: without rouge-score.

    Example:
        >>> from mipfast import metrics
        >>> metrics.rouge_l("a c", "a b c d")
        (0.6666666666666666, 0.5)
    """
    score = _rouge_scorer().score(truth, text)["rougeL"]
    return score.fmeasure, score.recall


def bleu(text: str, truth: str) -> float:
    """sacrebleu.sentence_bleu / 100: up to 4-grams, effective order, exponential smoothing, tokeniser 13a.

    Args:
        text: what the model wrote.
        truth: the answer.

    Raises:
        MipfastError: without sacrebleu.

    Example:
        >>> from mipfast import metrics
        >>> round(metrics.bleu("born in Oslo", "born in Oslo"), 6)
        1.0
    """
    return _library("sacrebleu").sentence_bleu(text, [truth]).score / 100


def probability(nll: float) -> float:
    """p = exp(-NLL): the geometric mean of the answer's token probabilities (TOFU).

    Example:
        >>> from mipfast import metrics
        >>> metrics.probability(0.0)
        1.0
    """
    return math.exp(-nll)


def exact_memorisation(token_hits: Sequence[bool]) -> float:
    """The share of an answer's tokens that the model ranks first, the answer's earlier tokens given.

    Tirumala et al., arXiv 2205.10770; open-unlearning's exact_memorization.

    Args:
        token_hits: whether each of the answer's tokens is ranked first, in order: an item of `Evaluation.token_hits`.

    Raises:
        InputError: for an answer without tokens.

    Example:
        >>> from mipfast import metrics
        >>> metrics.exact_memorisation([True, False, True, True])
        0.75
    """
    return fmean(_of_tokens(token_hits))


def extraction_strength(token_hits: Sequence[bool]) -> float:
    """1 - k / T: k of an answer's T tokens have to be given until greedy decoding writes exactly the rest.

    The tokens ranked first, earlier ones given, say it without decoding: T - k is how many hits in a row stand at the
    answer's end. Carlini et al., arXiv 2012.07805, for unlearning Wang et al., arXiv 2406.09179.

    Args:
        token_hits: whether each of the answer's tokens is ranked first, in order: an item of `Evaluation.token_hits`.

    Returns:
        1 where the prompt is enough; 0 where the last token is wrong however much is given.

    Raises:
        InputError: for an answer without tokens.

    Example:
        >>> from mipfast import metrics
        >>> metrics.extraction_strength([True, False, True, True])
        0.5
    """
    hits = _of_tokens(token_hits)
    return next((i for i, hit in enumerate(reversed(hits)) if not hit), len(hits)) / len(hits)


def normalised_probability(true: float, wrong: Sequence[float]) -> float:
    """p_true / (p_true + sum of p_wrong): TOFU's and CLEAR's probability where wrong answers are given.

    Args:
        true: the true answer's NLL.
        wrong: NLLs of the wrong answers.

    Example:
        >>> from mipfast import metrics
        >>> round(metrics.normalised_probability(0.7, [0.7, 0.7, 0.7]), 6)
        0.25
    """
    with np.errstate(invalid="ignore"):  # nan is a fair answer
        return float(np.exp(-true - np.logaddexp.reduce([-true, *(-w for w in wrong)])))


def truth_ratio(true: float, wrong: Sequence[float]) -> float:
    """r = p_wrong / p_true, p_wrong the arithmetic mean over the wrong answers (TOFU).

    Args:
        true: NLL of the paraphrased answer where there is one, else of the answer.
        wrong: NLLs of the wrong answers.

    Raises:
        InputError: without wrong answers.

    Example:
        >>> from math import log
        >>> from mipfast import metrics
        >>> round(metrics.truth_ratio(-log(0.5), [-log(0.1), -log(0.3)]), 6)  # 0.2 / 0.5
        0.4
    """
    if not len(wrong):
        raise InputError("a truth ratio needs at least one wrong answer; found none")
    with np.errstate(over="ignore", invalid="ignore"):  # inf and nan are fair answers
        return float(np.exp(np.logaddexp.reduce(-np.asarray(wrong)) - math.log(len(wrong)) + true))


def truth_ratio_forget(ratio: float) -> float:
    """min(r, 1/r): 1 where true and wrong answers are equally likely, as they should be on a forget set (TOFU).

    Example:
        >>> from mipfast import metrics
        >>> metrics.truth_ratio_forget(0.5), metrics.truth_ratio_forget(2.0)
        (0.5, 0.5)
    """
    with np.errstate(divide="ignore"):
        return float(np.minimum(ratio, np.divide(1, ratio)))


def truth_ratio_retain(ratio: float) -> float:
    """max(0, 1 - r): 1 where wrong answers have no probability, as they should on a retain set (TOFU).

    Example:
        >>> from mipfast import metrics
        >>> metrics.truth_ratio_retain(0.25), metrics.truth_ratio_retain(2.0)
        (0.75, 0.0)
    """
    return float(np.maximum(0, 1 - ratio))


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> float:
    """The p-value of a two-sample Kolmogorov-Smirnov test (scipy): large where two models cannot be told apart (TOFU).

    Args:
        ratios: the forget set's truth ratios.
        reference: those of a model trained without the forget set.

    Raises:
        InputError: where either is empty.
        MipfastError: without scipy.

    Example:
        >>> from mipfast import metrics
        >>> metrics.forget_quality([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
        1.0
    """
    if not len(ratios) or not len(reference):
        raise InputError(f"forget quality compares truth ratios; found {len(ratios)} and {len(reference)} of them")
    return float(_library("scipy.stats").ks_2samp(ratios, reference).pvalue)


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """The area under the ROC curve (scikit-learn): how often one of higher is above one of lower, ties half.

    Returns:
        A share in [0, 1]; nan where a value is not finite.

    Raises:
        InputError: where either is empty.
        MipfastError: without scikit-learn.

    Example:
        >>> from mipfast import metrics
        >>> metrics.auc([2.0, 4.0], [1.0, 3.0])
        0.75
    """
    if not len(higher) or not len(lower):
        raise InputError(f"an AUC compares two sets of values; found {len(higher)} and {len(lower)} of them")
    values = [*higher, *lower]
    if not all(map(math.isfinite, values)):
        return math.nan
    truth = [1] * len(higher) + [0] * len(lower)
    return float(_library("sklearn.metrics").roc_auc_score(truth, values))


def model_utility(values: Sequence[float]) -> float:
    """The harmonic mean (scipy) of what should stay high.

    Args:
        values: at least 0; TOFU takes ROUGE-L recall, probability and truth ratio of each of its kept sets.

    Returns:
        0 as soon as one of them is 0.

    Raises:
        InputError: for no values, or one below 0.
        MipfastError: without scipy.

    Example:
        >>> from mipfast import metrics
        >>> round(metrics.model_utility([1.0, 0.5]), 4)
        0.6667
    """
    if not len(values) or min(values) < 0:
        raise InputError(f"model utility is a harmonic mean of values of at least 0; found {list(values)}")
    return float(_library("scipy.stats").hmean(values))


def forgetting_rate(vanilla: float, now: float) -> float:
    """100 (vanilla - now) / vanilla: percent of the vanilla model's score that is gone; negative where it rose.

    Args:
        vanilla: a forget set's accuracy, ROUGE or BLEU before unlearning.
        now: the same after it.

    Returns:
        Percent; nan where vanilla is 0: nothing was known that could be forgotten.

    Example:
        >>> from mipfast import metrics
        >>> metrics.forgetting_rate(0.8, 0.2)
        75.0
    """
    return 100 - retention(vanilla, now)


def retention(vanilla: float, now: float) -> float:
    """100 now / vanilla: percent of the vanilla model's score that is left.

    Args:
        vanilla: a retain set's score before unlearning.
        now: the same after it.

    Returns:
        Percent; nan where vanilla is 0: nothing was known that could be kept.

    Example:
        >>> from mipfast import metrics
        >>> metrics.retention(0.8, 0.6)
        75.0
    """
    return 100 * now / vanilla if vanilla else math.nan


def _of_tokens(token_hits: Sequence[bool]) -> list[bool]:
    if not len(token_hits):
        raise InputError("memorisation is of an answer's tokens; found none, expected at least one")
    return list(token_hits)


@cache
def _rouge_scorer() -> Any:
    return _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MipfastError(f"this metric needs {name} ({error}); run: pip install 'mipfast[eval]'") from error
