"""Pruning silences exactly the path, and undo gives back the very bits."""

import pytest
import torch
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl

from mipfast import NeuronPath, find_sites, prune
from mipfast.edit.prune import active_prunes
from mipfast.errors import ArtefactError, InputError


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def logits(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def a_path(model, k=5):
    sites = find_sites(model)
    return NeuronPath(
        {(s.name, layer): torch.arange(1, 1 + k) for s in sites.stacks for layer in range(s.num_layers)},
        sites.fingerprint(),
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen_vl])
@pytest.mark.parametrize("mode", ["weights", "activations"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undo_is_bit_exact(make, mode, dtype):
    model = make().to(dtype)
    batch = text_batch(model, [9, 7], [2, 1]) if make is tiny_llama else image_batch(model, 2)
    before, clean = bits(model), logits(model, batch)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with prune(model, a_path(model), mode):
        pruned = logits(model, batch)
    assert not torch.equal(pruned, clean)
    assert same(bits(model), before) and torch.equal(logits(model, batch), clean)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks and not active_prunes(model)


def test_both_modes_compute_the_same_model():
    model = tiny_qwen_vl(torch.float64)
    batch = image_batch(model, 2)
    with prune(model, a_path(model)):
        by_weights = logits(model, batch)
    with prune(model, a_path(model), "activations"):
        by_hooks = logits(model, batch)
    torch.testing.assert_close(by_weights, by_hooks, rtol=0, atol=1e-12)


def test_undo_discards_training_of_the_pruned_neurons():
    model = tiny_llama()
    before = bits(model)
    handle = prune(model, a_path(model))
    stack = find_sites(model).text
    with torch.no_grad():
        stack.outputs[0].weight[:, 1:6] += 1
        stack.inputs[0][0].weight[1:6] += 1
    handle.undo()
    assert same(bits(model), before)
    with pytest.raises(InputError, match="undone or committed already"):
        handle.undo()


def test_prunes_are_undone_newest_first():
    model = tiny_llama()
    before = bits(model)
    first, second = prune(model, a_path(model)), prune(model, a_path(model, k=8))
    with pytest.raises(InputError, match="newest first"):
        first.undo()
    second.undo()
    first.undo()
    assert same(bits(model), before)


@pytest.mark.parametrize("mode", ["weights", "activations"])
def test_suspended_shows_the_unedited_model_and_returns(mode):
    model = tiny_llama()
    batch = text_batch(model, [8], [2])
    clean = logits(model, batch)
    with prune(model, a_path(model), mode) as handle:
        pruned = logits(model, batch)
        with handle.suspended():
            assert torch.equal(logits(model, batch), clean)
        assert torch.equal(logits(model, batch), pruned)


def test_activations_at_some_positions_only():
    model = tiny_llama()
    batch = text_batch(model, [8], [2])
    clean = logits(model, batch)
    with prune(model, a_path(model), "activations", positions=[5]):
        late = logits(model, batch)
    assert torch.equal(late[:, :5], clean[:, :5]) and not torch.equal(late[:, 5], clean[:, 5])


@pytest.mark.parametrize(
    ("neurons", "says"),
    [({(0): [48]}, "do not exist"), ({(0): [-1]}, "do not exist"), ({(9): [0]}, "do not exist")],
)
def test_neurons_the_model_does_not_have(neurons, says):
    model = tiny_llama()
    path = NeuronPath({(find_sites(model).text.name, layer): torch.tensor(i) for layer, i in neurons.items()})
    with pytest.raises(ArtefactError, match=says):
        prune(model, path)


def test_a_path_of_another_model_is_refused_and_other_weights_are_warned_of(caplog):
    llama, qwen = tiny_llama(), tiny_qwen_vl()
    with pytest.raises(ArtefactError, match="another model"):
        prune(qwen, a_path(llama))
    path = a_path(llama)
    with torch.no_grad():
        find_sites(llama).text.outputs[0].weight.add_(1)
    with prune(llama, path):
        assert "other weights" in caplog.text


def test_unknown_modes_are_named():
    model = tiny_llama()
    with pytest.raises(InputError, match="weights"):
        prune(model, a_path(model), "maybe")
    with pytest.raises(InputError, match="all positions"):
        prune(model, a_path(model), "weights", positions=[0])
