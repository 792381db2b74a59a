"""Where locate and a misdirection step spend time and memory, as Markdown: docs/profile.md is its output, with words.

    python bench/profile_ops.py

On paper, FLOPs and bytes at the shapes of Qwen2.5-VL-3B and 7B, and hours and memory up to 72B; measured,
torch.profiler on the scaled-down models of test_bench_locate.py; and locate's seconds with each of our kernels replaced
by its reference, interleaved.
"""

import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Qwen2_5_VLConfig

sys.path.insert(0, str(Path(__file__).parent))
import fixed  # noqa: E402
from fixed import locate  # noqa: E402
from test_bench_locate import image_batch, llama, qwen_vl, text_batch  # noqa: E402

from mipfast import NeuronPath, misdirect, ops  # noqa: E402
from mipfast.edit.config import RMisUConfig  # noqa: E402
from mipfast.ops import frozen_linear  # noqa: E402
from mipfast.scoring.cost import DEVICES, Shape, estimate  # noqa: E402

OPS = (
    "riemann_interpolate",
    "riemann_accumulate",
    "project_accumulate",
    "riemann_project",
    "swiglu",
    "misdirection_loss",
)
PRODUCTS = "linear"
# (hidden, neurons, layers, heads, key-value heads, words) of the language model; the vision tower is the same in both
MODELS = {
    "Qwen2.5-VL-3B": (2048, 11008, 36, 16, 2, 151936),
    "Qwen2.5-VL-7B": (3584, 18944, 28, 28, 4, 152064),
    "Qwen2.5-VL-32B": (5120, 27648, 64, 40, 8, 152064),
    "Qwen2.5-VL-72B": (8192, 29568, 80, 64, 8, 152064),
}
VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
PROFILED = ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B")
PROMPT, ANSWER, PATCHES = 256, 16, 1024
ROUNDS = 5


def text_sizes(row):
    """A row of MODELS in the words of a text_config."""
    hidden, neurons, layers, heads, kv_heads, words = row
    return dict(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )


def shape(model):
    text = text_sizes(MODELS[model])
    vision = VISION | dict(out_hidden_size=text["hidden_size"])
    return Shape.of(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


# --------------------------------------------------------------------------------------------------------- on paper


def on_paper(name):
    """Per op and for the whole: FLOPs, bytes, and an H200's floor in ms, of one sample."""
    model, device = shape(name), DEVICES["H200"]
    size, text, vision = model.element_size, model.text, model.vision
    rows = []

    def add(part, flops, moved):
        rows.append((part, flops, moved, 1e3 * max(flops / device.flops, moved / device.bandwidth)))

    def ours(modality, tower, positions, interpolated, accumulated):
        """Every layer interpolates twice, to score a block and to advance over it, by one product at any m."""
        product, weight = 2 * positions * tower.hidden * tower.neurons, tower.hidden * tower.neurons * size
        outputs = interpolated * positions * tower.hidden * size
        add(f"{modality}: riemann_project", 2 * tower.layers * product, 2 * tower.layers * (weight + outputs))
        per_layer = accumulated * product, weight + accumulated * positions * tower.hidden * size
        add(f"{modality}: project_accumulate", tower.layers * per_layer[0], tower.layers * per_layer[1])

    for modality, tower, positions, steps in (("text", text, 1, (4, 4)), ("vision", vision, PATCHES, (1, 2))):
        patches = PATCHES if modality == "vision" else 0
        whole = estimate(model, prompt=PROMPT, answer=ANSWER, patches=patches, config=fixed.config(modality))
        first = len(rows)
        ours(modality, tower, positions, *steps)
        # as if all products were this tower's: rows a pass, of which one in two goes backward, 3 or 5 tensors each
        row_passes = sum(whole.flops.values()) / (2 * tower.block)
        add(f"{modality}: swiglu", 0, row_passes * (3 + 5) / 2 * tower.neurons * size)
        add(f"{modality}: locate", sum(whole.flops.values()), sum(whole.bytes.values()))
        rows[-1] = (*rows[-1][:3], 1e3 * sum(whole.seconds.values()))
        yield rows[first:]
    first, layers, tokens = len(rows), 3 * text.layers // 5 + 1, 2 * (PROMPT + ANSWER)
    add("RMisU: misdirection_loss", 0, 2 * 3 * text.hidden * size)
    # forward, input gradients, and the gradients of a tenth of the FFNs' weights: the path's slices
    products = 2 * tokens * layers * (2 * text.block + 0.1 * 3 * text.hidden * text.neurons)
    add("RMisU: one step", products, 3 * layers * text.block * size)
    yield rows[first:]


def print_on_paper():
    for name in PROFILED:
        text = shape(name).text
        ffn = 3 * text.hidden * text.neurons / text.block
        print(f"\n{name}: a text block's products are {ffn:.0%} FFN, {1 - ffn:.0%} attention projections\n")
        print("| | GFLOP | GB | H200 floor, ms | share |\n|---|---:|---:|---:|---:|")
        for rows in on_paper(name):
            whole = rows[-1][3]
            for part, flops, moved, ms in rows:
                print(f"| {part} | {flops / 1e9:.1f} | {moved / 1e9:.2f} | {ms:.3g} | {ms / whole:.2%} |")


# ------------------------------------------------------------------------------------------------- hours and memory

SAMPLES, BATCH = 1000, 32
# text: a prompt of 104 tokens, 24 labels; vision: 35 tokens around a picture of 1024 patches, 24 labels
SIZES = {"text": dict(prompt=104, answer=24), "vision": dict(prompt=35, answer=24, patches=1024)}


def released_seconds(model, modality, prompt, answer, patches=0, steps=4):
    """The floor of the released procedure on an H200, one sample: per layer forward, input and weight gradients of
    `steps` whole copies, the head over every token. All of it at the matmul rate, which its 512 rows reach."""
    text, vision, tokens = model.text, model.vision, prompt + answer + patches // model.merge
    products = tokens * (text.layers * (text.block + 2 * tokens * text.hidden) + model.head)
    if patches:
        products += vision.layers * patches * (vision.block + 2 * patches * vision.hidden)
    layers = vision.layers if modality == "vision" else text.layers
    return layers * steps * 3 * 2 * products / DEVICES["H200"].flops


def duration(seconds):
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def print_hours():
    print("\n| | weights | text: ours | released | memory | vision: ours | released | memory |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in MODELS:
        model = shape(name)
        weights = model.weights * model.element_size / 1e9
        cells = [name, f"{weights:.0f} GB"]
        for modality, sizes in SIZES.items():
            config = fixed.config(modality)
            ours = estimate(model, **sizes, samples=SAMPLES, batch_size=BATCH, config=config)
            one = estimate(model, **sizes, config=config)
            plain = SAMPLES * released_seconds(model, modality, **sizes)
            memory = f"{one.memory / 1e9:.0f} to {ours.memory / 1e9:.0f} GB"
            cells += [duration(sum(ours.seconds.values())), duration(plain), memory]
        print(f"| {' | '.join(cells)} |")


# --------------------------------------------------------------------------------------------------------- measured


KINDS = {"mlp": "FFN", "self_attn": "attention", "attn": "attention", "lm_head": "head", "head": "head"}


@contextmanager
def labelled(model):
    """A profiler range `part:...` around every FFN, attention, norm and head of the model, and one around our ops."""
    open_ranges, hooks = [], []

    def enter(part):
        def hook(*_):
            open_ranges.append(record_function(f"part:{part}"))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_):
        open_ranges.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        part = KINDS.get(last) or ("norm" if "norm" in last else None)
        if part:
            hooks += [module.register_forward_pre_hook(enter(part)), module.register_forward_hook(leave)]

    def ranged(name, op):
        def call(*args, **kwargs):
            with record_function(f"mipfast::{name}"):
                return op(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for name in OPS:
            patches.enter_context(mock.patch.object(ops, name, ranged(name, getattr(ops, name))))
        # torch sees nothing of our products: the name makes their time the part's that asked for them
        product = record_function("product")(frozen_linear._product)
        patches.enter_context(mock.patch.object(frozen_linear, "_product", product))
        yield
    for hook in hooks:
        hook.remove()


def shares(run, model):
    """({part: share of the CPU time torch spends}, {op: share of peak memory}) of one run."""
    run()
    with labelled(model), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as result:
        run()
    events = result.events()
    forward = {}  # sequence number of a forward op -> its part, for the backward op that autograd makes of it
    taken = defaultdict(float)
    for event in events:
        if event.sequence_nr >= 0 and not _within(event, "autograd::engine::evaluate_function"):
            forward.setdefault(event.sequence_nr, _part(event))
    for event in events:
        if event.name.startswith("part:"):
            continue
        backward = _within(event, "autograd::engine::evaluate_function")
        if op := next((a.name for a in _line(event) if a.name.startswith("mipfast::")), None):
            part = op.removeprefix("mipfast::")
        elif backward:
            numbers = [a.sequence_nr for a in _line(event) if a.sequence_nr >= 0]
            part = f"{forward.get(numbers[0], 'rest') if numbers else 'rest'}, backward"
        else:
            part = f"{_part(event)}, forward"
        taken[part] += event.self_cpu_time_total
    whole = sum(taken.values())
    return {part: seconds / whole for part, seconds in taken.items()}, _memory(result)


def _line(event):
    while event is not None:
        yield event
        event = event.cpu_parent


def _within(event, name):
    return any(ancestor.name.startswith(name) for ancestor in _line(event))


def _part(event):
    return next((a.name.removeprefix("part:") for a in _line(event) if a.name.startswith("part:")), "rest")


def _memory(result):
    """{op: most memory it holds beyond what was there, as a share of the run's peak}"""
    level = peak = 0
    inside, held = [], defaultdict(int)
    for event in sorted(result.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name().startswith("mipfast::"):
            inside.append((event.name().removeprefix("mipfast::"), event.start_ns() + event.duration_ns(), level))
        elif event.name() == "[memory]":
            inside = [span for span in inside if span[1] >= event.start_ns()]
            level += event.nbytes()
            peak = max(peak, level)
            for op, _, before in inside:
                held[op] = max(held[op], level - before)
    return {op: size / peak for op, size in held.items()}


def print_measured(title, run, model):
    time_shares, memory_shares = shares(run, model)
    print(f"\n{title}\n\n| part | time | peak memory |\n|---|---:|---:|")
    for part, share in sorted(time_shares.items(), key=lambda item: -item[1]):
        if share >= 0.0005:
            memory = f"{memory_shares[part]:.1%}" if part in memory_shares else ""
            print(f"| {part} | {share:.1%} | {memory} |")


# ------------------------------------------------------------------------------------------------ before and after


@contextmanager
def by_reference(names):
    """These ops by the reference, the others as always: swiglu by the two torch ops that the model itself calls, frozen
    products by torch's."""

    def slow(function):
        def call(*args, **kwargs):
            with ops.backend("reference"):
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in names:
            if name == PRODUCTS:
                stack.enter_context(mock.patch.object(frozen_linear, "_faster", lambda: False))
                continue
            replaced = (lambda gate, up: F.silu(gate) * up) if name == "swiglu" else slow(getattr(ops, name))
            stack.enter_context(mock.patch.object(ops, name, replaced))
        yield


def print_before_and_after(title, run):
    kernels = (PRODUCTS, *OPS)
    variants = {"all": kernels} | {name: (name,) for name in kernels} | {"none": ()}
    taken = defaultdict(list)
    for _ in range(ROUNDS + 1):
        for name, switched in variants.items():
            with by_reference(switched):
                start = time.process_time()
                run()
                taken[name].append(time.process_time() - start)
    ours = statistics.median(taken["none"][1:])
    spread = max(taken["none"][1:]) / min(taken["none"][1:]) - 1
    print(f"\n{title}: {ours:.3f} s with our kernels, spread {spread:.0%}; with the reference instead:\n")
    print("| op by reference | seconds | before / after |\n|---|---:|---:|")
    for name in (*kernels, "all"):
        seconds = statistics.median(taken[name][1:])
        print(f"| {name} | {seconds:.3f} | {seconds / ours:.3f} |")


def main():
    torch.set_num_threads(1)
    print("## On paper")
    print_on_paper()
    print("\n## Hours and memory, 3B to 72B")
    print_hours()
    language, multimodal = llama(), qwen_vl()
    text, image = text_batch(56, 8), image_batch()
    path = NeuronPath.select(locate(language, text), 0.1)
    step = RMisUConfig(steps=1)
    runs = {
        "locate, text": (language, lambda: locate(language, text)),
        "locate, vision": (multimodal, lambda: locate(multimodal, image, modality="vision")),
        "one RMisU step": (language, lambda: misdirect(language, path, [text], [text], step)),
    }
    print("\n## Measured, CPU, one thread, float32")
    for title, (model, run) in runs.items():
        print_measured(title, run, model)
    print("\n## Before and after")
    for title, (_, run) in runs.items():
        print_before_and_after(title, run)


if __name__ == "__main__":
    main()
