"""Whole searches against the released code (`released.py`) and Captum, on random weights.

One process, interleaved, medians of 5 rounds with --locate-full, else one round. On a CPU the clock is this process's
CPU time: a busy machine stretches the wall clock of either side at will. A ratio is the baseline's seconds over ours,
per sample. Before a time is taken, the baseline must compute the released preset's scores and cost no more than the
passes it is made of, and our default must compute what native replay does.

Floors and targets are of equal work, scores alone, as the baselines and the prototype they come from compute. Rows that
end in "with residuals" measure completeness too, which no baseline does and a call does on its first batch; "torch's
products" is what a row costs by torch's float32 products, as the baselines multiply, on CPUs where
`mipfast.ops.frozen_linear` has faster ones.

    python bench/test_bench_locate.py memory text|vision ours|released      peak growth of this process, in bytes
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
import released  # noqa: E402
import shapes  # noqa: E402, F401 (the tests' folder is on the path from here on)
from fixed import locate  # noqa: E402
from slow_pointwise import layer_by_layer  # noqa: E402

from mipfast import LocateConfig  # noqa: E402
from mipfast.model.batch import find_labels  # noqa: E402
from mipfast.model.fingerprint import unchanged  # noqa: E402
from mipfast.ops import frozen_linear  # noqa: E402
from mipfast.scoring import nodes, wave  # noqa: E402
from mipfast.scoring.search import objective_value  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, WORDS = 4, 4000
GAUGED, PLAIN = ", with residuals", ", torch's products"
# (floor, target) of every ratio; memory: our growth over the baseline's
GOALS = {
    "released preset": (1.8, 2.2),
    "4 nodes, one sample": (10, 13),
    "4 nodes, 4 samples per batch": (14, 18),
    "4 nodes / released 20 steps": (45, 65),
    "4 nodes, prompt 256 + answer 16": (20, 28),
    "IFI, 4 left steps both": (1.7, 2.0),
    "IFI, 2 nodes": (4, 5.2),
    "Captum pointwise, gausslegendre": (2.4, 4),
    "Captum pointwise, riemann_right": (2.4, 4),
    "wave, 6 + 1 tokens": (5, 6),
    "wave, 13 + 3 tokens": (3, 3.9),
    "wave, 6 + 1 tokens, Qwen2.5-Coder-0.5B's shape": (4, 5),
    "wave, 8 samples of 8 + 1 tokens": (1.5, 1.8),
    "wave, whole prompt of 24": (1 / 1.05, 1),
    "wave, vision": (1 / 1.05, 1),
    "Captum, every layer, SmolLM2's shape": (10, 20),
    "Captum, every layer, SmolLM2's shape, all positions": (5, 10),
    "memory growth, text": (1 / 4, 1 / 8),
    "memory growth, vision": (1 / 4, 1 / 8),
}


def llama(layers=12, hidden=512, neurons=1536, words=WORDS, heads=8, shared=4, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval().to(DEVICE)


SMOL = dict(layers=30, hidden=576, neurons=1536, words=49152, heads=9, shared=3, tied=True)  # SmolLM2-135M's
CODER = dict(layers=24, hidden=896, neurons=4864, words=151936, heads=14, shared=2, tied=True)  # Qwen2.5-Coder-0.5B's


def qwen_vl():
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=WORDS,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            rope_theta=1e4,
            rope_scaling=dict(type="mrope", mrope_section=[8, 12, 12]),
            bos_token_id=1,
            eos_token_id=2,
        ),
        vision_config=dict(
            depth=8,
            hidden_size=256,
            intermediate_size=512,
            num_heads=4,
            out_hidden_size=512,
            patch_size=14,
            spatial_merge_size=2,
            window_size=112,
            fullatt_block_indexes=[3, 7],
        ),
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=WORDS - 1,
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval().to(DEVICE)


def text_batch(prompt, answer, samples=1, words=WORDS):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, words - 1, (samples, prompt + answer), generator=generator)
    return _batch(ids, answer)


def image_batch(prompt=22, answer=8, patches=144, samples=1, words=WORDS):
    """One square picture a sample, after 4 of the prompt's tokens; a quarter as many tokens as patches."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(6, words - 1, (samples, prompt + answer - 2), generator=generator).tolist()
    ids = torch.tensor([[*row[:3], 3, *[5] * (patches // 4), 4, *row[3:]] for row in text])
    pixels = torch.randn(samples * patches, 3 * 2 * 14 * 14, generator=generator).to(DEVICE)
    grid = torch.tensor([[1, math.isqrt(patches), math.isqrt(patches)]] * samples).to(DEVICE)
    return _batch(ids, answer) | dict(
        mm_token_type_ids=(ids == 5).long().to(DEVICE), pixel_values=pixels, image_grid_thw=grid
    )


def _batch(ids, answer):
    labels = ids.clone()
    labels[:, :-answer] = -100
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    return {name: value.to(DEVICE) for name, value in batch.items()}


def seconds(call):
    if DEVICE == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def plain(call):
    """The call by torch's own products."""

    def run():
        with mock.patch.object(frozen_linear, "_faster", lambda: False):
            return call()

    return run


@pytest.fixture(scope="module")
def text():
    return llama(), text_batch(56, 8)


@pytest.fixture(scope="module")
def vision():
    return qwen_vl(), image_batch()


@pytest.fixture
def interleaved(benchmark, pytestconfig):
    """interleaved(calls): median seconds of every call. The benchmark's own row is the last call's."""

    def run(calls):
        taken = defaultdict(list)
        *others, ours = calls

        def clock(name):
            taken[name].append(seconds(calls[name]))

        def setup():
            for name in others:
                clock(name)

        rounds = 5 if pytestconfig.getoption("locate_full") else 1
        benchmark.pedantic(clock, args=(ours,), setup=setup, rounds=rounds)
        medians = {name: statistics.median(times) for name, times in taken.items()}
        benchmark.extra_info["seconds"] = {name: [round(t, 4) for t in times] for name, times in taken.items()}
        return medians

    return run


@pytest.fixture
def row(benchmark, pytestconfig):
    """row(name, ratio, note): for the table, the JSON and extra_info."""

    def add(name, ratio, note=""):
        floor, target = GOALS.get(name, (None, None))
        entry = dict(name=name, ratio=round(ratio, 3), floor=floor, target=target, note=note, load=os.getloadavg()[0])
        pytestconfig.locate_rows.append(entry)
        benchmark.extra_info[name] = entry

    return add


@pytest.fixture
def skip_long(pytestconfig):
    if not pytestconfig.getoption("locate_full"):
        pytest.skip("a baseline of a minute: needs --locate-full")


def assert_same(found, expected, tolerance, path=True):
    """found an Attribution of one sample, expected (scores [L,F], path [L,k])."""
    scores = expected[0].float().cpu()
    off = (found.scores[0] - scores).abs().amax(1) / scores.abs().amax(1)
    assert off.max() <= tolerance, f"scores off by {off.max():.1e} of a layer's largest"
    assert not path or found.path[0].tolist() == expected[1].tolist(), "other neurons on the path"


def assert_native(monkeypatch, model, batch, **options):
    """Our shortcuts change nothing."""
    found = locate(model, batch, **options)
    with monkeypatch.context() as patch:
        patch.setattr(nodes, "plan", lambda capture, clean_states: (capture, None))
        native = locate(model, batch, **options)
    for i in range(len(found.path)):
        off = (found.scores[i] - native.scores[i]).abs().amax(1) / native.scores[i].abs().amax(1)
        assert off.max() <= 1e-4, f"scores off by {off.max():.1e} of native replay's largest"


def assert_lean(search, model, batch, projections, tolerance=0.15):
    """The baseline takes no longer than one hooked forward and backward of m rows per layer, within the tolerance."""
    copies = {name: released._tile(value, STEPS) for name, value in batch.items()}

    def one_pass():
        def overwrite(module, args):
            tokens = args[0].reshape(STEPS, -1, args[0].shape[-1]).clone()
            tokens[:, 0] = leaf
            return tokens.view_as(args[0])

        leaf = torch.zeros(STEPS, projections[0].in_features, device=DEVICE, requires_grad=True)
        handle = projections[len(projections) // 2].register_forward_pre_hook(overwrite)
        released._loss(model, copies).backward()
        handle.remove()
        model.zero_grad()

    one_pass()
    for _ in range(3):
        before = statistics.median(seconds(one_pass) for _ in range(3))
        whole = seconds(lambda: search(model, batch))
        passes = len(projections) * statistics.median([before, *(seconds(one_pass) for _ in range(3))])
        if abs(whole / passes - 1) <= tolerance:
            return
    pytest.fail(f"the baseline took {whole:.2f} s, its {len(projections)} passes {passes:.2f} s: no fair baseline")


def test_text(text, interleaved, row, monkeypatch):
    model, batch = text
    four = text_batch(56, 8, 4)
    preset = LocateConfig.released("text")
    assert_same(locate(model, batch, preset), released.released_igi(model, batch), 1e-5)
    assert_lean(released.released_igi, model, batch, [block.mlp.down_proj for block in model.model.layers])
    assert_native(monkeypatch, model, batch)
    assert_native(monkeypatch, model, four)
    took = interleaved(
        {
            "released": lambda: released.released_igi(model, batch),
            "frozen": lambda: released.released_igi(model, batch, frozen=True),
            "preset": lambda: locate(model, batch, preset),
            "plain preset": plain(lambda: locate(model, batch, preset)),
            "four": lambda: locate(model, four, residuals="none"),
            "four gauged": lambda: locate(model, four),
            "four plain": plain(lambda: locate(model, four, residuals="none")),
            "gauged": lambda: locate(model, batch),
            "plain": plain(lambda: locate(model, batch, residuals="none")),
            "default": lambda: locate(model, batch, residuals="none"),
        }
    )
    for name, ours in (
        ("released preset", took["preset"]),
        ("released preset" + PLAIN, took["plain preset"]),
        ("4 nodes, one sample", took["default"]),
        ("4 nodes, one sample" + GAUGED, took["gauged"]),
        ("4 nodes, one sample" + PLAIN, took["plain"]),
        ("4 nodes, 4 samples per batch", took["four"] / 4),
        ("4 nodes, 4 samples per batch" + GAUGED, took["four gauged"] / 4),
        ("4 nodes, 4 samples per batch" + PLAIN, took["four plain"] / 4),
    ):
        frozen = took["frozen"] / ours
        row(name, took["released"] / ours, f"{took['released']:.2f} s / {ours:.3f} s; frozen {frozen:.2f}x")


def test_twenty_steps(text, interleaved, row, skip_long):
    """Errors: largest difference from 12 Gauss nodes over the layer's largest score, both rules on our integral."""
    model, batch = text
    fine = locate(model, batch, n_steps=12).scores
    errors = [
        ((locate(model, batch, **rule).scores - fine).abs().amax(2) / fine.abs().amax(2)).max().item()
        for rule in ({}, dict(method="riemann_left", n_steps=20))
    ]
    note = f"; error {errors[0]:.1e}, 20 left steps {errors[1]:.1e}"
    against_a_long_one(interleaved, row, "4 nodes / released 20 steps", model, batch, 20, note)


def test_long_prompt(text, interleaved, row, skip_long, monkeypatch):
    model, batch = text[0], text_batch(256, 16)
    assert_native(monkeypatch, model, batch)
    against_a_long_one(interleaved, row, "4 nodes, prompt 256 + answer 16", model, batch, STEPS)


def against_a_long_one(interleaved, row, name, model, batch, steps, note=""):
    """Rows of our default against a baseline that takes half a minute."""
    took = interleaved(
        {
            "released": lambda: released.released_igi(model, batch, steps=steps),
            "gauged": lambda: locate(model, batch),
            "plain": plain(lambda: locate(model, batch, residuals="none")),
            "default": lambda: locate(model, batch, residuals="none"),
        }
    )
    for kind, key in (("", "default"), (GAUGED, "gauged"), (PLAIN, "plain")):
        row(name + kind, took["released"] / took[key], f"{took['released']:.1f} s / {took[key]:.3f} s{note}")


def test_vision(vision, interleaved, row, monkeypatch):
    model, batch = vision
    preset = locate(model, batch, LocateConfig.released("vision"))
    assert_same(preset, released.released_ifi(model, batch), 1e-5)
    assert_lean(released.released_ifi, model, batch, [block.mlp.down_proj for block in model.model.visual.blocks])
    assert_native(monkeypatch, model, batch, modality="vision")
    left = dict(modality="vision", method="riemann_left", n_steps=STEPS)
    took = interleaved(
        {
            "released": lambda: released.released_ifi(model, batch),
            "left": lambda: locate(model, batch, residuals="none", **left),
            "left gauged": lambda: locate(model, batch, **left),
            "left plain": plain(lambda: locate(model, batch, residuals="none", **left)),
            "gauged": lambda: locate(model, batch, modality="vision"),
            "plain": plain(lambda: locate(model, batch, modality="vision", residuals="none")),
            "default": lambda: locate(model, batch, modality="vision", residuals="none"),
        }
    )
    for name, key in (
        ("IFI, 4 left steps both", "left"),
        ("IFI, 4 left steps both" + GAUGED, "left gauged"),
        ("IFI, 4 left steps both" + PLAIN, "left plain"),
        ("IFI, 2 nodes", "default"),
        ("IFI, 2 nodes" + GAUGED, "gauged"),
        ("IFI, 2 nodes" + PLAIN, "plain"),
    ):
        row(name, took["released"] / took[key], f"{took['released']:.2f} s / {took[key]:.3f} s")


def captum_scores(model, batch, method, other=None):
    """[L,F] of Captum's LayerIntegratedGradients, a layer after the other, from zero embeddings or another batch's."""
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    labels = find_labels(batch)
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    baseline = torch.zeros_like(embeddings)
    if other is not None:
        baseline = model.get_input_embeddings()(other["input_ids"]).detach()

    def objective(inputs):
        index = labels.index.repeat(len(inputs), 1)[..., None]
        states = model.model(inputs_embeds=inputs, use_cache=False)[0]
        logits = model.lm_head(states.gather(1, index.expand(-1, -1, states.shape[-1])))
        return objective_value(logits, labels, "logprob")

    def scores():
        rows = []
        for block in model.model.layers:
            layer = attr.LayerIntegratedGradients(objective, block.mlp.down_proj)
            options = dict(n_steps=STEPS, method=method, attribute_to_layer_input=True)
            rows.append(layer.attribute(embeddings, baseline, **options).sum(1)[0])
        return torch.stack(rows)

    return scores


@pytest.mark.parametrize("method", ["gausslegendre", "riemann_right"])
def test_captum(text, interleaved, row, method):
    """All positions, no path, 4 nodes. Zero embeddings are zero activations in a Llama without biases."""
    model, batch = text
    captum = captum_scores(model, batch, method)

    def ours(residuals="none"):
        return locate(model, batch, positions="all", search="pointwise", method=method, residuals=residuals)

    assert_same(ours(), (captum(), None), 1e-4, path=False)
    took = interleaved({"captum": captum, "gauged": lambda: ours("first"), "plain": plain(ours), "default": ours})
    for name, key in (("", "default"), (GAUGED, "gauged"), (PLAIN, "plain")):
        row(
            f"Captum pointwise, {method}" + name,
            took["captum"] / took[key],
            f"{took['captum']:.2f} s / {took[key]:.3f} s",
        )


@pytest.mark.parametrize("one_position", [True, False])
def test_captum_on_a_real_shape(one_position, interleaved, row, skip_long):
    """The same on 6 + 1 tokens, where reading the weights is what costs: Captum reads them for every layer. At one
    position, the default of locate, by a prompt whose last token differs: activations before it are the same in both,
    and the label's own token changes no logits."""
    model, batch = llama(**SMOL), text_batch(6, 1, words=SMOL["words"])
    settings, other = dict(positions="all"), None
    if one_position:
        ids = batch["input_ids"].clone()
        ids[:, 5] += 1
        other = batch | {"input_ids": ids}
        settings = dict(counterfactuals=other)
    captum = captum_scores(model, batch, "gausslegendre", other)

    def ours():
        return locate(model, batch, search="pointwise", residuals="none", **settings)

    with unchanged(model):
        assert_same(ours(), (captum(), None), 1e-4, path=False)
        took = interleaved({"captum": captum, "ours": ours})
    note = f"{took['captum']:.2f} s / {took['ours']:.3f} s"
    name = "Captum, every layer, SmolLM2's shape" + ("" if one_position else ", all positions")
    row(name, took["captum"] / took["ours"], note)


@pytest.mark.parametrize(
    ("name", "shape", "size", "settings"),
    [
        ("wave, 6 + 1 tokens", SMOL, (6, 1), {}),
        ("wave, 13 + 3 tokens", SMOL, (13, 3), {}),
        ("wave, 8 samples of 8 + 1 tokens", SMOL, (8, 1, 8), {}),
        ("wave, whole prompt of 24", SMOL, (24, 1), dict(positions="prompt")),
        ("wave, 6 + 1 tokens, Qwen2.5-Coder-0.5B's shape", CODER, (6, 1), {}),
    ],
)
def test_wave(name, shape, size, settings, interleaved, row, pytestconfig):
    """Pointwise scores of all layers together, against each layer's own replay (tests/slow_pointwise.py): 4 nodes,
    SmolLM2's shape, random weights. Of the search alone: the weights are hashed once for all calls."""
    if name != "wave, 6 + 1 tokens" and not pytestconfig.getoption("locate_full"):
        pytest.skip("a baseline of half a minute: needs --locate-full")
    model, batch = llama(**shape), text_batch(*size, words=shape["words"])
    against_layer_by_layer(name, model, batch, interleaved, row, settings)


def test_wave_of_vision(vision, interleaved, row, skip_long):
    model, batch = vision
    against_layer_by_layer("wave, vision", model, batch, interleaved, row, dict(modality="vision"))


def against_layer_by_layer(name, model, batch, interleaved, row, settings):
    def ours():
        return locate(model, batch, search="pointwise", residuals="none", **settings)

    def layered():
        with mock.patch.object(wave.CleanRun, "pointwise", layer_by_layer):
            return ours()

    with unchanged(model):
        found, expected = ours().scores, layered().scores
        off = ((found - expected).abs().amax(2) / expected.abs().amax(2)).max().item()
        assert off < 1e-4, f"scores off by {off:.1e} of a layer's largest"
        took = interleaved({"layered": layered, "ours": ours})
    note = f"{took['layered']:.2f} s / {took['ours']:.3f} s; largest difference {off:.0e}"
    row(name, took["layered"] / took["ours"], note)


@pytest.mark.skipif(DEVICE != "cpu" or not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's peak RSS")
@pytest.mark.parametrize("modality", ["text", "vision"])
def test_memory(modality, benchmark, row):
    def grown(which):
        command = [sys.executable, __file__, "memory", modality, which]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    base, ours = grown("released"), benchmark.pedantic(grown, args=("ours",), rounds=1)
    row(f"memory growth, {modality}", ours / base, f"{ours / 2**20:.0f} MiB / {base / 2**20:.0f} MiB")


def memory(modality, which):
    """Peak resident bytes beyond a model that has run once."""
    torch.set_num_threads(1)
    model, batch = (llama(), text_batch(56, 8)) if modality == "text" else (qwen_vl(), image_batch())
    baseline = released.released_igi if modality == "text" else released.released_ifi
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if name != "labels"})

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = resident("VmRSS")
    baseline(model, batch) if which == "released" else locate(model, batch, modality=modality)
    return resident("VmHWM") - before


# ------------------------------------------------------------------------------------------------------------ scaling

SCALES = {"layers": (4, 8, 16, 32), "steps": (4, 8, 16, 32), "tokens": (64, 128, 256, 512), "samples": (2, 4, 8, 16)}


@pytest.mark.parametrize("axis", SCALES)
def test_scaling(axis, benchmark, pytestconfig):
    """CPU seconds against one size at a time, the least of 3; exponents are slopes of log seconds: over all sizes, and
    between the two largest."""
    if not pytestconfig.getoption("locate_scaling"):
        pytest.skip("needs --locate-scaling PNG")
    taken = {"released": [], "default": []}
    for value in SCALES[axis]:
        at = dict(layers=8, steps=4, tokens=64, samples=1) | {axis: value}
        model = llama(at["layers"], 128, 384, 500)
        one = text_batch(at["tokens"] - 8, 8, 1, 500)
        many = text_batch(at["tokens"] - 8, 8, at["samples"], 500)
        calls = {
            "released": lambda m=model, b=one, at=at: [
                released.released_igi(m, b, at["steps"]) for _ in range(at["samples"])
            ],
            "default": lambda m=model, b=many, at=at: locate(m, b, n_steps=at["steps"]),
        }
        times = defaultdict(list)
        for _ in range(3):
            for name, call in calls.items():
                times[name].append(seconds(call))
        for name in calls:
            taken[name].append(min(times[name]))
    benchmark.pedantic(lambda: None, rounds=1)
    exponents = {name: [_slope(SCALES[axis], t), _slope(SCALES[axis][-2:], t[-2:])] for name, t in taken.items()}
    pytestconfig.locate_scaling[axis] = dict(sizes=SCALES[axis], seconds=taken, exponents=exponents)
    benchmark.extra_info["exponents"] = exponents


def _slope(sizes, times):
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    return round(statistics.linear_regression(x, y).slope, 2)


if __name__ == "__main__":
    if sys.argv[1:2] != ["memory"]:
        sys.exit(__doc__)
    print(json.dumps(memory(*sys.argv[2:])))
