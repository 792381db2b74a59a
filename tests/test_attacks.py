"""Attacks against truths worked out by hand: pairs counted, weights rounded one by one, prompts written out again."""

import math
import zlib

import families
import numpy as np
import pytest
import torch
from tiny import FIRST_WORD, PAD, image_batch, marked, text_batch, tiny_llama, tiny_qwen_vl

from mipfast import DivergedError, InputError, ModelError
from mipfast.judge import attacks
from mipfast.judge.attacks import membership, prefixed, quantised, relearned


def scores(model, batch, k):
    """(mean, mean of the least likely share k) of the label tokens' log-probabilities, sample by sample."""
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    for row, labels in zip(logits, batch["labels"], strict=True):
        at = [t for t in range(1, len(labels)) if labels[t] != -100]
        found = sorted(row[t - 1].log_softmax(-1)[labels[t]].item() for t in at)
        yield sum(found) / len(found), sum(found[:k]) / k


def counted(members, strangers):
    return 100 * np.mean([(m > s) + 0.5 * (m == s) for m in members for s in strangers])


@pytest.mark.parametrize("seed", range(3))
def test_membership_counts_pairs(seed):
    model = tiny_llama(torch.float64)
    members = [text_batch(model, [14, 12], [10, 10], "left", seed=seed), text_batch(model, [11], [10], seed=seed + 10)]
    strangers = [text_batch(model, [13, 15, 12], [10, 10, 10], seed=seed + 20)]
    strangers += members[1:]  # ties count half
    truth = [zip(*(s for batch in side for s in scores(model, batch, 3)), strict=True) for side in (members, strangers)]
    loss, min_k = (counted(*pair) for pair in zip(*truth, strict=True))
    found = membership(model, members, strangers, k=0.3)
    assert (found["loss"], found["min_k"]) == (pytest.approx(loss), pytest.approx(min_k))
    assert list(found) == ["loss", "min_k", "min_k_plus_plus"]


class Words:
    """A tokenizer whose words are their numbers."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i < FIRST_WORD))


def of_one_model(model, batch, share):
    """A dict for every sample, in Python's own floats, one word of the vocabulary after the other."""
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    for row, labels in zip(logits.tolist(), batch["labels"].tolist(), strict=True):
        said, standard, words = [], [], []
        for t in range(1, len(labels)):
            if labels[t] == -100:
                continue
            total = math.fsum(math.exp(value) for value in row[t - 1])
            log_p = [value - math.log(total) for value in row[t - 1]]
            mu = math.fsum(math.exp(value) * value for value in log_p)
            variance = math.fsum(math.exp(value) * value**2 for value in log_p) - mu**2
            said.append(log_p[labels[t]])
            standard.append((said[-1] - mu) / math.sqrt(variance))
            words.append(labels[t])
        k = max(1, math.floor(share * len(said)))
        loss = math.fsum(said) / len(said)
        packed = zlib.compress(Words().decode(words, True).encode("utf-8"))
        yield {
            "loss": loss,
            "min_k": math.fsum(sorted(said)[:k]) / k,
            "min_k_plus_plus": math.fsum(sorted(standard)[:k]) / k,
            "zlib": loss / len(packed),
        }


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_every_likelihood_of_a_sample(padding, share):
    model, other = tiny_llama(torch.float64), tiny_llama(torch.float64)
    for weight in other.parameters():
        weight.data *= 1.3
    sides = [
        [
            text_batch(model, [14, 12], [10, 7], padding, seed),
            text_batch(model, [9, 11, 5], [4, 1, 2], padding, seed + 9),
        ]
        for seed in (1, 2)
    ]
    sides[0][0]["labels"][0, sides[0][0]["labels"][0] != -100] = FIRST_WORD  # a text that packs well
    truth = [[one for batch in side for one in of_one_model(model, batch, share)] for side in sides]
    for side, expected in zip(sides, truth, strict=True):
        found = attacks._likelihoods(model, side, share, Words())
        assert found == {name: pytest.approx([one[name] for one in expected], rel=1e-9) for name in expected[0]}
        for one, its in zip(
            expected, (its for batch in side for its in of_one_model(other, batch, share)), strict=True
        ):
            one["reference"] = one["loss"] - its["loss"]
    expected = {name: pytest.approx(counted(*([one[name] for one in side] for side in truth))) for name in truth[0][0]}
    assert membership(model, *sides, k=share, tokenizer=Words(), reference=other) == expected
    assert len({float(value.expected) for value in expected.values()}) > 2  # they tell different things
    assert membership(model, *sides, reference=model)["reference"] == 50  # to which nothing is news


def test_standardised_by_hand():
    """p = 1/2, 1/4, 1/4: log p = -1, -2, -2 in units of log 2, mean -3/2, standard deviation 1/2."""
    log_p = torch.tensor([[0.5, 0.25, 0.25, 0.0]] * 2, dtype=torch.float64).log()  # and a word that is ruled out
    assert attacks._standardised(log_p, -log_p[[0, 1], [0, 2]]).tolist() == pytest.approx([1, -1])
    even = torch.full((1, 4), 0.25).log()
    sure = torch.tensor([[0.0, -200.0, -torch.inf]])
    assert [attacks._standardised(log_p, -log_p[:, 0]).item() for log_p in (even, sure)] == [0, 0]
    assert attacks._standardised(sure, -sure[:, 1]).item() == pytest.approx(-200 / 1e-3)


def test_what_was_trained_is_told_apart_and_what_was_driven_out_stands_out():
    model = tiny_qwen_vl()
    members, strangers = [image_batch(model, 3, seed=1)], [image_batch(model, 4, seed=2)]
    with relearned(model, members * 20, lr=5e-3):
        assert set(membership(model, members, strangers).values()) == {100}
        assert set(membership(model, strangers, members).values()) == {0}


def test_one_token_answers_have_one_score():
    model = tiny_llama()
    sides = [[text_batch(model, [9, 7, 8, 6], [1, 1, 1, 1], seed=seed)] for seed in (0, 1)]
    found = membership(model, *sides)
    assert found["loss"] == found["min_k"]


def test_membership_says_what_it_cannot_do():
    model = tiny_llama()
    sides = [[text_batch(model, [9], [2], seed=seed)] for seed in (0, 1)]
    with pytest.raises(InputError, match="k=0"):
        membership(model, *sides, k=0)
    with pytest.raises(InputError, match="1 and 0"):
        membership(model, sides[0], [])
    with pytest.raises(InputError, match="tokenizer is a str; expected one with decode"):
        membership(model, *sides, tokenizer="gpt2")
    with pytest.raises(InputError, match="reference is a str; expected a model"):
        membership(model, *sides, reference="gpt2")
    broken = tiny_llama()
    broken.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(DivergedError, match="sample 0 .*check the reference's weights"):
        membership(model, *sides, reference=broken)
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(DivergedError, match="sample 0"):
        membership(model, *sides)


def rounded(weight, bits):
    """[out, in] numpy, one weight at a time."""
    result = np.zeros_like(weight)
    for i, row in enumerate(weight):
        if scale := max(abs(row)) / (2 ** (bits - 1) - 1):
            for j, value in enumerate(row):
                result[i, j] = scale * round(value / scale)
    return result


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    "build", [lambda: tiny_qwen_vl(torch.float64), lambda: families.build("gpt2")], ids=["qwen", "gpt2"]
)
def test_quantised_rounds_every_projection_and_nothing_else(build, bits):
    model = build()
    projections = {
        f"{name}.weight": type(module).__name__ == "Conv1D"
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    }
    assert len(projections) > 10
    first = model.get_parameter(next(iter(projections)))
    first.data[0] = first.data[:, 0] = 0  # a channel without a scale
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with quantised(model, bits):
        for name, tensor in model.state_dict().items():
            if name not in projections:
                assert torch.equal(tensor, before[name]), name
                continue
            weight, found = ((t.T if projections[name] else t).numpy() for t in (before[name], tensor))
            np.testing.assert_allclose(found, rounded(weight, bits), rtol=0, atol=1e-14, err_msg=name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_quantised_gives_back_the_bits_after_an_error():
    model = tiny_llama(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="mine"), quantised(model, 3):
        assert not torch.equal(
            model.model.layers[0].mlp.down_proj.weight, before["model.layers.0.mlp.down_proj.weight"]
        )
        raise RuntimeError("mine")
    last = model.model.layers[3].mlp.down_proj
    last.weight = torch.nn.Parameter(torch.ones(32, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.3\.mlp\.down_proj\.weight is torch\.int8"), quantised(model):
        pass
    del before["model.layers.3.mlp.down_proj.weight"]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for bits in (1, 9, 3.5, "4"):
        with pytest.raises(InputError, match=f"bits={bits!r}; expected 2 to 8"), quantised(model, bits):
            pass


def rewritten(batch, tokens, at, padding):
    """Every sample written out as a list, the tokens put in, and padded again."""
    added = {"input_ids": tokens, "attention_mask": [1] * 3, "labels": [-100] * 3}
    added |= {"mm_token_type_ids": [0] * 3, "subject": [False] * 3}
    pads = {"input_ids": PAD, "attention_mask": 0, "labels": -100, "mm_token_type_ids": 0, "subject": False}
    result = {}
    for name in added.keys() & batch.keys():
        rows = [row[mask.bool()].tolist() for row, mask in zip(batch[name], batch["attention_mask"], strict=True)]
        rows = [row[:at] + added[name] + row[at:] for row in rows]
        fill = [[pads[name]] * (max(map(len, rows)) - len(row)) for row in rows]
        rows = [f + row if padding == "left" else row + f for f, row in zip(fill, rows, strict=True)]
        result[name] = torch.tensor(rows)
    return result


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_prefixed_is_the_batch_of_the_longer_prompt(padding, at):
    model, tokens = tiny_qwen_vl(), [7, 9, 8]
    batch = marked(text_batch(model, [9, 6, 8], [2, 1, 3], padding), (0, 2), (3, 4), (1, 2))
    found, truth = prefixed(batch, tokens, at), rewritten(batch, tokens, at, padding)
    positions = (truth["attention_mask"].cumsum(-1) - 1).clamp_min(0).expand(3, -1, -1)
    truth["position_ids"] = positions
    assert found.keys() == truth.keys() and all(torch.equal(found[name], truth[name]) for name in truth)
    pictured = image_batch(model, 3, padding=padding)
    found, truth = prefixed(pictured, torch.tensor(tokens), at), rewritten(pictured, tokens, at, padding)
    assert found.keys() == pictured.keys() and all(torch.equal(found[name], truth[name]) for name in truth)
    assert found["pixel_values"] is pictured["pixel_values"]
    with torch.no_grad():
        assert model(**found).loss.isfinite()


def test_prefixed_says_what_it_cannot_do():
    model = tiny_llama()
    batch = text_batch(model, [5, 8], [2, 2], "left")
    for at in (-1, 4, 5):
        with pytest.raises(InputError, match=f"at={at} is not inside every sample's prompt; expected an integer 0..3"):
            prefixed(batch, [7], at)
    with pytest.raises(InputError, match=r"cross_attention_mask \[2, 8, 1, 4\]"):
        prefixed({**batch, "cross_attention_mask": torch.ones(2, 8, 1, 4)}, [7])
    with pytest.raises(InputError, match=r"attention_mask \[2, 1, 8, 8\]"):
        prefixed({**batch, "attention_mask": torch.ones(2, 1, 8, 8)}, [7])


def test_prefixed_takes_tokens_as_a_tokenizer_gives_them():
    batch = text_batch(tiny_llama(), [5, 8], [2, 2], "left")
    plain = prefixed(batch, [7, 9], at=3)
    for tokens in ([[7, 9]], torch.tensor([[7, 9]]), torch.tensor([7, 9], dtype=torch.int32)):
        found = prefixed(batch, tokens, at=3)
        assert all(torch.equal(found[name], plain[name]) for name in plain)
