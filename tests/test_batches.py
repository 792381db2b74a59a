"""What a batch may be: the same scores however its samples are put together, and an InputError for what is none."""

import logging

import families
import peft
import pytest
import tiny
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import split, text_batch, tiny_llama

from mipfast import (
    InputError,
    RMisUConfig,
    RMisUTrainer,
    evaluate,
    fit_path,
    hidden_states,
    learned_direction,
    locate,
    misdirect,
    unlearn,
)
from mipfast.data import Record, labelled
from mipfast.data.encoder import Encoder
from mipfast.edit import baselines
from mipfast.judge import attacks
from mipfast.judge.records import evaluate_records
from mipfast.model.batch import find_labels, read_batch, without_labels
from mipfast.model.likelihood import sample_nll

MODEL, GPT2 = tiny_llama(), families.build("gpt2")
GOOD = text_batch(MODEL, [9, 7], [2, 1])
PATH, LOCATED = {("model.layers", 0): torch.arange(4)}, locate(MODEL, GOOD, n_steps=1)


def neo():
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4)
    config = hf.GPTNeoConfig(**sizes, attention_types=[[["global"], 2]], max_position_embeddings=32)
    return tiny._settle(hf.GPTNeoForCausalLM(config), torch.float32).double()


def opt():
    config = hf.OPTConfig(vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    config.word_embed_proj_dim, config.max_position_embeddings = 32, 32
    return tiny._settle(hf.OPTForCausalLM(config), torch.float32).double()


# --------------------------------------------------------------------------------- the same scores, however batched

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.15}  # rope is float32 in all three


def built(name, dtype):
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = hf.LlamaConfig(**sizes)
    model = tiny._settle(hf.LlamaForCausalLM(config), torch.float32) if name == "llama" else families.build(name)
    return model.to(dtype)


def wrapped(model):
    torch.manual_seed(0)
    target = "c_fc" if hasattr(model, "transformer") else "up_proj"
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)).eval()


MODELS: dict = {}


def model_of(name, dtype, wrap):
    if (name, dtype, wrap) not in MODELS:
        model = built(name, dtype)
        MODELS[name, dtype, wrap] = wrapped(model) if wrap else model
    return MODELS[name, dtype, wrap]


@st.composite
def samples(draw):
    """(tokens, first and one past the last labelled one) of every sample."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(2, 12))
        start = draw(st.integers(0, length - 1))
        stop = draw(st.integers(max(start + 1, 2), length))
        rows.append((draw(st.lists(st.integers(6, 60), min_size=length, max_size=length)), start, stop))
    return rows


def padded(rows, side):
    longest = max(len(tokens) for tokens, *_ in rows)
    ids = torch.full((len(rows), longest), tiny.PAD)
    mask, labels, subject = torch.zeros_like(ids), torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (tokens, start, stop) in enumerate(rows):
        at = longest - len(tokens) if side == "left" else 0
        ids[i, at : at + len(tokens)], mask[i, at : at + len(tokens)] = torch.tensor(tokens), 1
        labels[i, at + start : at + stop] = ids[i, at + start : at + stop]
        subject[i, at + start // 3 : at + start // 2 + 1] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "subject": subject}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=samples(),
    side=st.sampled_from(["left", "right"]),
    batch_size=st.integers(1, 4),
    dtype=st.sampled_from(list(TOLERANCES)),
    name=st.sampled_from(["llama", "gpt2"]),
    wrap=st.booleans(),
    positions=st.sampled_from(["last_prompt", "answer", "prompt", "all", "first", "subject"]),
)
def test_scores_do_not_depend_on_the_batch(rows, side, batch_size, dtype, name, wrap, positions):
    model = model_of(name, dtype, wrap)
    batches = [padded(rows[i : i + batch_size], side) for i in range(0, len(rows), batch_size)]
    ones = [padded([row], side) for row in rows]
    config = dict(search="pointwise", n_steps=2, residuals="none", positions=positions)
    together, alone = (locate(model, some, **config).scores for some in (batches, ones))
    off = (together - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1).clamp_min(1e-6)
    assert off.max() < TOLERANCES[dtype], off
    judged, expected = (torch.cat([sample_nll(model, one) for one in some]) for some in (batches, ones))
    torch.testing.assert_close(judged, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    if dtype != torch.bfloat16:
        assert evaluate(model, batches) == evaluate(model, ones)


@pytest.mark.parametrize("make", [lambda: GPT2, neo, opt], ids=["gpt2", "neo", "opt"])
def test_a_table_of_positions_is_read_from_a_sample_s_first_token_on(make):
    model = make()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(6, 60, (length,), generator=generator) for length in (5, 12)]
    left, right = (tiny._pad(rows, [3, 3], side) for side in ("left", "right"))
    alone = [model(input_ids=row[None]).logits[0, -4:-1] for row in rows]
    for batch in (left, right):
        given, labels = read_batch(model, batch)
        logits = model(**without_labels(given)).logits
        for i, expected in enumerate(alone):
            torch.testing.assert_close(logits[i, labels.index[i]], expected)
        assert evaluate(model, [batch]).predicted == [one.argmax(-1).tolist() for one in alone]


def test_scores_and_states_of_padding_on_the_left():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(6, 60, (length,), generator=generator) for length in (5, 12)]
    left = tiny._pad(rows, [1, 1], "left")
    for call in (
        lambda batch: locate(GPT2, batch).scores,
        lambda batch: sample_nll(GPT2, batch),
        lambda batch: hidden_states(GPT2, batch, 0),
    ):
        alone = torch.cat([call(split(left, i)) for i in range(2)])
        torch.testing.assert_close(call(left), alone, rtol=1e-5, atol=1e-8)


def test_the_batch_s_own_positions_are_kept():
    batch = tiny._pad([torch.arange(6, 11), torch.arange(6, 18)], [1, 1], "left")
    own = batch | {"position_ids": torch.arange(12).expand(2, -1)}
    assert (locate(GPT2, own).scores[0] - locate(GPT2, batch).scores[0]).norm() > 1e-3
    longest = GPT2.config.n_positions
    fitting = padded([([7] * longest, longest - 1, longest), ([7] * 3, 2, 3)], "left")
    locate(GPT2, fitting, n_steps=1)


def test_a_sample_s_first_token_is_predicted_by_nothing_on_either_side():
    rows = [([7, 8, 9], 0, 3), ([7, 8, 9, 10, 11], 0, 5)]
    for side in ("left", "right"):
        labels = find_labels(padded(rows, side))
        assert labels.target[labels.mask].tolist() == [8, 9, 8, 9, 10, 11]
    hole = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.tensor([[1, 0, 1]])}
    assert find_labels(hole | {"labels": torch.tensor([[-100, -100, 9]])}).target.tolist() == [[9]]


# -------------------------------------------------------------------------------------- what no entry point takes


def changed(**values):
    return lambda batch: batch | {name: value(batch) for name, value in values.items()}


def at(name, place, value):
    return changed(**{name: lambda batch: batch[name].index_put(tuple(map(torch.tensor, place)), torch.tensor(value))})


BAD = {
    "labels padded with -1": (
        changed(labels=lambda b: b["labels"].where(b["labels"] != -100, -1)),
        "labels hold -1; expected tokens, and -100 alone",
    ),
    "one label of -99": (at("labels", (0, 1), -99), "labels hold -99"),
    "labels on padding": (at("labels", (1, 8), 7), r"samples \[1\] have labels where their attention_mask is 0"),
    "a label outside the vocabulary": (
        at("labels", (0, 8), 61),
        "labels hold token 61; the model has the tokens 0",
    ),
    "a token outside the vocabulary": (at("input_ids", (0, 1), 99), "input_ids hold token 99"),
    "a negative token": (at("input_ids", (0, 1), -1), "input_ids hold token -1; the model has the tokens 0..60"),
    "labels that are floats": (changed(labels=lambda b: b["labels"].float()), "labels are a torch.float32 tensor"),
    "a mask of another length": (
        changed(attention_mask=lambda b: b["attention_mask"][:, 1:]),
        r"labels have shape \(2, 9\) beside attention_mask \(2, 8\)",
    ),
    "no rows": (lambda b: {name: value[:0] for name, value in b.items()}, r"labels have shape \(0, 9\)"),
    "no tokens": (lambda b: {name: value[:, :0] for name, value in b.items()}, r"labels have shape \(2, 0\)"),
    "use_cache": (changed(use_cache=lambda b: True), "the batch has use_cache, a bool: no part of a batch"),
    "return_dict": (changed(return_dict=lambda b: False), "the batch has return_dict, a bool"),
    "logits_to_keep": (changed(logits_to_keep=lambda b: torch.tensor([1])), "the batch has logits_to_keep"),
    "past_key_values": (changed(past_key_values=lambda b: hf.DynamicCache()), "the batch has past_key_values, a Dyn"),
    "texts": (changed(question=lambda b: ["who ?"]), "the batch has question, a list"),
}


class Encodes:
    """An encoder of one batch."""

    def __init__(self, batch):
        self.batch = self.prompts = lambda records: batch
        self.tokenizer = None


def trained(batch, tmp_path):
    options = dict(max_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True)
    args = hf.TrainingArguments(str(tmp_path), remove_unused_columns=False, **options)
    one = {"data_collator": lambda examples: examples[0], "train_dataset": [{"forget": GOOD, "retain": batch}]}
    RMisUTrainer(MODEL, args, path=PATH, rmisu=RMisUConfig(), **one).train()


def relearned(batch):
    with attacks.relearned(MODEL, [batch]):
        pass


ONE = baselines.BaselineConfig(steps=1)
RECORD = Record("7", "", "text", "cloze", "who", "red")
DOORS = {
    "locate": lambda batch, tmp: locate(MODEL, batch),
    "counterfactuals": lambda batch, tmp: locate(MODEL, GOOD, counterfactuals=batch),
    "evaluate": lambda batch, tmp: evaluate(MODEL, [batch]),
    "evaluate_records": lambda batch, tmp: evaluate_records(MODEL, Encodes(batch), [RECORD]),
    "hidden_states": lambda batch, tmp: hidden_states(MODEL, batch, 1),
    "learned_direction": lambda batch, tmp: learned_direction(MODEL, [batch], 1, "answer", 4.0),
    "fit_path": lambda batch, tmp: fit_path(MODEL, [GOOD], [batch], LOCATED, [], aggregate="mean"),
    "unlearn": lambda batch, tmp: unlearn(MODEL, [GOOD], [batch]),
    "misdirect": lambda batch, tmp: misdirect(MODEL, PATH, [GOOD], [batch], steps=1),
    **{
        name: lambda batch, tmp, name=name: baselines.run(MODEL, name, [batch], [GOOD], ONE)
        for name in baselines.METHODS
    },
    "relearned": lambda batch, tmp: relearned(batch),
    "membership": lambda batch, tmp: attacks.membership(MODEL, [GOOD], [batch]),
    "the trainer": trained,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_entry_point_refuses_what_is_no_batch(door, tmp_path):
    before = {name: p.clone() for name, p in MODEL.state_dict().items()}
    for name, (change, message) in BAD.items():
        batch = change({k: v for k, v in GOOD.items() if k != "position_ids"})
        if door == "the trainer" and isinstance(batch.get("past_key_values"), hf.DynamicCache):
            continue  # accelerate moves it to the device first, in its own way
        with pytest.raises(InputError, match=message):
            DOORS[door](batch, tmp_path)
            raise AssertionError(f"{door} took {name}")
    assert all(torch.equal(p, before[name]) for name, p in MODEL.state_dict().items())


@pytest.mark.parametrize("door", sorted(DOORS.keys() - {"evaluate_records"}))  # which asks its encoder for none
def test_no_entry_point_gives_the_model_a_subject(door, tmp_path):
    """The same weights with and without it."""
    before = {name: p.clone() for name, p in MODEL.state_dict().items()}
    after, other = [], text_batch(MODEL, [9, 7], [2, 1], seed=5)
    for batch in (other, tiny.marked(other, (1, 3), (4, 5))):
        DOORS[door](batch, tmp_path)
        after.append({name: p.clone() for name, p in MODEL.state_dict().items()})
        MODEL.load_state_dict(before)
    assert all(torch.equal(p, after[1][name]) for name, p in after[0].items())


def test_more_tokens_than_positions_are_refused():
    longest = GPT2.config.n_positions
    batch = padded([([7] * (longest + 1), longest, longest + 1)], "right")
    for call in (lambda: locate(GPT2, batch), lambda: evaluate(GPT2, [batch]), lambda: unlearn(GPT2, [batch], [batch])):
        with pytest.raises(InputError, match=f"reaches position {longest}; the model has 0..{longest - 1}: shorten"):
            call()


def test_labels_that_were_shifted_by_hand_are_named(caplog):
    ids = torch.tensor([[7, 8, 9, 10, 11, 12]])
    shifted = torch.tensor([[-100, -100, 10, 11, 12, -100]])
    with caplog.at_level(logging.WARNING, "mipfast"):
        evaluate(MODEL, [{"input_ids": ids, "labels": shifted.roll(1, 1)}])
        evaluate(MODEL, [{"input_ids": torch.full_like(ids, 7), "labels": torch.full_like(ids, 7)}])
        assert not caplog.records
        evaluate(MODEL, [{"input_ids": ids, "labels": shifted}])
    assert "every label is the token after its place: shifted by hand" in caplog.text


# ---------------------------------------------------------------------------------------- an answer behind its prompt


def tokenizer(**template):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "who", "is", "king", "red"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **template)


def test_an_end_token_that_a_tokenizer_appends_never_stands_between_prompt_and_answer():
    batch = labelled(tokenizer(), "who is king", "red")
    assert batch["input_ids"].tolist() == [[1, 4, 5, 6, 7]] and batch["labels"].tolist() == [[-100] * 4 + [7]]
    encoder = Encoder(tokenizer(), None, MODEL.config)
    encoded = encoder.encode(Record("7", "", "text", "generation", "who is king", "red"))
    assert (encoded.prompt, encoded.answer) == ([1, 4, 5, 6], [7])
    for prompt, answer, missing in (("who", "", "answer"), ("who", " ", "answer")):
        with pytest.raises(InputError, match=f"the {missing} gives no token"):
            labelled(tokenizer(), prompt, answer)
