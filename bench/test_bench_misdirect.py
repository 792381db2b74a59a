"""RMisU's step against the released procedure, on random weights.

The released code copies the model, freezes it except for the path's gate and up rows (every such projection split in
two), and runs three whole forward passes with labels per step: forget, retain, and retain through the copy.
"all gradients" is the same with nothing frozen, as a plain RMU loop has it. The loss looks at every token; "last
prompt" is our default, one token per sample, in both. Before a time is taken, losses and the rows' gradients agree.

A step's time is that of five steps less that of one, CPU time of this process, the least of some rounds. Memory is a
model's bytes and what three steps add to them at their peak, each in a process of its own.

    python bench/test_bench_misdirect.py memory ours|released|"all gradients" layers hidden        in bytes
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from test_bench_locate import DEVICE, WORDS, llama, seconds  # noqa: E402

from mipfast import RMisUConfig, find_sites, hidden_states, misdirect, ops, steering_target  # noqa: E402
from mipfast.edit.misdirect import trainable_parts  # noqa: E402
from mipfast.edit.train import training  # noqa: E402

LAYER, LR = 7, 1e-4
PROCEDURES = ("released", "all gradients")
# (layers, hidden): the released code's models have 28 to 36 layers; with 12, layer 7 is `misdirect`'s own choice
SHAPES = {"layer 7 of 32": (32, 256), "layer 7 of 12": (12, 512)}
# (floor, target) of the ratio. With 12 layers two thirds of the blocks run on either side: 2.2 is what is left there
GOAL = (4, 4.5)
MEMORY_GOAL = (0.6, 0.5)


def model_of(layers, hidden):
    return llama(layers, hidden, 3 * hidden)


def batch(seed, samples=4, prompt=56, answer=8):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, WORDS - 1, (samples, prompt + answer), generator=generator)
    labels = ids.clone()
    labels[:, :-answer] = -100
    found = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    return {name: value.to(DEVICE) for name, value in found.items()}


def path_of(model, fraction=0.1):
    """The same share of random neurons up to the steering layer."""
    text, generator = find_sites(model).text, torch.Generator().manual_seed(2)
    count = round(fraction * text.num_neurons)
    return {
        (text.name, layer): torch.randperm(text.num_neurons, generator=generator)[:count].sort().values
        for layer in range(LAYER + 1)
    }


def config_of(positions, steps):
    return RMisUConfig(layer=LAYER, steps=steps, lr=LR, positions=positions)


class Split(nn.Module):
    """A projection in two: the rows that train, and the frozen rest."""

    def __init__(self, projection, rows):
        super().__init__()
        mask = torch.ones(projection.out_features, dtype=torch.bool)
        mask[rows] = False
        self.rows, self.rest = rows, mask.nonzero().flatten()
        self.trained = nn.Parameter(projection.weight[self.rows].detach().clone())
        self.frozen = nn.Parameter(projection.weight[self.rest].detach().clone(), requires_grad=False)
        self.whole = projection

    def forward(self, x):
        out = torch.zeros(*x.shape[:-1], len(self.rows) + len(self.rest), device=x.device, dtype=x.dtype)
        out[..., self.rows] = nn.functional.linear(x, self.trained)
        out[..., self.rest] = nn.functional.linear(x, self.frozen)
        return out


class Released:
    """The released procedure on one forget and one retain batch; changes the model for good."""

    def __init__(self, model, path, target, positions, everything=False):
        self.model, self.target, self.positions = model, target, positions
        self.copy = copy.deepcopy(model).requires_grad_(False)
        model.requires_grad_(everything)
        if not everything:
            for (_, layer), rows in path.items():
                mlp = model.model.layers[layer].mlp
                mlp.gate_proj, mlp.up_proj = Split(mlp.gate_proj, rows), Split(mlp.up_proj, rows)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)

    def hidden(self, model, batch, grad):
        """Of every token, or of those that predict the first label: [T,D]."""
        kept = []
        handle = model.model.layers[LAYER].register_forward_hook(lambda module, args, out: kept.append(out))
        with torch.set_grad_enabled(grad):
            model(**batch)
        handle.remove()
        states = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        if self.positions == "all":
            return states.flatten(0, 1)
        first = (batch["labels"] != -100).int().argmax(1) - 1
        return states[torch.arange(len(first)), first]

    def losses(self, forget, retain):
        away = self.hidden(self.model, forget, True)
        stayed, before = self.hidden(self.model, retain, True), self.hidden(self.copy, retain, False)
        mse = nn.functional.mse_loss
        return mse(away, self.target.expand_as(away)), mse(stayed, before)

    def step(self, forget, retain):
        self.optimizer.zero_grad()
        away, held = self.losses(forget, retain)
        (0.5 * away + 0.5 * held).backward()
        self.optimizer.step()
        return away.item(), held.item()


def target_of(model, positions, forget, retain):
    with torch.no_grad():
        states = [hidden_states(model, b, LAYER, positions) for b in (forget, retain)]
    return steering_target(config_of(positions, 1), *states)


def assert_same(shape, positions, forget, retain):
    """Equal losses and equal gradients of the trained rows, after one step that moved the retain set too."""
    model = model_of(*shape)
    path, target = path_of(model), target_of(model, positions, forget, retain)
    with torch.no_grad():
        before = hidden_states(model, retain, LAYER, positions)
    released = Released(model, path, target, positions)
    assert released.step(forget, retain)[1] == 0
    away, held = released.losses(forget, retain)
    released.optimizer.zero_grad()
    (0.5 * away + 0.5 * held).backward()
    ours, sites = model_of(*shape), find_sites(model)
    wanted = []
    for (_, layer), rows in path.items():
        for name in ("gate_proj", "up_proj"):
            split = getattr(model.model.layers[layer].mlp, name)
            with torch.no_grad():
                getattr(ours.model.layers[layer].mlp, name).weight[rows] = split.trained
            wanted.append(split.trained.grad)
    sites = find_sites(ours)
    with training(ours, trainable_parts(path, sites, "path")) as leaves:
        mine = [
            ops.misdirection_loss(hidden_states(ours, forget, LAYER, positions), target),
            ops.misdirection_loss(hidden_states(ours, retain, LAYER, positions), before),
        ]
        (0.5 * mine[0] + 0.5 * mine[1]).backward()
        torch.testing.assert_close(torch.stack(mine), torch.stack([away, held]), rtol=1e-4, atol=0)
        found = [leaf.tensor.grad for leaf in leaves if leaf.tensor.shape == wanted[0].shape]
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.fixture
def row(benchmark, pytestconfig):
    def add(name, ratio, goal, note):
        floor, target = goal
        entry = dict(name=name, ratio=round(ratio, 3), floor=floor, target=target, note=note, load=os.getloadavg()[0])
        pytestconfig.locate_rows.append(entry)
        benchmark.extra_info[name] = entry

    return add


@pytest.mark.parametrize("positions", ["last_prompt", "all"])
@pytest.mark.parametrize("name", SHAPES)
def test_step(name, positions, benchmark, row, rounds=3):
    shape, forget, retain = SHAPES[name], batch(1), batch(2)
    assert_same(shape, positions, forget, retain)
    model = model_of(*shape)
    path, target = path_of(model), target_of(model, positions, forget, retain)
    procedures = {
        which: Released(model_of(*shape), path, target, positions, which == "all gradients") for which in PROCEDURES
    }
    taken = {which: [] for which in (*PROCEDURES, "ours")}

    def steps(count):
        return seconds(lambda: misdirect(model, path, [forget], [retain], config_of(positions, count)))

    def others():
        for which, procedure in procedures.items():
            taken[which].append(seconds(lambda p=procedure: p.step(forget, retain)))

    def ours():
        taken["ours"].append((steps(5) - steps(1)) / 4)

    others()
    taken = {which: [] for which in taken}
    benchmark.pedantic(ours, setup=others, rounds=rounds)
    best = {which: min(times) for which, times in taken.items()}
    for which in PROCEDURES:
        note = f"{best[which]:.3f} s / {best['ours']:.3f} s"
        row(f"step, {name}, {positions}, {which}", best[which] / best["ours"], GOAL, note)


@pytest.mark.skipif(DEVICE != "cpu" or not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's peak RSS")
@pytest.mark.parametrize("name", SHAPES)
def test_memory(name, benchmark, row):
    def peak(which):
        command = [sys.executable, __file__, "memory", which, *map(str, SHAPES[name])]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    base = {which: peak(which) for which in PROCEDURES}
    ours = benchmark.pedantic(peak, args=("ours",), rounds=1)
    for which, theirs in base.items():
        note = f"{ours / 2**20:.0f} MiB / {theirs / 2**20:.0f} MiB"
        row(f"peak memory, {name}, {which}", ours / theirs, MEMORY_GOAL, note)


def memory(which, layers, hidden):
    """The model's bytes and the peak growth of this process over three steps."""
    torch.set_num_threads(1)
    model, forget, retain = model_of(layers, hidden), batch(1), batch(2)
    path, target = path_of(model), target_of(model, "last_prompt", forget, retain)  # runs the model once

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = resident("VmRSS")
    if which == "ours":
        misdirect(model, path, [forget], [retain], config_of("last_prompt", 3))
    else:
        released = Released(model, path, target, "last_prompt", which == "all gradients")
        for _ in range(3):
            released.step(forget, retain)
    return resident("VmHWM") - before + sum(p.numel() * p.element_size() for p in model_of(layers, hidden).parameters())


if __name__ == "__main__":
    if sys.argv[1:2] != ["memory"]:
        sys.exit(__doc__)
    print(memory(sys.argv[2], *map(int, sys.argv[3:])))
