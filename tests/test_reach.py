"""An edit reaches the weights that the model computes with, or is refused before any work; whole, or not at all."""

from dataclasses import replace

import accelerate
import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from test_pruning import bits, logits, same
from test_trainer import trainer
from tiny import text_batch, tiny_llama
from torch import nn
from torch.nn.utils import prune as torch_prune

from mipfast import (
    DivergedError,
    InputError,
    LocateConfig,
    MIPConfig,
    MipfastError,
    ModelError,
    NeuronPath,
    RMisUConfig,
    evaluate,
    find_sites,
    fit_path,
    hidden_states,
    learned_direction,
    locate,
    misdirect,
    prune,
    unlearn,
)
from mipfast.edit import baselines, lora
from mipfast.edit.baselines import BaselineConfig
from mipfast.edit.prune import Slice, active_prunes
from mipfast.judge import attacks

FORGET, RETAIN = ([text_batch(tiny_llama(), [9, 7], [2, 1], seed=seed)] for seed in (0, 1))
BATCH, LOCATED = FORGET[0], locate(tiny_llama(), FORGET, n_steps=1)
NEURONS = {("model.layers", 0): torch.tensor([3, 7]), ("model.layers", 1): torch.tensor([5, 2, 9])}
SHORT = RMisUConfig(layer=2, steps=6, lr=1e-2)


def entered(context):
    with context:
        pass


EDITS = {
    "prune": lambda model, _: prune(model, NEURONS),
    "fit_path": lambda model, _: fit_path(model, FORGET, RETAIN, LOCATED, [], aggregate="mean"),
    "misdirect": lambda model, _: misdirect(model, NEURONS, FORGET, RETAIN, SHORT),
    "unlearn": lambda model, _: unlearn(model, FORGET, RETAIN, vision=None, rmisu=SHORT),
    "manu": lambda model, _: baselines.run(model, "manu", FORGET, RETAIN),
    "quantised": lambda model, _: entered(attacks.quantised(model)),
    "trainer": lambda model, folder: trainer(model, NEURONS, [(BATCH, RETAIN[0])], folder).train(),
    "npo": lambda model, _: baselines.run(model, "npo", FORGET, RETAIN, BaselineConfig(steps=2, lr=1e-2)),
    "rmu": lambda model, _: baselines.run(model, "rmu", FORGET, RETAIN, BaselineConfig(steps=2)),
    "relearned": lambda model, _: entered(attacks.relearned(model, FORGET)),
}


def down(model):
    return model.model.layers[1].mlp.down_proj


def offloaded(model, folder):
    where = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    where |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
    return accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=folder, force_hooks=True)


def sharded(model, folder):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    whole = down(model).weight
    down(model).weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(whole.detach(), mesh))
    return model


def integers(model, folder):
    down(model).weight = nn.Parameter(torch.ones(32, 48, dtype=torch.int8), requires_grad=False)
    return model


def in_inference_mode(model, folder):
    with torch.inference_mode():
        return tiny_llama()


def changed(change):
    def make(model, folder):
        change(down(model))
        return model

    return make


UNREACHABLE = {
    "offloaded": (offloaded, "is offloaded"),
    "sharded": (sharded, "is a DTensor"),
    "integers": (integers, "is torch.int8"),
    "inference mode": (in_inference_mode, "inference_mode"),
    "parametrized": (changed(nn.utils.parametrizations.weight_norm), "is made from other parameters"),
    "weight_norm": (changed(nn.utils.weight_norm), "is made from other parameters"),
    "torch's prune": (
        changed(lambda m: torch_prune.l1_unstructured(m, "weight", 0.2)),
        "is made from other parameters",
    ),
}


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", UNREACHABLE)
def test_weights_that_an_edit_would_not_reach_are_refused_before_any_work(kind, tmp_path, one_process):
    make, says = UNREACHABLE[kind]
    model = make(tiny_llama(), tmp_path)
    calls, before = [], {name: t if t.is_meta else t.clone() for name, t in model.state_dict().items()}
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: calls.append(1))
    # training reaches what a weight is made from, and takes only what requires a gradient
    fine = {"is made from other parameters": ("npo", "rmu", "relearned"), "is torch.int8": ("npo", "rmu")}.get(says, ())
    for name, edit in EDITS.items():
        if name in fine:
            continue
        with pytest.raises(ModelError, match=says) as error:
            edit(model, tmp_path)
        assert "layers.1.mlp.down_proj" in str(error.value) or kind in ("offloaded", "inference mode"), error.value
        assert not calls and not active_prunes(model), name
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(t.is_meta or torch.equal(after[name], t) for name, t in before.items())
    assert not any(m._forward_hooks for m in model.modules())


def test_training_reaches_what_a_weight_is_made_from():
    model = tiny_llama()
    nn.utils.parametrizations.weight_norm(down(model))
    before, used = bits(model), down(model).weight.detach().clone()
    with attacks.relearned(model, FORGET):
        assert not torch.equal(down(model).weight, used)
    assert same(bits(model), before) and torch.equal(down(model).weight, used)


def test_the_weight_that_a_forward_pass_uses_is_looked_at_after_every_prune():
    class Normalised(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True))

    model = tiny_llama()
    down(model).__class__ = Normalised
    before = bits(model)
    with pytest.raises(ModelError, match="layer 1: with its neurons' columns zeroed the Normalised does not"):
        prune(model, NEURONS)
    assert same(bits(model), before) and not active_prunes(model)


ADAPTERS = {
    "lora": peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["gate_proj", "down_proj"], init_lora_weights=False),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=["down_proj"], init_lora_weights=False),
    "loha": peft.LoHaConfig(r=2, target_modules=["down_proj"], init_weights=False),
    "ia3": peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_of_an_adapted_model_both_modes_make_the_same_or_weights_are_refused(kind, merged):
    model = peft.get_peft_model(tiny_llama(torch.float64), ADAPTERS[kind]).double().train()
    if merged:
        model.merge_adapter()
    before, clean = bits(model), logits(model.eval(), BATCH)
    with prune(model, NEURONS, "activations"):
        wanted = logits(model, BATCH)
    assert (wanted - clean).abs().max() > 1e-2
    if kind == "dora" or (kind, merged) == ("loha", False):
        with pytest.raises(ModelError, match="DoRA" if kind == "dora" else "does not compute what it did"):
            prune(model, NEURONS)
    else:
        with prune(model.train(), NEURONS):
            torch.testing.assert_close(logits(model.eval(), BATCH), wanted, rtol=0, atol=1e-12)
    assert same(bits(model), before) and not active_prunes(model)


@pytest.mark.parametrize("change", ["merge_adapter", "merge_and_unload"])
def test_a_prune_is_not_undone_on_weights_that_became_others(change):
    model = peft.get_peft_model(tiny_llama(), ADAPTERS["lora"]).eval()
    before, clean = bits(model), logits(model, BATCH)
    handle = prune(model, NEURONS)
    pruned = logits(model, BATCH)
    getattr(model, change)()
    torch.testing.assert_close(logits(model, BATCH), pruned)
    with pytest.raises(InputError, match="merged or unmerged since this prune"):
        handle.undo()
    if change == "merge_and_unload":
        return handle.commit()
    model.unmerge_adapter()
    handle.undo()
    torch.testing.assert_close(logits(model, BATCH), clean)
    assert not active_prunes(model) and bits(model).keys() == before.keys()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("mode", ["weights", "activations"])
def test_indices_are_integers_of_any_width(mode, dtype):
    model = tiny_llama()
    with prune(model, NEURONS, mode):
        wanted = logits(model, BATCH)
    narrow = {key: indices.to(dtype) for key, indices in NEURONS.items()}
    with prune(model, narrow, mode):
        assert torch.equal(logits(model, BATCH), wanted)
    if (mode, dtype) == ("weights", torch.uint8):
        misdirect(model, narrow, FORGET, RETAIN, SHORT, steps=1, trainable="lora", lora_rank=2)


@pytest.mark.parametrize("edit", ["prune", "misdirect", "trainer"])
@pytest.mark.parametrize(
    ("layer", "indices", "says"),
    [
        (1, [2.0], "torch.float32"),
        (1, [], "torch.float32"),
        (1, [True, False], "torch.bool"),
        (1, [[1, 2]], r"int64 \[1, 2\]"),
        (1, 3, r"int64 \[\]"),
        (1, [2, 5, 2], "or twice"),
        (1, [-1], "do not exist"),
        (1, [48], "do not exist"),
        (4, [1], "do not exist"),
        (-1, [1], "do not exist"),
        ("1", [1], "do not exist"),
        (None, [1], "do not exist"),
    ],
)
def test_half_a_path_edits_nothing(edit, layer, indices, says, tmp_path, monkeypatch):
    model = tiny_llama()
    before = bits(model)
    path = {("model.layers", 0): torch.tensor([3, 4]), ("model.layers", layer): torch.tensor(indices)}
    monkeypatch.setitem(globals(), "NEURONS", path)
    with pytest.raises(MipfastError, match=says):
        EDITS[edit](model, tmp_path)
    assert same(bits(model), before) and not active_prunes(model)


@pytest.mark.parametrize("mode", ["weights", "activations"])
def test_an_interrupted_prune_is_none(mode, monkeypatch):
    model = tiny_llama()
    before, real = bits(model), Slice.write
    written = []

    def write(self, values):
        real(self, values)
        written.append(self)
        if len(written) == 2:
            raise KeyboardInterrupt

    def register(hook):
        raise KeyboardInterrupt

    monkeypatch.setattr(Slice, "write", write)
    monkeypatch.setattr(down(model), "register_forward_pre_hook", register)
    with pytest.raises(KeyboardInterrupt):
        prune(model, NEURONS, mode)
    assert same(bits(model), before) and not active_prunes(model) and (mode == "activations" or len(written) > 2)
    assert not any(m._forward_pre_hooks for m in model.modules())


LOOPS = {
    "path": lambda model, **lr: misdirect(model, NEURONS, FORGET, RETAIN, SHORT, **lr),
    "all": lambda model, **lr: misdirect(model, NEURONS, FORGET, RETAIN, SHORT, trainable="all", **lr),
    "lora": lambda model, **lr: misdirect(model, NEURONS, FORGET, RETAIN, SHORT, trainable="lora", lora_rank=2, **lr),
    "unlearn": lambda model, lr=1e-2: edit(model, RMisUConfig(layer=2, steps=6, lr=lr)),
    "unlearn by lora": lambda model, lr=1e-2: edit(model, RMisUConfig(layer=2, steps=6, lr=lr, trainable="lora")),
    "graddiff": lambda model, lr=1e-2: baselines.run(model, "graddiff", FORGET, RETAIN, BaselineConfig(steps=6, lr=lr)),
    "rmu": lambda model, lr=1e-2: baselines.run(model, "rmu", FORGET, RETAIN, BaselineConfig(steps=6, lr=lr)),
    "relearned": lambda model, lr=1e-2: entered(attacks.relearned(model, FORGET * 6, lr)),
}


def edit(model, rmisu):
    from mipfast.edit.unlearn import edit

    return edit(model, NeuronPath(NEURONS), FORGET, RETAIN, MIPConfig(rmisu=rmisu))


def interrupt(monkeypatch, at):
    real, taken = torch.optim.Adam.step, []

    def step(self, *args, **kwargs):
        real(self, *args, **kwargs)
        taken.append(1)
        if len(taken) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return taken


@pytest.mark.parametrize(("how", "dtype"), [("interrupted", torch.bfloat16), ("diverged", torch.float32)])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_that_does_not_end_gives_the_weights_back(loop, how, dtype, monkeypatch):
    model = tiny_llama().to(dtype)
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    if how == "interrupted":
        taken = interrupt(monkeypatch, at=3)
        with pytest.raises(KeyboardInterrupt):
            LOOPS[loop](model)
        assert len(taken) == 3
    else:
        with pytest.raises(DivergedError):
            LOOPS[loop](model, lr=1e30)
    assert same(bits(model), before) and bits(model).keys() == before.keys() and not active_prunes(model)
    assert [p.requires_grad for p in model.parameters()] == flags and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("at", ["add_adapter", "_inject"])
def test_an_interrupted_adapter_is_none(at, monkeypatch):
    model = tiny_llama()
    before, real, calls = bits(model), getattr(lora if at == "_inject" else model, at), []

    def stop(*args, **kwargs):
        real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:  # the second folds the prune in
            raise KeyboardInterrupt

    monkeypatch.setattr(lora if at == "_inject" else model, at, stop)
    with pytest.raises(KeyboardInterrupt):
        LOOPS["unlearn by lora"](model)
    assert same(bits(model), before) and bits(model).keys() == before.keys() and not active_prunes(model)


def test_an_interrupted_trainer_gives_the_weights_back(tmp_path, monkeypatch):
    model = tiny_llama()
    before = bits(model)
    interrupt(monkeypatch, at=3)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, NEURONS, [(BATCH, RETAIN[0])] * 6, tmp_path).train()
    assert same(bits(model), before)


def adapted(model):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"]))


def prepared(model):
    AcceleratorState._reset_state(reset_partial_state=True)
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    AcceleratorState._reset_state(reset_partial_state=True)  # which a Trainer would find
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_block(model):
    model.model.layers[1].compile(backend="eager")
    return model


WRAPPED = {
    "compiled": (compiled, lambda model: model),
    "a compiled block": (compiled_block, lambda model: model),
    "compiled ddp of peft": (lambda model: compiled(nn.parallel.DistributedDataParallel(adapted(model))), adapted),
    "accelerate": (prepared, lambda model: model),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_is_the_model_inside(kind, one_process):
    found = []
    for wrap in WRAPPED[kind]:
        inner = tiny_llama()
        model = wrap(inner)
        located = locate(model, BATCH, n_steps=2, search="pointwise")
        path = NeuronPath.select(located, per_layer=3).up_to("model.layers", 2)
        numbers = [located.scores, hidden_states(model, BATCH, 1)]
        with prune(model, path):
            assert active_prunes(inner) and evaluate(model, FORGET).predicted == evaluate(inner, FORGET).predicted
            numbers.append(hidden_states(model, BATCH, 2))
            report = misdirect(model, path, FORGET, RETAIN, SHORT, steps=2)
        numbers.append(torch.tensor(report["forget_loss"] + list(attacks.membership(model, FORGET, RETAIN).values())))
        with attacks.quantised(model), attacks.relearned(model, FORGET):
            numbers.append(hidden_states(model, BATCH, 2))
        numbers.append(learned_direction(model, FORGET, 1, "last_prompt", length=3.0, steps=2))
        fast = MIPConfig(LocateConfig(n_steps=2), vision=None, aggregate="mean", rmisu=replace(SHORT, steps=1))
        path |= unlearn(model, FORGET, RETAIN, fast)["path"]
        report = baselines.run(model, "rmu", FORGET, RETAIN, BaselineConfig(steps=1))
        found.append((list(path), list(report["trained"]), numbers))
    assert found[0][:2] == found[1][:2] and found[0][0][0] == ("model.layers", 0)
    for a, b in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["graddiff", "all", "path"])
def test_inside_autocast_a_loop_trains_on(name):
    model = tiny_llama()
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model, BATCH)
        losses = LOOPS[name](model)["forget_loss"]
        assert losses[-1] < losses[0] - 0.01 and not torch.equal(logits(model, BATCH), before)


UNDONE = {
    "prune": lambda model: prune(model, NEURONS),
    "quantised": attacks.quantised,
    "relearned": lambda model: attacks.relearned(model, FORGET),
}


@pytest.mark.parametrize("edit", UNDONE)
def test_inside_autocast_an_edit_and_its_end_reach_the_next_forward_pass(edit):
    model = tiny_llama()
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        before = model(**BATCH).loss
        with UNDONE[edit](model):
            assert model(**BATCH).loss != before
        assert model(**BATCH).loss == before


def test_hooks_that_a_compiled_model_would_not_see_are_refused():
    model = tiny_llama()
    for wrapped in (compiled(model), compiled_block(model)):
        with pytest.raises(ModelError, match="do not see new hooks"):
            prune(wrapped, NEURONS, "activations")


@pytest.mark.parametrize("kind", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_virtual_tokens_are_refused(kind):
    model = peft.get_peft_model(tiny_llama(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for ask in (
        lambda: evaluate(model, FORGET),
        lambda: find_sites(model),
        lambda: prune(model, NEURONS),
        lambda: attacks.membership(model, FORGET, RETAIN),
    ):
        with pytest.raises(ModelError, match="virtual tokens before every prompt"):
            ask()


def test_a_prune_by_hook_says_that_it_is_not_saved(tmp_path, caplog):
    model = peft.get_peft_model(tiny_llama(), ADAPTERS["lora"])
    with prune(model, NEURONS):
        model.save_pretrained(tmp_path)
    assert "hooks are not saved" not in caplog.text
    with prune(model, NEURONS, "activations"):
        model.save_pretrained(tmp_path)
    assert caplog.text.count("hooks are not saved") == 1
    model.save_pretrained(tmp_path)
    assert caplog.text.count("hooks are not saved") == 1
