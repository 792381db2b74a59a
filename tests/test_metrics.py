"""Every metric against cases worked by hand, and ROUGE, BLEU, KS and the harmonic mean against their libraries."""

import math
import sys
from itertools import product
from statistics import fmean

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from tiny import FIRST_WORD, text_batch, tiny_llama

from mipfast import InputError, MipfastError, evaluate
from mipfast.judge import metrics

NLL = {p: -math.log(p) for p in (0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.8, 1.0)}
PAIRS = [
    ("The cat sat on the mat.", "The cats sat on mats"),
    ("She was born in Lisbon, Portugal, in 1964.", "She was born in Porto, Portugal."),
    ("No idea", "A painter from Oslo"),
    ("", "something"),
    ("Москва", "Москва"),
]


def test_a_choice_is_read_from_its_first_character():
    assert [metrics.chosen_letter(t) for t in ("B", " b) Oslo", "\nBecause", "(B)", "", "  ")] == [*"BBB(", "", ""]


def test_a_choice_by_likelihood():
    assert metrics.likeliest([2.0, 0.5, 0.7], 1) == 1 and metrics.likeliest([2.0, 0.5, 0.4], 1) == 0
    assert metrics.likeliest([0.5, 0.5], 0) == 1 and metrics.likeliest([0.5, 0.5], 1) == 0
    assert metrics.likeliest([math.inf, 9.0], 1) == 1
    assert math.isnan(metrics.likeliest([math.nan, 0.5], 1))


def test_cloze():
    assert metrics.contains("He lives in OSLO now", "Oslo") and not metrics.contains("Osl o", "Oslo")
    assert not metrics.contains("", "Oslo")
    assert metrics.exact_match(" oslo\n", "Oslo") and not metrics.exact_match("Oslo.", "Oslo")


def test_rouge_by_hand():
    """Five stemmed words of truth, six of the text; "the cat sat on mat" is common: P = 5/6, R = 5/5."""
    f, recall = metrics.rouge_l("the cat sat on the mat", "The cats sat on mats")
    assert (f, recall) == (pytest.approx(2 * (5 / 6) / (5 / 6 + 1)), 1)
    assert metrics.rouge_l("a b c d", "a c e") == pytest.approx((4 / 7, 2 / 3))


def test_bleu_by_hand():
    """Precisions of 1- to 4-grams 5/6, 3/5, 1/4 and none of 3, which exponential smoothing makes 1/(2·3); no brevity
    penalty."""
    text, truth = "the cat sat on red mat", "the cat lay on red mat"
    precisions = [5 / 6, 3 / 5, 1 / 4, 1 / 6]
    assert metrics.bleu(text, truth) == pytest.approx(math.prod(precisions) ** 0.25)
    assert metrics.bleu("a b c d e", "a b c d e") == pytest.approx(1)
    assert metrics.bleu("a b c d", "a b c d e f g h") == pytest.approx(math.exp(1 - 8 / 4))


@pytest.mark.parametrize("text, truth", PAIRS)
def test_rouge_and_bleu_are_the_libraries_(text, truth):
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(truth, text)["rougeL"]
    assert metrics.rouge_l(text, truth) == (expected.fmeasure, expected.recall)
    assert metrics.bleu(text, truth) == sacrebleu.sentence_bleu(text, [truth]).score / 100
    assert 0 <= metrics.bleu(text, truth) <= 1 + 1e-12


def test_an_empty_text_scores_nothing_and_another_script_has_no_rouge():
    assert metrics.rouge_l("", "something") == (0, 0) and metrics.bleu("", "something") == 0
    assert metrics.rouge_l("Москва", "Москва") == (0, 0) and metrics.bleu("Москва", "Москва") == pytest.approx(1)


def test_probabilities():
    assert metrics.probability(NLL[0.25]) == pytest.approx(0.25)
    assert metrics.probability(math.inf) == 0 and math.isnan(metrics.probability(math.nan))
    assert metrics.normalised_probability(NLL[0.4], [NLL[0.1], NLL[0.3]]) == pytest.approx(0.4 / 0.8)
    assert metrics.normalised_probability(1000.0, [1001.0]) == pytest.approx(1 / (1 + math.exp(-1)))


def shortest_prefix(hits):
    """k by its definition: try every prefix, the whole answer last, whose rest is nothing at all."""
    return next(k for k in range(len(hits) + 1) if all(hits[k:]))


def test_memorisation_by_hand():
    for hits, exact, strength in [
        ("111", 1, 1),
        ("000", 0, 0),
        ("1", 1, 1),
        ("0", 0, 0),
        ("1110", 3 / 4, 0),  # however much is given, greedy decoding ends in another token
        ("0111", 3 / 4, 3 / 4),
        ("10011", 3 / 5, 2 / 5),
    ]:
        hits = [hit == "1" for hit in hits]
        assert metrics.exact_memorisation(hits) == exact and metrics.extraction_strength(hits) == strength
    for of in (metrics.exact_memorisation, metrics.extraction_strength):
        with pytest.raises(InputError, match="expected at least one"):
            of([])


def test_memorisation_of_every_answer_of_up_to_eight_tokens():
    for length in range(1, 9):
        for hits in product([False, True], repeat=length):
            assert metrics.extraction_strength(hits) == pytest.approx(1 - shortest_prefix(hits) / length, abs=1e-15)
            assert metrics.exact_memorisation(hits) == pytest.approx(sum(hits) / length, abs=1e-15)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_memorisation_is_what_greedy_decoding_writes(padding):
    """Answers that the model would write in part: decoding is tried from every prefix, one sample at a time."""
    model = tiny_llama(torch.float64)
    batch = text_batch(model, [9, 12, 8, 10, 7], [4, 6, 1, 5, 1], padding)
    with torch.no_grad():
        for row, wrong in zip(range(5), [[], [0, 2], [], [4], [0]], strict=True):
            places = (batch["labels"][row] != -100).nonzero().flatten().tolist()
            for i, place in enumerate(places):  # what it says, and another token at the wrong places
                ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
                seen = int(batch["attention_mask"][row, :place].sum())
                said = int(model(ids[None, :seen]).logits[0, -1].argmax())
                token = FIRST_WORD + (said + 1 - FIRST_WORD) % (61 - FIRST_WORD) if i in wrong else said
                batch["input_ids"][row, place] = batch["labels"][row, place] = token
        expected = [greedily(model, *sample) for sample in samples_of(batch)]
    assert [strength for _, strength in expected] == [1, pytest.approx(1 / 2), 1, 0, 0]
    found = evaluate(model, [batch])
    assert found.exact_memorisation == pytest.approx([exact for exact, _ in expected])
    assert found.extraction_strength == pytest.approx([strength for _, strength in expected])
    assert found.hits == [exact == 1 for exact, _ in expected]


def samples_of(batch):
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        tokens, asked = ids[mask.bool()].tolist(), int((labels != -100).sum())
        yield tokens[:-asked], tokens[-asked:]


def greedily(model, prompt, answer):
    """(exact memorisation, extraction strength), token by token."""

    def writes(given):
        return int(model(torch.tensor([given])).logits[0, -1].argmax())

    exact = sum(writes(prompt + answer[:i]) == token for i, token in enumerate(answer)) / len(answer)
    for k in range(len(answer) + 1):
        written = prompt + answer[:k]
        while len(written) < len(prompt) + len(answer):
            written = [*written, writes(written)]
        if written == prompt + answer:
            return exact, 1 - k / len(answer)


def test_truth_ratio():
    """p_wrong is the mean of .1 and .3, not the .173 of their mean NLL."""
    ratio = metrics.truth_ratio(NLL[0.4], [NLL[0.1], NLL[0.3]])
    assert ratio == pytest.approx(0.2 / 0.4)
    assert metrics.truth_ratio_forget(ratio) == pytest.approx(0.5)
    assert metrics.truth_ratio_retain(ratio) == pytest.approx(0.5)
    ratio = metrics.truth_ratio(NLL[0.1], [NLL[0.4]])
    assert ratio == pytest.approx(4)
    assert metrics.truth_ratio_forget(ratio) == pytest.approx(0.25) and metrics.truth_ratio_retain(ratio) == 0
    assert metrics.truth_ratio(2000.0, [2000.0]) == pytest.approx(1)  # in logarithms: each p is 0 in float64
    with pytest.raises(InputError, match="at least one wrong answer"):
        metrics.truth_ratio(1.0, [])


def test_truth_ratio_at_its_ends():
    assert metrics.truth_ratio(2000.0, [1.0]) == math.inf
    assert metrics.truth_ratio_forget(math.inf) == 0 == metrics.truth_ratio_forget(0.0)
    assert metrics.truth_ratio_retain(math.inf) == 0 and metrics.truth_ratio_retain(0.0) == 1
    for ratio in (metrics.truth_ratio(math.nan, [1.0]), metrics.truth_ratio(1.0, [1.0, math.nan])):
        assert math.isnan(metrics.truth_ratio_forget(ratio)) and math.isnan(metrics.truth_ratio_retain(ratio))


def test_forget_quality_by_hand():
    """Two samples of 3 without overlap: the statistic is 1, reached by 2 of the 20 ways to deal them out."""
    assert metrics.forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)
    assert metrics.forget_quality([1, 2, 3], [1, 2, 3]) == 1
    a, b = [0.1, 0.9, 1.4, 3.0], [0.2, 0.3, 0.8, 2.0, 5.0]
    assert metrics.forget_quality(a, b) == stats.ks_2samp(a, b).pvalue
    assert metrics.forget_quality([1 / x for x in a], [1 / x for x in b]) == pytest.approx(metrics.forget_quality(a, b))
    assert math.isnan(metrics.forget_quality([math.nan, 1.0], b))
    with pytest.raises(InputError, match="found 0 and 5"):
        metrics.forget_quality([], b)


def test_auc_by_hand():
    """Six pairs: 3 beats 2 and 1, 2 beats 1 and draws with 2, 0 beats nobody."""
    assert metrics.auc([3, 2, 0], [2, 1]) == pytest.approx(3.5 / 6)
    assert metrics.auc([2, 1], [3, 2, 0]) == pytest.approx(2.5 / 6)
    assert math.isnan(metrics.auc([math.nan], [1.0]))
    with pytest.raises(InputError, match="found 0 and 1"):
        metrics.auc([], [1.0])


def test_model_utility():
    assert metrics.model_utility([0.5, 1.0]) == pytest.approx(2 / 3) == stats.hmean([0.5, 1.0])
    assert metrics.model_utility([0.9, 0.0]) == 0 and math.isnan(metrics.model_utility([math.nan, 1.0]))
    for wrong in ([], [0.5, -0.1]):
        with pytest.raises(InputError, match="harmonic mean"):
            metrics.model_utility(wrong)


def test_forgetting_rate_and_retention():
    assert metrics.forgetting_rate(0.8, 0.2) == pytest.approx(75) and metrics.retention(0.8, 0.6) == pytest.approx(75)
    assert metrics.forgetting_rate(0.4, 0.5) == pytest.approx(-25) and metrics.forgetting_rate(0.4, 0.0) == 100
    for vanilla, now in [(0.0, 0.0), (0.0, 0.3), (math.nan, 0.3), (0.3, math.nan)]:
        assert math.isnan(metrics.forgetting_rate(vanilla, now)) and math.isnan(metrics.retention(vanilla, now))


def test_the_kept_side_of_tofu_s_published_code():
    """1 - 1/s with s = exp(mean wrong NLL - true NLL): the same for one wrong answer, the geometric mean for more."""
    true, wrong = NLL[0.4], [NLL[0.1]]
    assert metrics.truth_ratio_retain(metrics.truth_ratio(true, wrong)) == pytest.approx(
        1 - 1 / math.exp(fmean(wrong) - true)
    )


@pytest.mark.parametrize(
    "library, call",
    [
        ("rouge_score", lambda: metrics.rouge_l("a", "a")),
        ("sacrebleu", lambda: metrics.bleu("a", "a")),
        ("scipy", lambda: metrics.model_utility([1.0])),
        ("sklearn", lambda: metrics.auc([1.0], [0.0])),
    ],
)
def test_a_missing_library_names_the_extra(monkeypatch, library, call):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    metrics._rouge_scorer.cache_clear()
    with pytest.raises(MipfastError, match=rf"needs {library}.*pip install 'mipfast\[eval\]'"):
        call()
