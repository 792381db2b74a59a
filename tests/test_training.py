"""A slice trained by itself gets the gradient that autograd gives to its part of the whole weight."""

import pytest
import torch
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mipfast import DivergedError, InputError, find_sites
from mipfast.edit.prune import neuron_slices
from mipfast.edit.train import Losses, descend, order, training


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0, resid_pdrop=0)
    return GPT2LMHeadModel(config).double().eval()


def lora_llama():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(torch.float64), LoraConfig(target_modules=["up_proj", "down_proj"], r=3))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.double().eval()


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen_vl, gpt2, lora_llama])
def test_a_slice_s_gradient_is_the_slice_of_the_whole_gradient(build):
    model = build(torch.float64) if build in (tiny_llama, tiny_qwen_vl) else build()
    batch = image_batch(model, 2) if build is tiny_qwen_vl else text_batch(model, [9, 7], [2, 1])
    if build is gpt2:
        batch = {name: value for name, value in batch.items() if name != "position_ids"}
    sites = find_sites(model)
    index = torch.tensor([5, 0, 17])
    places = {}
    for stack in sites.stacks:
        for layer in (0, stack.num_layers - 1):
            rows, columns = neuron_slices(sites, stack.name, layer, index)
            places[f"{stack.name}/{layer}"] = [*rows, *columns]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(**batch).loss.backward()
    parts = [part for slices in places.values() for part in slices]
    wanted = [part.read(part.parameter.grad) for part in parts]
    model.zero_grad()
    with training(model, places) as leaves:
        model(**batch).loss.backward()
        assert len(leaves) == len(parts) and not any(p.grad is not None for p in model.parameters())
        for leaf, expected in zip(leaves, wanted, strict=True):
            assert expected.any()
            torch.testing.assert_close(leaf.tensor.grad, expected, rtol=1e-10, atol=1e-14)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_the_hook_changes_no_bit_of_the_forward_pass_and_gradients_add_up():
    model = tiny_llama()
    batch, sites = text_batch(model, [9, 7], [2, 1]), find_sites(model)
    plain = model(**batch).logits
    with training(model, {"0": neuron_slices(sites, sites.text.name, 0, torch.arange(3))[0]}) as (gate, up):
        for times in (1, 2):
            out = model(**batch)
            assert torch.equal(out.logits, plain)
            out.loss.backward()
            if times == 1:
                once = up.tensor.grad.clone()
        torch.testing.assert_close(up.tensor.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_parameters_train_as_themselves_or_through_a_float32_master(dtype):
    model = tiny_llama().to(dtype)
    batch, weight = text_batch(model, [9, 7], [2, 1]), model.model.layers[1].self_attn.q_proj.weight
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def terms(_):
        value = model(**batch).loss
        yield Losses(value, value)

    with training(model, {"q": [weight]}) as leaves:
        assert (leaves[0].tensor is weight) == (dtype == torch.float32)
        report = descend(leaves, terms, range(30), 1e-3, 1, "test")
    assert report["forget_loss"][-1] < report["forget_loss"][0] and report["retain_loss"] == []
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["model.layers.1.self_attn.q_proj.weight"] and weight.dtype == dtype


def test_nothing_that_can_move_and_infinite_losses_are_named():
    model = tiny_llama()
    zero = nn.Parameter(torch.zeros(()))
    with training(model, {"head": [model.lm_head.weight]}) as leaves:
        with pytest.raises(InputError, match="no gradient reaches head"):
            descend(leaves, lambda _: [Losses(zero * 1)], range(3), 1e-3, 2, "test")
        with pytest.raises(DivergedError, match="step 0 of test"):
            descend(leaves, lambda _: [Losses(zero / 0)], range(3), 1e-3, 2, "test")


def test_slices_of_something_else_than_a_projection_are_refused():
    model, sites = tiny_llama(), find_sites(tiny_llama())
    embedding = neuron_slices(sites, sites.text.name, 0, torch.arange(3))[0][0]
    embedding.parameter = model.model.embed_tokens.weight
    with pytest.raises(InputError, match="slices of a Embedding"), training(model, {"words": [embedding]}):
        pass


def test_order_goes_through_every_batch_before_it_repeats_one():
    first, second = order(3, (4, 2), 9)
    assert sorted(first[:4]) == sorted(first[4:8]) == [0, 1, 2, 3] and len(first) == len(second) == 9
    assert [first, second] == order(3, (4, 2), 9) != order(4, (4, 2), 9)
