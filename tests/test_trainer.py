"""RMisUTrainer does what misdirect does, leaves the rest alone, and goes on where it was stopped."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import marked, text_batch, tiny_llama
from transformers import TrainerCallback, TrainingArguments

from mipfast import (
    ArtefactError,
    DivergedError,
    InputError,
    NeuronPath,
    RMisUConfig,
    RMisUTrainer,
    find_sites,
    misdirect,
    prune,
)
from mipfast.edit.train import order

LR = 1e-2


def case(dtype=torch.float64, sides=3):
    model = tiny_llama(torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)
    forget = [text_batch(model, [9, 7], [2, 1], seed=i) for i in range(sides)]
    retain = [text_batch(model, [8, 10], [1, 1], seed=10 + i) for i in range(sides)]
    sites = find_sites(model)
    path = NeuronPath({(sites.text.name, layer): torch.tensor([7, 2, 30]) for layer in (0, 1, 3)}, sites.fingerprint())
    return model, path, forget, retain


class InOrder(RMisUTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model, path, pairs, folder, rmisu=None, callbacks=(), collator=lambda examples: examples[0], **arguments):
    given = dict(max_steps=len(pairs), learning_rate=LR, lr_scheduler_type="constant", optim="adamw_torch")
    given |= dict(per_device_train_batch_size=1, max_grad_norm=0.0, save_strategy="no", logging_steps=1)
    args = TrainingArguments(folder, report_to=[], disable_tqdm=True, use_cpu=True, seed=0, **given | arguments)
    dataset = [{"forget": f, "retain": r} for f, r in pairs]
    config = rmisu or RMisUConfig(layer=2)
    return InOrder(
        model,
        args,
        path=path,
        rmisu=config,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=list(callbacks),
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_subject_passes_through_transformers_collator(tmp_path):
    after = []
    for positions in ("subject", [2, 3]):
        model, path, *sides = case()
        examples = [[marked(batch, (2, 4), (2, 4)) for batch in side] for side in sides]
        pairs = [
            [{name: value[0] for name, value in one.items()} for one in pair] for pair in zip(*examples, strict=True)
        ]
        done = trainer(model, path, pairs, tmp_path, RMisUConfig(layer=2, positions=positions), collator=None)
        done.train()
        after.append(weights(model))
    assert all(torch.equal(p, after[1][name]) for name, p in after[0].items())


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("trainable", ["path", "down"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_trainer_equals_misdirect_step_for_step(dtype, trainable, pruned, tmp_path):
    config = RMisUConfig(layer=2, steps=6, lr=LR, trainable=trainable, seed=3)
    model, path, forget, retain = case(dtype)
    before = weights(model)
    if pruned:
        prune(model, path)
    report = misdirect(model, path, forget, retain, config)
    pairs = [(forget[f], retain[r]) for f, r in zip(*order(3, (3, 3), 6), strict=True)]
    mine, path, _, _ = case(dtype)
    if pruned:
        prune(mine, path)
    done = trainer(mine, path, pairs, tmp_path, config)
    done.train()
    logs = [log for log in done.state.log_history if "forget_loss" in log]
    limit = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    assert [log["forget_loss"] for log in logs] == pytest.approx(report["forget_loss"], rel=limit)
    assert [log["retain_loss"] for log in logs] == pytest.approx(report["retain_loss"], rel=limit, abs=1e-9)
    assert all(log["grad_norm"] > 0 for log in logs)
    wanted, moved = weights(model), set()
    for name, found in weights(mine).items():
        torch.testing.assert_close(found, wanted[name], rtol=10 * limit, atol=10 * limit, msg=name)
        changed = (found != before[name]).nonzero()
        if len(changed):
            moved.add(name)
            dim = 1 if "down_proj" in name else 0
            assert set(changed[:, dim].tolist()) <= {2, 7, 30}
    kinds = ("down",) if trainable == "down" else ("gate", "up", "down")
    trained = {f"model.layers.{i}.mlp.{kind}_proj.weight" for i in (0, 1) for kind in kinds}
    assert moved - {"model.layers.3.mlp.down_proj.weight"} == trained  # above the layer: pruned, not trained
    assert all(p.requires_grad for p in mine.parameters()) and not any(m._forward_hooks for m in mine.modules())


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stopped_run_resumes_to_the_same_weights(dtype, tmp_path):
    found = []
    for stopped in (False, True):
        folder = tmp_path / str(stopped)
        model, path, forget, retain = case(dtype)
        pairs, options = list(zip(forget, retain, strict=True)) * 2, dict(save_strategy="steps", save_steps=3)
        prune(model, path)
        options["lr_scheduler_type"] = "linear"
        trainer(model, path, pairs, folder, callbacks=[Stop(3)] if stopped else [], **options).train()
        if stopped:
            model, path, _, _ = case(dtype)
            prune(model, path)
            trainer(model, path, pairs, folder, **options).train(resume_from_checkpoint=True)
        found.append(weights(model))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    trainer(model, path, pairs, folder, **options).train(resume_from_checkpoint=True)  # nothing is left to do

    other, path, _, _ = case(dtype)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    with pytest.raises(InputError, match="another path, base model"):
        trainer(other, path, pairs, folder, **options).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    (folder / "checkpoint-3" / "slices.safetensors").unlink()
    with pytest.raises(ArtefactError, match="slices.safetensors is missing"):
        trainer(case(dtype)[0], path, pairs, folder, **options).train(
            resume_from_checkpoint=str(folder / "checkpoint-3")
        )


def test_accumulated_steps_average_and_gradients_are_clipped(tmp_path):
    """Two equal micro-batches are one step; clipping leaves Adam's first step alone and Sgd's not."""
    found = []
    for accumulate in (1, 2):
        model, path, forget, retain = case()
        pairs = [(forget[0], retain[0])] * 3 * accumulate
        options = dict(gradient_accumulation_steps=accumulate, max_steps=3)
        trainer(model, path, pairs, tmp_path / str(accumulate), **options).train()
        found.append(weights(model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-9, atol=1e-12)

    moves = []
    for limit in (0.0, 1e-3):
        model, path, forget, retain = case()
        before = weights(model)
        trainer(
            model,
            path,
            [(forget[0], retain[0])],
            tmp_path / str(limit),
            optim="sgd",
            max_grad_norm=limit,
            learning_rate=1.0,
        ).train()
        moves.append(sum((p - before[name]).square().sum() for name, p in weights(model).items()).sqrt().item())
    assert moves[1] == pytest.approx(1e-3, rel=1e-3) and moves[0] > 1e-2


def test_bf16_autocast_trains_float32_weights(tmp_path):
    model, path, forget, retain = case(torch.float32)
    done = trainer(model, path, list(zip(forget, retain, strict=True)) * 5, tmp_path, bf16=True)
    done.train()
    losses = [log["forget_loss"] for log in done.state.log_history if "forget_loss" in log]
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("unit", ["retain", "forget", "none"])
def test_the_target_is_measured_on_the_data_in_its_order(unit, tmp_path):
    model, path, forget, retain = case()
    config = RMisUConfig(layer=2, steps=3, unit=unit)
    # misdirect's first forget batch is the dataset's first
    first = order(0, (3, 3), 3)[0][0]
    forget = forget[first:] + forget[:first]
    done = trainer(model, path, list(zip(forget, retain, strict=True)), tmp_path, config)
    done.train()
    again, path, unrolled, retain = case()
    assert done._target.norm().item() == pytest.approx(misdirect(again, path, unrolled, retain, config)["target_norm"])


def test_examples_are_collated_by_side_and_torch_datasets_keep_their_columns(tmp_path):
    import datasets

    model, path, _, _ = case()
    words = [{name: value[0].tolist() for name, value in text_batch(model, [8], [2], seed=i).items()} for i in range(4)]
    dataset = datasets.Dataset.from_list([{"forget": a, "retain": b} for a, b in zip(words, words[::-1], strict=True)])
    args = TrainingArguments(tmp_path, per_device_train_batch_size=2, max_steps=3, report_to=[], use_cpu=True)
    args = args.set_save("no")
    done = RMisUTrainer(model, args, path=path, rmisu=RMisUConfig(layer=2), train_dataset=dataset)
    before = weights(model)
    done.train()
    assert any(not torch.equal(p, before[name]) for name, p in weights(model).items())


def test_what_cannot_be_trained_is_named(tmp_path):
    model, path, forget, retain = case()
    pairs = list(zip(forget, retain, strict=True))
    for trainable in ("lora", "all"):
        with pytest.raises(InputError, match="path or down"):
            trainer(model, path, pairs, tmp_path, RMisUConfig(layer=2, trainable=trainable))
    with pytest.raises(InputError, match="no gradient passes that hook"), prune(model, path, "activations"):
        trainer(model, path, pairs, tmp_path).train()
    with pytest.raises(InputError, match="expected 'forget' and 'retain'"):
        done = trainer(model, path, pairs, tmp_path)
        done.train_dataset = [{"forget": forget[0]}]
        done.train()
    blind = NeuronPath({(find_sites(model).text.name, 1): torch.arange(3)})
    with pytest.raises(InputError, match="no gradient reached model.layers/1"), torch.no_grad():
        find_sites(model).text.outputs[1].weight.zero_()
        find_sites(model).text.inputs[1][0].weight.zero_()
        with torch.enable_grad():
            trainer(model, blind, pairs, tmp_path).train()
    with pytest.raises(InputError, match="empty"):
        done = trainer(model, path, pairs, tmp_path)
        done.train_dataset = []
        done.train()
    with pytest.raises(DivergedError, match="step 0"):
        trainer(model, path, pairs, tmp_path, RMisUConfig(layer=2, steering_coeff=float("inf"))).train()
    with pytest.raises(InputError, match="args.optim"):
        RMisUTrainer(model, path=path, optimizers=(torch.optim.SGD(model.parameters()), None))
    assert not any(m._forward_hooks for m in model.modules())


TWO = """
import sys
sys.path.insert(0, {here!r})
import torch
from test_trainer import case, trainer, weights
torch.set_num_threads(1)
model, path, forget, retain = case()
pairs = list(zip(forget, retain)) + list(zip(retain, forget))
trainer(model, path, pairs, {folder!r}, max_steps=3, ddp_backend="gloo").train()
if torch.distributed.get_rank() == 0:
    torch.save(weights(model), {folder!r} + "/weights.pt")
"""


def test_two_processes_average_their_gradients(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(here=str(Path(__file__).parent), folder=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    subprocess.run(launch, check=True, capture_output=True, timeout=120)
    model, path, forget, retain = case()
    pairs = list(zip(forget, retain, strict=True)) + list(zip(retain, forget, strict=True))
    trainer(model, path, pairs, tmp_path, max_steps=3, gradient_accumulation_steps=2).train()
    for name, tensor in torch.load(tmp_path / "weights.pt").items():
        torch.testing.assert_close(tensor, dict(model.named_parameters())[name].detach(), rtol=1e-9, atol=1e-12)
