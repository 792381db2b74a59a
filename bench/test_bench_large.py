"""Whole searches at the shapes of Qwen2.5-VL 3B and 7B, random bfloat16 weights, against the released code on the same
GPU: text 32 samples in a batch, vision 8 pictures of 1024 patches, the released code its one sample at a time.

A ratio is the released code's seconds over ours, per sample, means of 2 interleaved rounds. Before a time is taken,
our scores (in that batch, by our shortcuts) must be as close to a float32 search as native replay in bfloat16 is, one
sample at a time; that the released preset computes what the baseline does is test_bench_locate's to show, in float32.
That the baseline costs no more than the passes it is made of is asserted last: a row is worth reading even then.

Every row goes on with where the time goes: FLOP/s (of the cost model's FLOPs) and their share of this GPU's bfloat16
matmul rate, our seconds over the cost model's floor on this GPU, the share of the time in which no kernel runs, peak
memory beside the cost model's, and the kernels that take longest.

One sample of the released code is .4 (3B, text) to 3 s (7B, vision) of an H200 at its matmul rate, so it is run whole.
The budget, both sizes together, at a third of that rate: it 50 s, ours 100 s at twice its floor, float32 25 s, making
the models and compiling 35 s; 210 s. --large-dry walks the same way at toy sizes, on a CPU in seconds.
"""

import math
import statistics
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

sys.path.insert(0, str(Path(__file__).parent))
import fixed  # noqa: E402
import released  # noqa: E402
from fixed import locate  # noqa: E402
from profile_ops import MODELS, PROFILED, SIZES, VISION, text_sizes  # noqa: E402
from test_bench_locate import DEVICE, assert_lean, image_batch, seconds, text_batch  # noqa: E402

from mipfast.scoring import nodes  # noqa: E402
from mipfast.scoring.cost import Device, estimate  # noqa: E402

GPU = DEVICE == "cuda"
ROUNDS = 2
SAMPLES = {"text": 32, "vision": 8}
TARGETS = {"text": 15, "vision": 5}
FLOOR = 2  # our seconds over the cost model's, at most
# a row of MODELS, and of SIZES
TOY = (64, 160, 3, 4, 2, 500)
TOY_SIZES = {"text": dict(prompt=12, answer=4), "vision": dict(prompt=8, answer=4, patches=64)}
GLOBAL = [7, 15, 23, 31]  # blocks of the tower without windows
TOY_VISION = dict(depth=4, hidden_size=64, intermediate_size=172, num_heads=4, fullatt_block_indexes=[1, 3])


def random_model(name, dry):
    """Made where it will run, in bfloat16 from the start."""
    text = text_sizes(TOY if dry else MODELS[name])
    hidden, pair = text["hidden_size"], text["hidden_size"] // text["num_attention_heads"] // 2
    config = Qwen2_5_VLConfig(
        text_config=text
        | dict(
            rope_theta=1e6,
            rope_scaling=dict(type="mrope", mrope_section=[pair // 4, pair * 3 // 8, pair * 3 // 8]),
            bos_token_id=1,
            eos_token_id=2,
        ),
        vision_config=(TOY_VISION if dry else VISION | dict(fullatt_block_indexes=GLOBAL))
        | dict(out_hidden_size=hidden, patch_size=14, spatial_merge_size=2, window_size=112),
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=text["vocab_size"] - 1,
        tie_word_embeddings=name.endswith("3B"),
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def dry(pytestconfig):
    dry = pytestconfig.getoption("large_dry")
    if not (GPU or dry):
        pytest.skip("needs a GPU, or --large-dry for toy sizes")
    return dry


@pytest.fixture(scope="module")
def rates(dry):
    """This GPU's rates, as the cost model takes them."""
    return Device.measured(DEVICE, torch.bfloat16)


@pytest.fixture(scope="module", params=PROFILED)
def named_model(request, dry):
    return request.param, random_model(request.param, dry)


@contextmanager
def float32(model):
    """The same weights, exactly, there and back. Buffers stay: rotary frequencies are float32 already."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()


def assert_close(monkeypatch, model, batch, one, modality):
    """Our scores of the first sample, in its batch, are at most twice as far from float32 as those of native replay in
    bfloat16, of it alone: means over layers of |difference| / |scores|. Both errors, and the share of native replay's
    path that is on ours.

    Ours comes first: what it measures of memory holds for the model from then on."""
    ours = locate(model, batch, modality=modality)
    with monkeypatch.context() as patch:
        patch.setattr(nodes, "plan", lambda capture, clean_states: (capture, None))
        native = locate(model, one, modality=modality)
        with float32(model):
            exact = locate(model, one, modality=modality).scores[0]

    def error(found):
        return ((found.scores[0] - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()

    off, allowed = error(ours), 2 * error(native)
    assert off <= allowed, f"scores off by {off:.1e} of float32's, native replay by {allowed / 2:.1e}"
    shared = (ours.path[0][:, :, None] == native.path[0][:, None]).any(-1).double().mean().item()
    return dict(error=off, native_error=allowed / 2, path_shared=shared)


def kernels(call):
    """({kernel: seconds}, GiB allocated at the peak) of one call. On a CPU, of ops, those inside others counted twice
    and no memory: a walk only."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as result:
        seconds(call)
    taken = Counter()
    for event in result.profiler.kineto_results.events():  # key_averages() takes minutes over so many
        if event.device_type() == (DeviceType.CUDA if GPU else DeviceType.CPU):
            taken[event.name()] += event.duration_ns() / 1e9
    assert taken, "the profiler saw no kernel"
    return taken, torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0


@pytest.mark.parametrize("modality", TARGETS)
def test_large(modality, named_model, dry, rates, monkeypatch, pytestconfig):
    name, model = named_model
    sizes, samples = (TOY_SIZES if dry else SIZES)[modality], SAMPLES[modality]
    words = model.config.text_config.vocab_size
    if modality == "text":
        batch, search = text_batch(**sizes, samples=samples, words=words), released.released_igi
        one, blocks = {key: value[:1] for key, value in batch.items()}, model.get_decoder().layers
    else:
        batch, search = image_batch(**sizes, samples=samples, words=words), released.released_ifi
        one, blocks = {key: value[: len(value) // samples] for key, value in batch.items()}, model.model.visual.blocks
    found = assert_close(monkeypatch, model, batch, one, modality)

    calls = {
        "released": lambda: search(model, one),  # warmed up in the first round, ours above
        "ours": lambda: locate(model, batch, modality=modality),
    }
    times = defaultdict(list)
    for _ in range(ROUNDS):
        for key, call in calls.items():
            times[key].append(seconds(call))
    theirs, ours = (statistics.mean(times[key]) for key in calls)
    config = fixed.config(modality)
    cost = estimate(model, **sizes, samples=samples, batch_size=samples, config=config, device=rates)
    flop_per_s = sum(cost.flops.values()) / ours
    row = dict(
        name=f"{name}, {modality}, {samples} per batch{', toy sizes' * dry}",
        ratio=samples * theirs / ours,
        target=TARGETS[modality],
        released_seconds=theirs,
        seconds=ours / samples,
        rounds=times,
        flop_per_s=flop_per_s,
        matmul_share=flop_per_s / rates.flops,
        over_floor=ours / sum(cost.seconds.values()),
        over_floor_target=FLOOR,
        modelled_gib=cost.memory / 2**30,
        **found,
    )
    pytestconfig.large_rows.append(row)
    taken, peak = kernels(calls["ours"])
    busy = sum(taken.values())  # of kernels alone, which the profiler does not slow down: the clock is the plain run's
    top = {kernel: seconds / busy for kernel, seconds in taken.most_common(5)}
    row |= dict(launch_gaps=1 - busy / ours, peak_gib=peak, kernels=top)
    assert_lean(search, model, one, [block.mlp.down_proj for block in blocks], math.inf if dry else 0.15)
