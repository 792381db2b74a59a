"""Every kind of broken setting or data that comes through a public door says what was found, and what to do."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import twins
import yaml
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl
from transformers import TrainingArguments

from mipfast import (
    ArtefactError,
    DivergedError,
    InputError,
    LocateConfig,
    MIPConfig,
    MipfastError,
    ModelError,
    NeuronPath,
    RMisUConfig,
    RMisUTrainer,
    data,
    evaluate,
    find_sites,
    hidden_states,
    learned_direction,
    locate,
    misdirect,
    prune,
    unlearn,
)
from mipfast.cli import app
from mipfast.data import Record
from mipfast.data.checkpoint import load_model
from mipfast.data.encoder import Encoder
from mipfast.edit import baselines
from mipfast.experiment import locate_file, pipeline
from mipfast.experiment.comparison import compare
from mipfast.judge import attacks
from mipfast.judge.records import evaluate_records

MODEL = tiny_llama()
FORGET, RETAIN = ([text_batch(MODEL, [9, 7], [2, 1], seed=seed + i) for i in range(2)] for seed in (0, 10))
FIRST = FORGET[0]
SEEING = tiny_qwen_vl()
PICTURES = image_batch(SEEING, 2)
SHORT = PICTURES | {"pixel_values": PICTURES["pixel_values"][:-4]}


def path_of(model):
    sites = find_sites(model)
    return NeuronPath({(sites.text.name, 0): torch.arange(4)}, sites.fingerprint())


PATH = path_of(MODEL)
DEMO = Path(data.__file__).parents[1] / "demo" / "weights" / "base"
ENCODER = Encoder.from_pretrained(DEMO)
LOCATED = locate(MODEL, FIRST, search="pointwise", n_steps=1)


def nan():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = float("nan")
    return model


def unlearned(forget=FORGET, retain=RETAIN, model=MODEL, config=None, **rmisu):
    unlearn(model, forget, retain, config or MIPConfig(rmisu=RMisUConfig(**rmisu)))


def misdirected(path=PATH, forget=FORGET, retain=RETAIN, config=None, **rmisu):
    misdirect(MODEL, path, forget, retain, config or RMisUConfig(**rmisu))


def compared(method="ga", forget=FORGET, config=None, model=MODEL):
    baselines.run(model, method, forget, RETAIN, config)


def learned(batches=FORGET, layer=1, positions="last_prompt", length=3.0, **more):
    learned_direction(MODEL, batches, layer, positions, length, **more)


def attacked(**relearned):
    with attacks.relearned(MODEL, **{"batches": FORGET} | relearned):
        pass


def trained(folder, dataset, rmisu=None):
    args = TrainingArguments(folder, report_to=[], use_cpu=True, per_device_train_batch_size=1)
    one = {"data_collator": lambda examples: examples[0], "train_dataset": dataset}
    RMisUTrainer(MODEL, args, path=PATH, rmisu=rmisu, **one).train()


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def asked(task="generation", modality="text", **more):
    return Record("1", "g", modality, task, **{"question": "q", "answer": "a"} | more)


def judged(*records, **more):
    evaluate_records(MODEL, ENCODER, records, **more)


def chosen(**more):
    NeuronPath.select(LOCATED, **more)


BATCH = r"expected what model\(\*\*batch\) takes, tensors by name, with labels"
THEIR_OWN = "make all three with the model's own processor"
POSITIONS = "expected last_prompt, answer, first, prompt, all, subject, or indices"

KINDS = {  # name: (what is done, what the message says was found, what it says to do)
    # batches
    "an empty forget set": (lambda: unlearned(forget=[]), "0 forget and 2 retain batches", "at least one each"),
    "an empty retain set": (lambda: unlearned(retain=[]), "2 forget and 0 retain batches", "at least one each"),
    "one batch for a list": (lambda: unlearned(forget=FIRST), "forget is a dict, as one batch is", BATCH),
    "a file's name for a list": (lambda: misdirected(retain="retain.jsonl"), "retain is a str", BATCH),
    "texts for batches": (lambda: unlearned(forget=["Who is she ?"]), "forget batch 0: found a str", BATCH),
    "tensors for batches": (lambda: unlearned(retain=[FIRST["input_ids"]]), "retain batch 0: found a Tensor", BATCH),
    "one batch to judge": (lambda: evaluate(MODEL, FIRST), "found a str in the place of a batch", BATCH),
    "a number to locate on": (lambda: locate(MODEL, 3), "found a int in the place of a batch", BATCH),
    "retain without labels": (
        lambda: unlearned(retain=[RETAIN[0], without_labels(RETAIN[1])]),
        r"retain batch 1: the batch has no labels \(it has input_ids, attention_mask",
        r"expected labels \[n,S\] with -100 on unscored",
    ),
    "labels that are lists": (lambda: unlearned(forget=[FIRST | {"labels": [[1]]}]), "labels are a list", BATCH),
    "labels of another length": (
        lambda: misdirected(forget=[FIRST | {"labels": FIRST["labels"][:, 1:]}]),
        r"labels have shape \(2, 8\) beside input_ids \(2, 9\)",
        r"expected \[n,S\], as many as tokens",
    ),
    "nothing labelled": (
        lambda: compared(forget=[FIRST | {"labels": torch.full_like(FIRST["labels"], -100)}]),
        r"labels of samples \[0, 1\] are all -100",
        "label the answer tokens",
    ),
    "another model's tokens": (
        lambda: hidden_states(MODEL, FIRST | {"input_ids": FIRST["input_ids"] + 61}, 1),
        r"input_ids hold token \d+; the model has the tokens 0..60",
        "the model's own tokenizer",
    ),
    "another model's labels": (
        lambda: compared(forget=[FIRST | {"labels": FIRST["labels"].where(FIRST["labels"] < 0, 99)}]),
        "labels hold token 99; the model has the tokens 0..60",
        "the model's own tokenizer",
    ),
    **{
        f"pictures without their placeholders, {door}": (call, "found 28 rows of pixel_values and 8", THEIR_OWN)
        for door, call in {
            "unlearn": lambda: unlearned([PICTURES], [SHORT], SEEING),
            "misdirect": lambda: misdirect(SEEING, path_of(SEEING), [SHORT], [PICTURES]),
            "baselines": lambda: compared(forget=[SHORT], model=SEEING),
            "evaluate": lambda: evaluate(SEEING, [SHORT]),
        }.items()
    },
    "pictures for a text model": (
        lambda: locate(MODEL, PICTURES, modality="vision"),
        "the model has only the text stack",
        "expected a vision tower, or modality='text'",
    ),
    # settings
    "a dict for unlearn's config": (
        lambda: unlearned(config={"fraction": 0.1}),
        "the config is a dict",
        r"expected a MIPConfig\(text, vision, fraction",
    ),
    "another stage's config": (lambda: unlearned(config=RMisUConfig()), "is a RMisUConfig", "expected a MIPConfig"),
    "a dict inside the config": (
        lambda: unlearned(config=MIPConfig(rmisu={"lr": 1})),
        "rmisu={'lr': 1}",
        r"expected a RMisUConfig\(layer",
    ),
    "a dict for misdirect": (lambda: misdirected(config={"lr": 1}), "is a dict", r"expected a RMisUConfig\(layer"),
    "a dict for a baseline": (
        lambda: compared(config={"lr": 1}),
        "the config is a dict",
        r"expected a BaselineConfig\(steps, epochs, lr",
    ),
    "an unknown key": (
        lambda: locate(MODEL, FIRST, stepz=3),
        "unexpected keyword argument 'stepz'",
        "LocateConfig has modality, score",
    ),
    "an unknown key of misdirect": (
        lambda: misdirect(MODEL, PATH, FORGET, RETAIN, rate=1e-3),
        "unexpected keyword argument 'rate'",
        "RMisUConfig has layer, steering_coeff",
    ),
    "an unknown key of unlearn": (
        lambda: unlearn(MODEL, FORGET, RETAIN, share=0.1),
        "unexpected keyword argument 'share'",
        "MIPConfig has text, vision, fraction",
    ),
    "a negative learning rate": (lambda: unlearned(lr=-1.0), "lr=-1.0", "expected a positive number"),
    "a learning rate as text": (lambda: misdirected(lr="1e-3"), "lr='1e-3'", "expected a number"),
    "no steps": (lambda: misdirected(steps=0), "steps=0, epochs=1", "expected integers of at least 1"),
    "half a step": (
        lambda: compared(config=baselines.BaselineConfig(steps=2.5)),
        "steps=2.5, epochs=1",
        "expected integers of at least 1",
    ),
    "a layer beyond the depth": (lambda: unlearned(layer=9), "layer=9", r"the text stack has layers 0\.\.3"),
    "alpha 2": (lambda: unlearned(alpha=2), "alpha=2", r"expected 0\.\.1"),
    "a fraction of 0": (
        lambda: unlearned(config=MIPConfig(fraction=0)),
        "fraction=0",
        r"expected a share of the neurons in \(0, 1\]",
    ),
    "an unknown aggregate": (
        lambda: unlearned(config=MIPConfig(aggregate="best")),
        "aggregate='best'",
        "expected mean, union, contrast or snr",
    ),
    "an unknown direction": (
        lambda: unlearned(direction="north"),
        "direction='north'",
        "expected gaussian, uniform or learned",
    ),
    "an unknown trainable": (lambda: misdirected(trainable="some"), "trainable='some'", "expected path, down, lora or"),
    "unlearn without a path": (lambda: unlearned(trainable="all"), "trainable='all'", "call misdirect"),
    "unknown positions of a loss": (lambda: misdirected(positions="end"), "positions='end'", POSITIONS),
    "unknown positions of a score": (lambda: locate(MODEL, FIRST, positions="end"), "positions='end'", POSITIONS),
    "unknown positions of a state": (lambda: hidden_states(MODEL, FIRST, 1, "end"), "positions='end'", POSITIONS),
    "an unknown baseline": (lambda: compared("sgd"), "method='sgd'", "expected ga, graddiff, kl, npo"),
    "a baseline's class": (lambda: compared(baselines.NPO), "method=<class", "or an instance of mipfast.baselines'"),
    "a baseline's unknown unit": (
        lambda: compared(baselines.RMU(unit="miles")),
        "unit='miles'",
        "expected retain, forget or none",
    ),
    "beta 0": (lambda: compared(baselines.NPO(beta=0.0)), "beta=0.0", "expected a positive number"),
    # models and paths
    "no model": (lambda: unlearned(model="Qwen/Qwen2.5"), "str has no get_decoder", "expected a transformers causal"),
    "weights that are nan, judged": (
        lambda: evaluate(nan(), FORGET),
        "logits are nan or infinite",
        "its weights are, or its dtype is too narrow",
    ),
    "NaN weights, unlearn": (
        lambda: unlearned(model=nan()),
        r"layer 0 are not finite in samples \[0, 1\]",
        "check the model's weights and dtype",
    ),
    "NaN weights, a loss": (
        lambda: compared(model=nan()),
        "the loss of step 0 of GA is nan",
        "check the model's weights and dtype",
    ),
    "NaN weights, a choice": (
        lambda: compared("manu", model=nan()),
        "activations are not finite",
        "check the model's weights and dtype",
    ),
    "another model's path": (
        lambda: misdirected(path_of(SEEING)),
        "made for another model: it names stacks",
        "locate on this model again",
    ),
    "another model's indices": (
        lambda: prune(MODEL, {("model.layers", 0): torch.tensor([48])}),
        "names neurons of model.layers layer 0 that do not exist",
        "locate on this model again",
    ),
    "indices that are lists": (
        lambda: prune(MODEL, {("model.layers", 0): [1, 2]}),
        r"the path has \('model.layers', 0\): a list",
        r"expected \(stack, layer\): a tensor of indices",
    ),
    "a path without layers": (
        lambda: prune(MODEL, {"model.layers": torch.arange(2)}),
        "the path has 'model.layers': a Tensor",
        r"expected \(stack, layer\)",
    ),
    "arguments in another order": (
        lambda: misdirect(MODEL, FORGET, RETAIN, PATH),
        "the path is a list",
        r"expected a NeuronPath \(model, path, forget, retain\)",
    ),
    # a direction
    "no batches to learn from": (lambda: learned(batches=[]), "0 batches", "at least one"),
    "a generator of none": (lambda: learned(batches=iter([])), "0 batches", "at least one"),
    "one batch to learn from": (lambda: learned(FIRST), "batches is a dict, as one batch is", BATCH),
    **{
        f"a direction at layer {layer}": (
            lambda layer=layer: learned(layer=layer),
            f"layer={layer}",
            r"the text stack has layers 0\.\.3",
        )
        for layer in (-1, 4, None)
    },
    **{
        f"a target of length {length}": (
            lambda length=length: learned(length=length),
            f"length={length}",
            r"expected a positive number, as steering_target\(...\)\.norm",
        )
        for length in (0, -1.0, float("nan"), float("inf"))
    },
    "a direction without steps": (lambda: learned(steps=0), "steps=0", "expected an integer of at least 1"),
    "a direction nowhere": (lambda: learned(positions="end"), "positions='end'", POSITIONS),
    # attacks
    "relearning without labels": (
        lambda: attacked(batches=[without_labels(FIRST)]),
        "the batch has no labels",
        r"expected labels \[n,S\]",
    ),
    "one batch to relearn": (lambda: attacked(batches=FIRST), "batches is a dict, as one batch is", BATCH),
    "a negative rate of relearning": (lambda: attacked(lr=-1), "lr=-1", "expected a positive number"),
    "a rate of relearning that is nan": (lambda: attacked(lr=float("nan")), "lr=nan", "expected a positive number"),
    "one batch of strangers": (
        lambda: attacks.membership(MODEL, FORGET, FIRST),
        "strangers is a dict, as one batch is",
        f"{BATCH}.*a list of such",
    ),
    "a share that is text": (lambda: attacks.membership(MODEL, FORGET, RETAIN, k="a"), "k='a'", "expected a share"),
    "a hint in words": (lambda: attacks.prefixed(FIRST, "Paris"), "tokens are 'Paris'", r"integers of shape \[P\] or"),
    "a hint of floats": (
        lambda: attacks.prefixed(FIRST, torch.ones(3)),
        r"tokens are a torch\.float32 tensor \[3\]",
        r"integers of shape \[P\] or \[1,P\]",
    ),
    "a hint at a word": (lambda: attacks.prefixed(FIRST, [7], at="1"), "at='1' is not", r"expected an integer 0\.\."),
    # records and their inputs
    "no records": (lambda: judged(), "there are no records", "expected at least one"),
    "batches of no record": (lambda: judged(asked(), batch_size=0), "batch_size=0", "expected at least 1"),
    "answers without a token": (lambda: judged(asked(), max_new_tokens=0), "max_new_tokens=0", "expected at least 1"),
    "one id twice": (lambda: judged(asked(), asked()), "two records of g have the id 1", "expected one"),
    "a blank answer": (lambda: judged(asked(answer=" ")), "record 1 of g: its question, its answer", "expected texts"),
    "a choice without its answer": (
        lambda: judged(asked(task="choice", options=("x", "y"), letter="A")),
        "its answer 'a' is not the option it should be",
        r"the options are \['x', 'y'\]",
    ),
    "a picture that is not there": (
        lambda: judged(asked(modality="image")),
        "its modality is image and its image None",
        "expected an image with image alone",
    ),
    "a model that cannot write": (
        lambda: evaluate_records(torch.nn.Linear(2, 2), ENCODER, [asked()]),
        "Linear has no generate",
        "expected a transformers model that writes",
    ),
    "a blank question": (lambda: ENCODER.encode(asked(question=" ")), "the prompt gives no token", "at least one"),
    "an empty answer": (lambda: ENCODER.encode(asked(answer="")), "the answer gives no token", "at least one"),
    "a question that is too long": (
        lambda: ENCODER.encode(asked(question="who " * 600)),
        "601 tokens; the model takes 128",
        "shorten the sample",
    ),
    "half a surrogate pair": (
        lambda: ENCODER.batch([asked(question="\ud83d")]),
        "record 1 of g: the text is no Unicode",
        "mend its",
    ),
    "no folder for an encoder": (
        lambda: Encoder.from_pretrained("/none"),
        "there is no folder /none",
        "expected a transformers folder or Hub id",
    ),
    "no such device": (lambda: load_model(DEMO, "zzz"), "device='zzz' is not to be had here", "expected cpu"),
    "no such dtype": (
        lambda: load_model(DEMO, dtype="float99"),
        "gives no AutoModelForImageTextToText .*float99",
        "expected a transformers folder",
    ),
    "no folder of tables": (lambda: data.load_groups("/none", ["a"]), "there is no folder /none", "hf download"),
    "no such table": (lambda: data.load_groups(DEMO, ["a"]), "has no table 'a'", "Name one of them"),
    "no records of a table": (lambda: data.load_groups(DEMO, ["a"], limit=0), "limit=0", "expected at least 1"),
    "a data file that is not there": (
        lambda: next(data.read_lines("/none")),
        "cannot read /none .No such file",
        "expected a JSONL file",
    ),
    "no folder of scores": (
        lambda: locate_file.read("/none"),
        "/none/run.json is missing",
        "written by mipfast locate",
    ),
    "nothing to compare": (lambda: compare([]), "there is nothing to compare", "give the folders"),
    # choices
    "nothing to choose from": (lambda: NeuronPath.select([]), "no attributions to select from", "was empty"),
    "more than all neurons": (lambda: chosen(fraction=2.0), "fraction=2.0", "expected a share of the neurons"),
    "a share of no neuron": (lambda: chosen(fraction=1e-9), "a budget of 0 neurons per layer", "expected 1 to 48"),
    "a share of no neuron of the stack": (
        lambda: chosen(fraction=1e-9, scope="stack"),
        "fraction=1e-09 of the stack's 192 neurons is none",
        "expected at least one neuron's share, 0.0052",
    ),
    "more neurons than a layer's": (lambda: chosen(per_layer=99), "a budget of 99 neurons", "expected 1 to 48"),
    "an unknown way to choose": (lambda: chosen(aggregate="best"), "aggregate='best'", "expected mean, union"),
    "an unknown scope": (lambda: chosen(scope="all"), "scope='all'", "expected layer or stack"),
    "snr without retain": (lambda: chosen(aggregate="snr"), "aggregate='snr' needs retain", "found none"),
    "an unknown mode of pruning": (lambda: prune(MODEL, PATH, mode="x"), "mode='x'", "expected weights or activations"),
    "a stack of another model": (
        lambda: prune(MODEL, {("vision", 0): torch.arange(2)}),
        "no stack 'vision' in this model",
        "it has model.layers",
    ),
    "a prune of no neurons": (lambda: prune(MODEL, {}), "the path names no neuron", "expected at least one"),
    "a number for a path": (lambda: prune(MODEL, 3), "the path is a int", "expected a NeuronPath"),
    "no batch to score": (lambda: locate(MODEL, []), "no batch to locate on", "was empty"),
    "a path of no neurons": (lambda: locate(MODEL, FIRST, top_k=0), "top_k=0", "expected at least 1"),
    "a path of too many": (lambda: locate(MODEL, FIRST, top_k=99), "top_k=99 of 48 neurons", "lower top_k"),
    "no nodes": (lambda: locate(MODEL, FIRST, n_steps=0), "n_steps must be at least 1", "found 0"),
    "an unknown modality": (lambda: locate(MODEL, FIRST, modality="x"), "modality='x'", "expected text or vision"),
    "an unknown stack": (lambda: locate(MODEL, FIRST, stack="x"), "no stack 'x' in this model", "it has model.layers"),
    "no model to score": (lambda: locate(None, FIRST), "NoneType has no get_decoder", "expected a transformers causal"),
    # the demo
    "a ratio that is not offered": (
        lambda: app(["demo", "--forget", "0.5"]),
        "0.5",
        "expected 0.05, 0.10 or 0.15",
    ),
}


OTHERS = {  # what is no InputError
    ModelError: """no model|a model that cannot write|no folder for an encoder|no such dtype|a stack of another model|
        an unknown stack|no model to score""",
    ArtefactError: "another model's path|another model's indices|no folder of scores",
    DivergedError: "weights that are nan, judged|NaN weights, unlearn|NaN weights, a loss|NaN weights, a choice",
}
CLASSES = {name.strip(): error for error, names in OTHERS.items() for name in names.split("|")}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_broken_is_named_with_what_to_do(kind):
    broken, found, expected = KINDS[kind]
    before = {name: p.detach().clone() for name, p in MODEL.named_parameters()}
    with pytest.raises(MipfastError, match=found) as raised:
        broken()
    raised.match(expected)
    assert raised.type is CLASSES.get(kind, InputError)
    assert all(torch.equal(p, before[name]) for name, p in MODEL.named_parameters())


FILES = {  # name: (what is written, what reads it, found, expected)
    "a YAML's unknown key": (
        lambda file: file.write_text(yaml.safe_dump({"model": "m", "unlearn": {"rmisu": {"rate": 1}}})),
        pipeline.Experiment.from_yaml,
        "unlearn.rmisu.rate: no such key",
        "expected one of layer, .* lr",
    ),
    "no YAML": (
        lambda file: file.write_text("model: ["),
        pipeline.Experiment.from_yaml,
        "cannot be read as YAML",
        r"expected a file like examples/\*.yaml",
    ),
    "a JSONL's third line": (
        lambda file: file.write_text('{"prompt": "a", "answer": "b"}\n' * 2 + '{"prompt": "a", "answer": \n'),
        lambda file: locate_file.survey(None, file, LocateConfig().resolved(), limit=3),
        "line 3: Expecting value",
        'expected one object a line, {"prompt": text, "answer": text}',
    ),
    "a parquet table": (
        lambda file: (
            twins.write(file, twins.TRAINING, [twins.training_row(0)]),
            next(file.iterdir()).write_bytes(b"PAR1 and then nothing"),
        ),
        lambda file: data.load(file.parent, file.name),
        "cannot be read as parquet",
        "fetch it again",
    ),
    "a saved path": (
        lambda file: (PATH.save_pretrained(file), (file / "path.json").write_text("{")),
        NeuronPath.from_pretrained,
        "holds a truncated or damaged path",
        "write it again",
    ),
    "a folder without a path": (
        lambda file: file.mkdir(),
        NeuronPath.from_pretrained,
        "path.safetensors is missing",
        "expected a folder written by save_pretrained",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_is_named_with_what_to_do(kind, tmp_path):
    write, read, found, expected = FILES[kind]
    write(tmp_path / "broken")
    with pytest.raises(MipfastError, match=f"broken.*{found}") as raised:
        read(tmp_path / "broken")
    raised.match(expected)


ITEMS = "expected (one with )?'forget' and 'retain' in every item, an example of each"


@pytest.mark.parametrize(
    ("dataset", "found", "expected"),
    [
        (None, "there is no train_dataset", ITEMS),
        ([], "train_dataset is empty", ITEMS),
        ({"forget": FORGET, "retain": RETAIN}, "an item of train_dataset is a str", ITEMS),
        ([(FORGET[0], RETAIN[0])], "an item of train_dataset is a tuple", ITEMS),
        ([{"forget": FIRST, "kept": FIRST}], "an item of train_dataset has forget, kept", ITEMS),
        ([{"forget": FIRST, "retain": without_labels(FIRST)}], "the batch has no labels", r"expected labels \[n,S\]"),
    ],
)
def test_a_trainer_s_broken_dataset_is_named(dataset, found, expected, tmp_path):
    with pytest.raises(MipfastError, match=f"{found}.*{expected}"):
        trained(tmp_path, dataset)


def test_a_trainer_s_broken_config_is_named(tmp_path):
    with pytest.raises(MipfastError, match=r"is a dict; expected a RMisUConfig\(layer"):
        trained(tmp_path, [], {"lr": 1})
    with pytest.raises(MipfastError, match="trainable='lora'; RMisUTrainer takes path or down, misdirect the others"):
        trained(tmp_path, [], replace(RMisUConfig(), trainable="lora"))


def test_a_missing_processor_is_told_in_whole_sentences(monkeypatch, caplog):
    import transformers

    from mipfast.data.encoder import Encoder
    from mipfast.demo.run import WEIGHTS

    def missing(*args, **kwargs):
        raise ImportError("\nA needs B but it was not found. Check out the instructions on the\npage.\n")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)
    with caplog.at_level("INFO", logger="mipfast"):
        assert Encoder.from_pretrained(WEIGHTS / "base").processor is None
    assert caplog.messages[-1].endswith("by the image processor: A needs B but it was not found")
