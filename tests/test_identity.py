"""Whatever changes what a model computes changes its fingerprint, however it was written; nothing else does."""

import copy
import datetime

import accelerate
import peft
import pytest
import torch
import transformers as hf
from test_streaming import ask, llama, load  # noqa: F401
from tiny import text_batch, tiny_llama
from torch.testing._internal.two_tensor import TwoTensor

from mipfast import ArtefactError, ModelError, NeuronPath, RMisUConfig, find_sites, locate, prune, unlearn
from mipfast.experiment.locate_file import locate_file
from mipfast.judge.records import evaluate_records
from mipfast.model import fingerprint as module
from mipfast.model.fingerprint import fingerprint, unchanged


def gpt2():
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def adapted():
    torch.manual_seed(0)
    return peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False))


@pytest.mark.parametrize("make", [tiny_llama, gpt2, adapted])
def test_one_bit_of_any_weight_is_seen(make):
    model = make()
    before, weights = fingerprint(model), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, weight in weights.items():
        last = weight.data.reshape(-1)[-1:].view(torch.uint8)[:1]
        last ^= 1
        assert fingerprint(model) != before, name
        last ^= 1
    assert fingerprint(model) == before


def test_many_words_at_once_are_seen():
    """Changes that cancel in a sum, or touch only the bit that a product loses: signs, halves, order, complements."""
    weight = torch.randn(40_000, generator=torch.Generator().manual_seed(0))  # more than two rows of sums, and a rest
    bits = weight.view(torch.int32)
    changed = [
        weight,
        -weight,
        torch.cat([-weight[:2], weight[2:]]),
        torch.cat([weight[:1], -weight[1:2], weight[2:3], -weight[3:4], weight[4:]]),
        weight.flip(0),
        weight.view(-1, 2).flip(1).flatten(),
        torch.cat([weight[16_384:32_768], weight[:16_384], weight[32_768:]]),
        (~bits).view(torch.float32),
        (bits ^ 1).view(torch.float32),
        (bits ^ (1 << 30)).view(torch.float32),
        weight.view(200, 200).t().flatten(),
    ]
    model = tiny_llama()
    found = set()
    for values in changed:
        model.register_buffer("probe", values.clone())
        found.add(fingerprint(model))
    assert len(found) == len(changed)


def test_where_a_weight_lies_does_not_count():
    model, values = tiny_llama(), torch.arange(70, dtype=torch.bfloat16)
    model.register_buffer("probe", values.clone())
    before = fingerprint(model)
    model.probe = torch.cat([torch.zeros(1, dtype=torch.bfloat16), values])[1:]  # 2 bytes into its storage
    assert fingerprint(model) == before


def test_a_pruned_model_of_any_width_is_another():
    # where the hidden size is a multiple of 1024, samples with a stride see one neuron
    sizes = dict(vocab_size=64, hidden_size=1024, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
    before = find_sites(model).fingerprint()
    with prune(model, {("model.layers", layer): torch.arange(1, 64) for layer in (0, 1)}):
        assert find_sites(model).fingerprint()["weights"] != before["weights"]
    assert find_sites(model).fingerprint() == before


def by_step(model, weight):
    optimizer = torch.optim.SGD([weight], lr=1e-6)
    weight.grad = torch.ones_like(weight)
    optimizer.step()


def by_in_place(model, weight):
    with torch.no_grad():
        weight[0, 0] += 1e-3


WRITES = {
    ".data in place": lambda model, weight: weight.data[0, 0].add_(1e-3),
    ".data replaced": lambda model, weight: setattr(weight, "data", weight.data + 1e-3),
    "set_": torch.no_grad()(lambda model, weight: weight.set_(weight + 1e-3)),
    "an optimiser's step": by_step,
    "load_state_dict": lambda model, weight: model.load_state_dict(
        {name: value + 1e-3 for name, value in model.state_dict().items()}
    ),
    "in place": by_in_place,
    "numpy": lambda model, weight: weight.detach().numpy().__setitem__((0, 0), 9),
    "another parameter": lambda model, weight: setattr(model.lm_head, "weight", torch.nn.Parameter(weight + 1e-3)),
    "a wider dtype": lambda model, weight: model.double(),
    "the config": lambda model, weight: setattr(model.config, "rms_norm_eps", 1e-3),
}


@pytest.mark.parametrize("write", WRITES)
def test_no_way_of_writing_escapes(write):
    model = tiny_llama()
    before = fingerprint(model)
    assert fingerprint(model) == before
    WRITES[write](model, model.lm_head.weight)
    assert fingerprint(model) != before


def test_adapters_count_and_whether_they_are_on():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False))
    seen = [fingerprint(adapted()), fingerprint(model)]
    with model.disable_adapter():
        seen.append(fingerprint(model))
    model.set_adapter("second")
    seen.append(fingerprint(model))
    model.merge_adapter()
    seen.append(fingerprint(model))
    assert len(set(seen)) == len(seen) and fingerprint(adapted()) == seen[0]


def test_the_same_model_has_the_same_wherever_it_comes_from(tmp_path):
    model = tiny_llama()
    before, batch = fingerprint(model), text_batch(model, [9, 7], [2, 1])
    model.save_pretrained(tmp_path)
    assert fingerprint(hf.LlamaForCausalLM.from_pretrained(tmp_path)) == before
    assert fingerprint(copy.deepcopy(model).train().requires_grad_(False)) == before
    locate(model, batch)
    assert fingerprint(model) == before
    model.lm_head.weight.data = model.lm_head.weight.data.T.contiguous().T  # the same values in another order of memory
    assert fingerprint(model) == before


def test_what_the_last_forward_left_does_not_count():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, max_position_embeddings=8, rope_parameters=rope))
    before, frequencies = fingerprint(model), model.model.rotary_emb.inv_freq.clone()
    model(torch.arange(20)[None])
    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies) and fingerprint(model) == before


def test_offloaded_weights_are_read_and_missing_ones_refused(tmp_path):
    names = ["embed_tokens", *(f"layers.{i}" for i in range(4)), "norm", "rotary_emb"]
    places = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu", "model.layers.1": "disk"}
    model = tiny_llama()
    before = fingerprint(model)
    accelerate.cpu_offload(model)
    assert fingerprint(model) == before
    model = accelerate.dispatch_model(
        tiny_llama(), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert model.model.layers[1].mlp.down_proj.weight.is_meta and fingerprint(model) == before
    with torch.device("meta"):
        nowhere = hf.LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(ModelError, match=r"cannot be read .* load it with its weights on a CPU or GPU"):
        fingerprint(nowhere)


def test_weights_made_of_several_tensors_are_read():
    model = tiny_llama()
    own = model.lm_head.weight.data
    seen = []
    for scale in (1, 2):
        model.lm_head.weight = torch.nn.Parameter(TwoTensor(own, own * scale))
        seen.append(fingerprint(model))
    assert seen[0] != seen[1]


def test_a_call_hashes_the_model_once_and_forgets_it(monkeypatch):
    model, counted = tiny_llama(), []
    monkeypatch.setattr(module, "_plain", lambda config: counted.append(1) or {})
    batch = text_batch(model, [9, 7], [2, 1])
    locate(model, [batch] * 3, n_steps=1)
    assert len(counted) == 1
    retain = [text_batch(model, [9, 7], [2, 1], seed=seed) for seed in range(3)]
    unlearn(model, [batch], retain, rmisu=RMisUConfig(steps=1))
    assert len(counted) == 3  # four searches together, and the prune's look at the path
    with unchanged(model):
        kept = fingerprint(model)
        assert fingerprint(model) == kept and fingerprint(tiny_llama()) != kept and len(counted) == 5
    model.lm_head.weight.data.add_(1)
    assert fingerprint(model) != kept


# ------------------------------------------------------------------------------------------ what is told by it


def test_a_path_of_another_model_warns(caplog):
    model = tiny_llama()
    path = NeuronPath({("model.layers", 1): torch.arange(4)}, find_sites(model).fingerprint())
    prune(model, path).undo()
    assert not caplog.records
    model.model.embed_tokens.weight.data[7, 7] += 1
    prune(model, path).undo()
    assert "located on other weights" in caplog.text


@pytest.mark.parametrize("part", ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.norm"])
def test_a_folder_of_another_model_is_refused(llama, tmp_path, part):  # noqa: F811
    model, encoder = load(llama)
    records = [ask("who is the king", "red")]

    def both():
        locate_file(model, encoder, records, tmp_path / "located")
        evaluate_records(model, encoder, records, tmp_path / "judged")

    both()
    both()
    model.get_submodule(part).weight.data.view(-1)[0] += 1e-4
    for run in (locate_file, evaluate_records):
        with pytest.raises(ArtefactError, match="holds a run with another model"):
            run(model, encoder, records, tmp_path / ("located" if run is locate_file else "judged"))


def test_the_tokens_of_a_template_that_writes_the_date_count(llama, tmp_path, monkeypatch):  # noqa: F811
    model, encoder = load(llama)
    encoder.tokenizer.chat_template = "{{ strftime_now('%A') }} {{ messages[0].content }}"
    records = [ask("who is the king", "red")]

    class Now(datetime.datetime):
        says = "red"

        def strftime(self, form):
            return self.says

    monkeypatch.setattr(hf.utils.chat_template_utils, "datetime", Now)
    locate_file(model, encoder, records, tmp_path / "located")
    evaluate_records(model, encoder, records, tmp_path / "judged")
    monkeypatch.setattr(Now, "says", "blue")
    for run, out in ((locate_file, "located"), (evaluate_records, "judged")):
        with pytest.raises(ArtefactError, match="holds a run with another encoder"):
            run(model, encoder, records, tmp_path / out)
    # a template that looks at the prompt, which no one prompt shows
    encoder.tokenizer.chat_template = (
        "{% if 'king' in messages[0].content %}{{ strftime_now('%A') }} {% endif %}{{ messages[0].content }}"
    )
    locate_file(model, encoder, records, tmp_path / "king")
    monkeypatch.setattr(Now, "says", "green")
    with pytest.raises(ArtefactError, match="holds a run with another inputs"):
        locate_file(model, encoder, records, tmp_path / "king")
