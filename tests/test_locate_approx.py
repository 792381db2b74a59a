"""`search="one-pass"`: the gradient at the clean run of all layers, against autograd through hooks."""

import pytest
import torch
from tiny import image_batch, split, text_batch, tiny_llama, tiny_qwen_vl, unchecked_route

import mipfast
from mipfast.scoring import search

F64 = torch.float64


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(F64)


def clean_gradients(model, sample, projections):
    """[tokens, F] (activation, d log p of the sample's labels / d activation) of every projection's input."""
    kept = []

    def keep(module, args):
        kept.append(args[0].detach().requires_grad_() if not args[0].requires_grad else args[0])
        return (kept[-1],)

    hooks = [projection.register_forward_pre_hook(keep) for projection in projections]
    inputs = {name: value for name, value in sample.items() if name != "labels"}
    logp = model(**inputs).logits.log_softmax(-1)[0]
    for hook in hooks:
        hook.remove()
    at = (sample["labels"][0] != -100).nonzero()[:, 0]
    grads = torch.autograd.grad(logp[at - 1, sample["labels"][0, at]].sum(), kept)
    return [(a.detach().flatten(0, -2), g.flatten(0, -2)) for a, g in zip(kept, grads, strict=True)], at


@pytest.mark.parametrize("score", ["igi", "ifi"])
@pytest.mark.parametrize("positions", ["last_prompt", "answer", "all"])
def test_text_is_the_gradient_at_the_clean_run(llama, positions, score):
    batch = text_batch(llama, [9, 12], [2, 3], "right", seed=1)
    found = mipfast.locate(llama, batch, search="one-pass", positions=positions, score=score)
    for i in range(2):
        layers, at = clean_gradients(llama, split(batch, i), [b.mlp.down_proj for b in llama.model.layers])
        rows = {"last_prompt": at[:1] - 1, "answer": at - 1, "all": slice(None)}[positions]
        want = torch.stack([(a * g if score == "igi" else g.square())[rows].sum(0) for a, g in layers])
        torch.testing.assert_close(found.scores[i].double(), want, rtol=1e-6, atol=1e-9)
        assert found.path[i].tolist() == want.sort(descending=True).indices[:, :5].tolist()


def test_vision_is_the_gradient_at_the_clean_run():
    model = tiny_qwen_vl(F64)
    batch = image_batch(model, 2, 1, [56, 84])
    found = mipfast.locate(model, batch, modality="vision", search="one-pass")
    for i in range(2):
        layers, _ = clean_gradients(model, split(batch, i), [b.mlp.down_proj for b in model.model.visual.blocks])
        want = torch.stack([g.square().sum(0) for _, g in layers])
        torch.testing.assert_close(found.scores[i].double(), want, rtol=1e-6, atol=1e-9)


def test_one_backward_serves_all_layers(llama, monkeypatch):
    batch = text_batch(llama, [9, 12], [2, 3], "right", seed=1)
    monkeypatch.setattr(search, "_check_route", unchecked_route)
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), grad(*a, **k))[1])
    mipfast.locate(llama, batch, search="one-pass")
    assert len(calls) == 1


def test_the_native_route_gives_the_same(llama, monkeypatch):
    batch = text_batch(llama, [9, 12], [2, 3], "right", seed=1)
    found = mipfast.locate(llama, batch, search="one-pass")
    monkeypatch.setattr("mipfast.scoring.nodes.plan", lambda captured, clean_states: (captured, None))
    native = mipfast.locate(llama, batch, search="one-pass")
    torch.testing.assert_close(native.scores, found.scores, rtol=1e-6, atol=1e-9)


def test_it_is_labelled(llama):
    batch = text_batch(llama, [9], [2])
    assert mipfast.locate(llama, batch, search="one-pass").report["approximate"] is True
    assert mipfast.locate(llama, batch).report["approximate"] is False


@pytest.mark.parametrize("other", [dict(n_steps=4), dict(method="gausslegendre"), dict(combine="product")], ids=str)
def test_it_has_one_node(llama, other):
    with pytest.raises(mipfast.InputError, match="one node alpha = 1"):
        mipfast.locate(llama, text_batch(llama, [9], [2]), search="one-pass", **other)


def test_resolving_twice_is_resolving_once():
    config = mipfast.LocateConfig(search="one-pass").resolved()
    assert (config.method, config.n_steps) == ("gaussradau", 1) and config.resolved() == config
