"""The trainer MIPEditor behind open-unlearning's interface, on a stub of it."""

import pytest
import stub_open_unlearning
import torch
import yaml
from tiny import PAD, image_batch, text_batch, tiny_llama, tiny_qwen_vl
from transformers import TrainingArguments

from mipfast import InputError, NeuronPath, find_sites
from mipfast.integrations import open_unlearning


class Tokenizer:
    pad_token_id = PAD

    def save_pretrained(self, folder):
        pass


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """The stub's root, its src on sys.path."""
    root = stub_open_unlearning.write(tmp_path / "open-unlearning")
    stub_open_unlearning.forget_imports()
    monkeypatch.syspath_prepend(str(root / "src"))
    yield root
    stub_open_unlearning.forget_imports()


def text_examples(model, seeds, prompt=8):
    batches = [text_batch(model, [prompt + 1 + i % 3], [1 + i % 3], seed=i) for i in seeds]
    return [{name: batch[name][0] for name in ("input_ids", "labels")} for batch in batches]


def made(theirs, model, forget, retain, out, collator=None, evaluators=None, method_args=None, **arguments):
    """What their train.py makes of the written config and the command line."""
    from data.collators import DataCollatorForSupervisedDataset
    from data.unlearn import ForgetRetainDataset
    from trainer import load_trainer

    open_unlearning.register()
    configs = theirs / "configs" / "trainer"
    base, cfg = (yaml.safe_load((configs / f"{name}.yaml").read_text()) for name in ("finetune", "MIPEditor"))
    assert cfg.pop("defaults") == ["finetune"]
    cfg["method_args"] |= {"samples": 4} | (method_args or {})
    given = base["args"] | cfg["args"] | {"learning_rate": 2e-2, "num_train_epochs": 8, "lr_scheduler_type": "constant"}
    given |= dict(per_device_train_batch_size=2, logging_steps=1, save_strategy="no", remove_unused_columns=False)
    args = TrainingArguments(out, report_to=[], disable_tqdm=True, use_cpu=True, **given | arguments)
    tokenizer = Tokenizer()
    collator = collator or DataCollatorForSupervisedDataset(tokenizer)
    dataset = ForgetRetainDataset(forget, retain)
    return load_trainer(cfg, model, args, dataset, tokenizer, collator, evaluators, template_args={"a": 1})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_only_the_path_changed(model, path, before):
    """Rows of gate and up, columns of down: of the path's neurons, and in every layer of it."""
    neurons = {(name, layer): set(index.tolist()) for (name, layer), index in path.items()}
    moved = set()
    for name, found in weights(model).items():
        changed = (found != before[name]).nonzero()
        place = next((key for key in neurons if name.startswith(f"{key[0]}.{key[1]}.mlp.")), None)
        if len(changed):
            assert place, name
            assert set(changed[:, 1 if "down_proj.weight" in name else 0].tolist()) <= neurons[place], name
            moved.add(place)
    assert moved == set(neurons)


def test_registering_twice_gives_one_trainer_and_one_config(theirs):
    import trainer
    from trainer.unlearn.base import UnlearnTrainer

    editor = open_unlearning.register()
    file = theirs / "configs" / "trainer" / "MIPEditor.yaml"
    written = file.read_text()
    assert trainer.TRAINER_REGISTRY["MIPEditor"] is editor and editor.__name__ == "MIPEditor"
    assert issubclass(editor, UnlearnTrainer)
    config = yaml.safe_load(written)
    assert config["handler"] == "MIPEditor" and config["defaults"] == ["finetune"]
    # what the file says is what no settings at all would be, and every setting is there to be overridden
    assert open_unlearning.EditorConfig.from_yaml(config["method_args"]) == open_unlearning.EditorConfig()

    assert open_unlearning.register(theirs / "configs") is editor and file.read_text() == written
    file.write_text(written.replace("samples: 64", "samples: 8"))
    open_unlearning.register()
    assert "samples: 8" in file.read_text(), "what a user set stays"
    assert sorted(p.name for p in file.parent.iterdir()) == ["MIPEditor.yaml", "finetune.yaml"]


def test_what_is_somebody_else_s_is_not_touched(theirs):
    import trainer

    file = theirs / "configs" / "trainer" / "MIPEditor.yaml"
    for text, why in (("handler: RMU\n", "not a config of the trainer MIPEditor"), ("a: [", "cannot be read")):
        file.write_text(text)
        with pytest.raises(InputError, match=why):
            open_unlearning.register()
        assert file.read_text() == text and "MIPEditor" not in trainer.TRAINER_REGISTRY
    with pytest.raises(InputError, match="has no trainer/finetune.yaml"):
        open_unlearning.register(theirs / "src")
    file.unlink()
    trainer.TRAINER_REGISTRY["MIPEditor"] = dict
    with pytest.raises(InputError, match="has another trainer MIPEditor"):
        open_unlearning.register()


def test_without_open_unlearning_the_error_says_what_to_do(tmp_path, monkeypatch):
    stub_open_unlearning.forget_imports()
    with pytest.raises(InputError, match="src folder on sys.path.*clone locuslab/open-unlearning"):
        open_unlearning.register()
    (tmp_path / "trainer.py").write_text("TRAINER_REGISTRY = {}")  # another package of that name
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="not a package"):
        open_unlearning.register()
    stub_open_unlearning.forget_imports()


def test_a_run_unlearns_with_the_path_s_neurons_alone_and_saves_a_plain_model(theirs, tmp_path):
    model = tiny_llama()
    before, seen, out = weights(model), [], tmp_path / "out"
    forget, retain = text_examples(model, range(6)), text_examples(model, range(10, 17))

    def evaluator(model, tokenizer, template_args):
        seen.append((model, tokenizer.pad_token_id, template_args))
        return {"forget_quality": 0.5}

    trainer = made(theirs, model, forget, retain, out, evaluators={"tofu": evaluator})
    assert trainer.train().training_loss > 0
    trainer.save_state()
    trainer.save_model(str(out))
    assert trainer.evaluate(metric_key_prefix="eval")["forget_quality"] == 0.5
    assert seen == [(model, PAD, {"a": 1})]

    assert len(trainer.located["text"]["num_labels"]) == 4, "method_args.samples"
    losses = [log["forget_loss"] for log in trainer.state.log_history if "forget_loss" in log]
    assert len(losses) == 24 and sum(losses[-3:]) < 0.5 * sum(losses[:3])
    path = NeuronPath.from_pretrained(out)
    assert {layer for _, layer in path} == {0, 1, 2} and all(len(index) == 5 for index in path.values())
    assert_only_the_path_changed(model, path, before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    batch = text_batch(model, [9, 7], [2, 1], seed=30)
    plain = type(model).from_pretrained(out)
    assert torch.equal(plain(**batch).logits, model(**batch).logits)


def test_the_same_model_gets_the_same_bits_twice(theirs, tmp_path):
    found = []
    for name in ("a", "b"):
        model = tiny_llama()
        torch.manual_seed(3)
        examples = text_examples(model, range(6)), text_examples(model, range(10, 17))
        made(theirs, model, *examples, tmp_path / name, max_steps=2).train()
        found.append(weights(model))
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


def test_pictures_reach_the_model_and_feed_the_vision_path(theirs, tmp_path):
    """Text and pictures in one forget set: examples with pixel_values are located apart."""
    model = tiny_qwen_vl()
    before = weights(model)
    pictures = [image_batch(model, 1, seed=i, answer_lengths=[2]) for i in range(3)]
    words = [text_batch(model, [9], [2], seed=i) for i in range(6)]

    def collator(items):  # an example is a batch already
        (item,) = items
        return item

    def compute_loss(model, inputs, *args, **kwargs):
        forward = []
        hook = model.register_forward_pre_hook(lambda *call: forward.append(set(call[2])), with_kwargs=True)
        loss = type(trainer).compute_loss(trainer, model, inputs, *args, **kwargs)
        hook.remove()
        steps.append((set(inputs["forget"]), forward))
        return loss

    options = dict(per_device_train_batch_size=1, num_train_epochs=4, gradient_accumulation_steps=2)
    settings = {"samples": 6, "rmisu": {"layer": 1}}
    forget, retain = pictures + words[:3], words[3:]
    trainer = made(theirs, model, forget, retain, tmp_path / "out", collator, method_args=settings, **options)
    steps, trainer.compute_loss = [], compute_loss
    trainer.train()

    path = NeuronPath.from_pretrained(tmp_path / "out")
    sites = find_sites(model)
    assert {name for name, _ in path} == {sites.text.name, sites.vision[0].name}
    assert sorted(trainer.located) == ["text", "vision"]
    assert_only_the_path_changed(model, path, before)
    assert len(steps) == 24 and sum("pixel_values" in given for given, _ in steps) == 12
    for given, forward in steps:  # the retain batch before training, the forget batch, the retain batch
        assert forward[1] >= given - {"labels"}


def test_a_plain_evaluation_set_is_judged_by_the_language_model_s_loss(theirs, tmp_path):
    model = tiny_llama()
    examples = text_examples(model, [1, 4])
    trainer = made(theirs, model, examples, examples, tmp_path)
    batch = trainer._collate(examples)
    assert trainer.evaluate(examples)["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "method_args, why",
    [
        ({"topk": 5}, "method_args.topk: no such key; expected one of .*fraction.*samples"),
        ({"rmisu": {"depth": 1}}, "method_args.rmisu.depth: no such key"),
        ({"rmisu": {"lr": 1e-3}}, "method_args.rmisu.lr: .*trainer.args.learning_rate"),
        ({"fraction": "many"}, "method_args.fraction='many'; expected a number"),
        ({"fraction": 2.0}, "fraction=2.0"),
        ({"samples": 0}, "method_args.samples=0"),
        ({"rmisu": {"trainable": "lora"}}, "takes path or down"),
        ({"rmisu": {"layer": 9}}, "layer=9"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(method_args, why, theirs, tmp_path):
    model = tiny_llama()
    examples = text_examples(model, [0])
    with pytest.raises(InputError, match=why):
        made(theirs, model, examples, examples, tmp_path, method_args=method_args)


def test_what_cannot_be_unlearned_is_named_and_leaves_the_model_alone(theirs, tmp_path):
    model = tiny_llama()
    before = weights(model)
    forget, retain = text_examples(model, range(3)), text_examples(model, range(10, 13))
    with pytest.raises(InputError, match="has forget; expected forget and retain"):
        made(theirs, model, forget, [], tmp_path).train()
    with pytest.raises(InputError, match="no prompt.*positions"):
        made(theirs, model, text_examples(model, range(3), prompt=0), retain, tmp_path).train()
    with pytest.raises(InputError, match="cannot resume"):
        made(theirs, model, forget, retain, tmp_path).train(resume_from_checkpoint=True)
    sharded = made(theirs, model, forget, retain, tmp_path)
    sharded.is_deepspeed_enabled = True
    with pytest.raises(InputError, match="under DeepSpeed"):
        sharded.train()

    class Broken(Exception):
        pass

    broken = made(theirs, model, forget, retain, tmp_path)

    def log(*args, **kwargs):
        raise Broken

    broken.log = log
    with pytest.raises(Broken):
        broken.train()
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
