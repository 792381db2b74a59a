"""`NeuronPathIG` against Captum itself, and its arguments against `mipfast.locate`.

Captum's riemann_trapezoid is left out: its weights sum to (n_steps - 1) / n_steps, ours to 1.
"""

import subprocess
import sys

import pytest
import torch
from tiny import image_batch, split, text_batch, tiny_llama, tiny_qwen_vl

import mipfast
from mipfast.integrations.captum import NeuronPathIG

F64 = torch.float64


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(F64)


@pytest.fixture(scope="module")
def batch(llama):
    return text_batch(llama, [9, 12], [2, 3], "right", seed=1)


@pytest.mark.parametrize("method", ["riemann_left", "riemann_right", "riemann_middle", "gausslegendre"])
def test_pointwise_is_captum(llama, batch, method):
    """Zero embeddings give zero activations in a Llama without biases: only so is Captum's baseline, which is one of
    the model's input, also that of every layer."""
    attr = pytest.importorskip("captum.attr", reason="captum is not installed (it is in the extras bench and dev)")
    found = NeuronPathIG(llama).attribute(batch, n_steps=5, method=method)
    for i in range(len(found)):
        sample = split(batch, i)
        ids, labels = sample["input_ids"], sample["labels"][0]
        at = (labels != -100).nonzero()[:, 0]

        def logprob(embeddings, at=at, targets=labels[at]):
            logp = llama(inputs_embeds=embeddings).logits.log_softmax(-1)
            return logp[:, at - 1, targets].sum(1)

        embeddings = llama.get_input_embeddings()(ids).detach()
        for layer, block in enumerate(llama.model.layers):
            captum = attr.LayerIntegratedGradients(logprob, block.mlp.down_proj, multiply_by_inputs=True)
            want = captum.attribute(
                embeddings, torch.zeros_like(embeddings), n_steps=5, method=method, attribute_to_layer_input=True
            )[0].sum(0)
            off = (found[i, layer] - want).abs().max() / want.abs().max()
            assert off < 1e-6, f"sample {i}, layer {layer}: {off:.1e}"  # scores are stored in float32


def test_arguments_mean_what_locate_means(llama, batch):
    settings = dict(positions="answer", search="greedy", objective="log_odds")
    found, delta = NeuronPathIG(llama).attribute(
        batch, n_steps=3, method="riemann_left", return_convergence_delta=True, **settings
    )
    want = mipfast.locate(llama, batch, n_steps=3, method="riemann_left", residuals="all", **settings)
    assert torch.equal(found, want.scores)
    assert delta.shape == (2, 4) and torch.equal(delta, torch.tensor(want.report["residuals"]))


def test_the_delta_vanishes_with_finer_steps(llama, batch):
    _, delta = NeuronPathIG(llama).attribute(batch, n_steps=24, return_convergence_delta=True)
    assert delta.max() < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 100])
def test_internal_batch_size_changes_memory_alone(llama, batch, rows, monkeypatch):
    from mipfast.scoring.replay import Replay

    seen, init = [], Replay.__init__
    monkeypatch.setattr(Replay, "__init__", lambda self, capture, n: (seen.append(n * 2), init(self, capture, n))[1])
    ig = NeuronPathIG(llama)
    found = ig.attribute(batch, internal_batch_size=rows)
    assert max(seen) <= max(rows, 2)
    torch.testing.assert_close(found, ig.attribute(batch), rtol=1e-6, atol=1e-9)


def test_stacks():
    model = tiny_qwen_vl(F64)
    batch = image_batch(model, 2, 1)
    sites = mipfast.find_sites(model)
    for stack in (sites.text, sites.vision[0]):
        modality = "text" if stack is sites.text else "vision"
        found = NeuronPathIG(model, stack.name).attribute(batch)
        assert torch.equal(found, NeuronPathIG(model, modality).attribute(batch))
        assert found.shape == (2, stack.num_layers, stack.num_neurons)
    with pytest.raises(mipfast.ModelError, match="no stack 'nowhere'"):
        NeuronPathIG(model, "nowhere")


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(internal_batch_size=0), "at least 1 row"),
        (dict(return_convergence_delta=True, combine="product", positions="last_prompt"), "completeness"),
        (dict(baselines=0), "baselines"),
    ],
    ids=str,
)
def test_errors_say_what_to_do(llama, batch, settings, message):
    with pytest.raises(mipfast.InputError, match=message):
        NeuronPathIG(llama).attribute(batch, **settings)


def test_captum_is_not_needed():
    code = "import sys; sys.modules['captum'] = None; import mipfast.integrations.captum"
    subprocess.run([sys.executable, "-c", code], check=True)
