"""`locate` in several threads of one process: each its own model, or all the same one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import image_batch, text_batch, tiny_llama, tiny_qwen_vl
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mipfast import locate
from mipfast.model.patching import own_configs


def twins():
    """Two models built from one config, as in a loop over seeds."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=61, **sizes)
    models = [LlamaForCausalLM(config).eval() for _ in range(2)]
    return [(model, text_batch(model, [5, 4], [2, 1]), {}) for model in models]


def text_and_pictures():
    text, vision = tiny_llama(), tiny_qwen_vl()
    return [(text, text_batch(text, [5, 4], [2, 1]), {}), (vision, image_batch(vision, 1), dict(modality="vision"))]


def one_model():
    (first, batch, _), _ = twins()
    return [(first, batch, dict(positions=name)) for name in ("last_prompt", "answer")]


def state(model):
    """What a call may leave behind: attributes of modules, and what their configs say. Qwen-VL itself keeps rope_deltas
    of its last pass."""
    own = {name: {k: v for k, v in vars(m).items() if k != "rope_deltas"} for name, m in model.named_modules()}
    return own, [(id(m.config), m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")]


def registries():
    return [list(r) for r in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]


@pytest.mark.parametrize(
    ("work", "times"), [(twins, 15), (text_and_pictures, 2), (one_model, 2)], ids=["twins", "pictures", "one model"]
)
def test_two_threads_give_the_serial_numbers(work, times):
    work = [(model, batch, dict(n_steps=2, **settings)) for model, batch, settings in work()]
    serial = [locate(model, batch, **settings) for model, batch, settings in work]
    registered = registries()
    before = [state(model) for model, _, _ in work]

    def calls(one):
        model, batch, settings = one
        return [locate(model, batch, **settings) for _ in range(times)]

    with ThreadPoolExecutor(len(work)) as pool:
        found = list(pool.map(calls, work))
    for each, expected in zip(found, serial, strict=True):
        scale = expected.scores.abs().amax(2, keepdim=True)
        for one in each:
            assert ((one.scores - expected.scores).abs() <= 1e-5 * scale).all() and one.path.equal(expected.path)
            torch.testing.assert_close(one.report["residuals"], expected.report["residuals"], rtol=1e-3, atol=1e-5)
    assert [state(model) for model, _, _ in work] == before
    assert registries() == registered


def test_a_config_inside_another_stays_the_same_object():
    model = tiny_qwen_vl()
    text, whole = model.model.language_model, model.config
    with own_configs(model):
        assert model.config is not whole and model.config.text_config is text.config
        assert text.config is text.layers[0].self_attn.config and model.config.to_dict() == whole.to_dict()
    assert model.config is whole and text.config is whole.text_config and isinstance(model, nn.Module)
