"""s1 = sum_k w_k g_k (times a) and s2 = sum_k w_k g_k^2 of g = dY W, per group of rows; g is never written.

Tensor-core bound: 2 m R H F operations, the bytes of dY, W and the sums alone. One row of a tile's product is one
(step, row) of one group; the weights, the squares and the sum over a group's tile rows are the product's epilogue, so
that one accumulator serves both sums at any m, and s1 costs no product of its own. (Summing dY over the steps first
takes one product and not m, but of float32 rows: twelve times slower than bfloat16 ones, or three bfloat16 products.)
No atomics: a group's tiles write partial sums, which a second stage adds up in an order fixed by the shape alone.
"""

import math
import os

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# architecture -> 2- or 4-byte inputs -> tiles (rows, neurons, width, warps, pipeline stages), see choose_tile. Float32
# multiplies in float32: TF32 misses the accuracy rule (1.5e-3 of the largest s2 at H 1280), TF32x3 meets it in
# emulation but biases every square by 6e-7.
Tile = tuple[int, int, int, int, int]
TILES: dict[str, dict[int, list[Tile]]] = {
    "sm_80": {
        2: [(16, 64, 128, 4, 4), (64, 128, 64, 4, 3), (128, 128, 32, 8, 4), (128, 256, 64, 8, 3)],
        4: [(64, 64, 32, 8, 3)],
    },
    "sm_90": {
        2: [(16, 64, 128, 4, 4), (64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)],
        4: [(64, 64, 32, 8, 3)],
    },
    "sm_100": {
        2: [(16, 64, 128, 4, 4), (64, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)],
        4: [(64, 64, 32, 8, 3)],
    },
    "gfx942": {
        2: [(16, 64, 128, 4, 2), (64, 128, 64, 4, 2), (128, 128, 64, 8, 2), (128, 256, 64, 8, 2)],
        4: [(64, 64, 32, 8, 2)],
    },
    "interpreter": {2: [(128, 256, 512, 1, 1)], 4: [(128, 256, 512, 1, 1)]},  # it pays per program, not per element
}

# architectures that copy W's tiles by its tensor memory accelerator, where its rows are multiples of 16 bytes
TMA_ARCHITECTURES = {"sm_90", "sm_100"}

# Multiprocessors of an H100. A constant: the same input then gives the same bits on every GPU of an architecture.
ENOUGH_PROGRAMS = 132

# tiles of rows that share their tiles of W while these are in the L2 cache
SWIZZLE = 8


@triton.jit
def _write_sums(
    b_g, b_weights, p_rows, is_pair, p_s1, p_s2, o_out, is_out, first, neurons, stride_act_f,
    HAS_ACT: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The sums of the neurons from `first`, 64 at a time: all 256 of a tile at once do not fit into registers."""
    if BLOCK_F > 64:
        HALF: tl.constexpr = BLOCK_F // 2
        b_left, b_right = tl.split(tl.permute(tl.reshape(b_g, [BLOCK_T, 2, HALF]), (0, 2, 1)))
        _write_sums(
            b_left, b_weights, p_rows, is_pair, p_s1, p_s2, o_out, is_out, first, neurons, stride_act_f,
            HAS_ACT, SEGMENTS, BLOCK_T, HALF,
        )  # fmt: skip
        _write_sums(
            b_right, b_weights, p_rows, is_pair, p_s1, p_s2, o_out, is_out, first + HALF, neurons, stride_act_f,
            HAS_ACT, SEGMENTS, BLOCK_T, HALF,
        )  # fmt: skip
    else:
        o_f = first + tl.arange(0, BLOCK_F)
        is_neuron = o_f < neurons
        b_wg = b_weights[:, None] * b_g
        b_s2 = tl.sum(tl.reshape(b_wg * b_g, [SEGMENTS, BLOCK_T // SEGMENTS, BLOCK_F]), 1)
        if HAS_ACT:
            p_a = p_rows[:, None] + o_f.to(tl.int64)[None, :] * stride_act_f
            b_wg *= tl.load(p_a, mask=is_pair[:, None] & is_neuron[None, :], other=0.0).to(tl.float32)
        b_s1 = tl.sum(tl.reshape(b_wg, [SEGMENTS, BLOCK_T // SEGMENTS, BLOCK_F]), 1)
        mask = is_out[:, None] & is_neuron[None, :]
        tl.store(p_s1 + o_out[:, None] + o_f[None, :], b_s1, mask=mask)
        tl.store(p_s2 + o_out[:, None] + o_f[None, :], b_s2, mask=mask)


@triton.jit
def project_accumulate_kernel(
    p_grad, p_weight, p_weights, p_act, p_s1, p_s2,
    steps, groups, rows_per_group, splits, width, neurons,
    stride_grad_k, stride_grad_r, stride_grad_h, stride_weight_h, stride_weight_f, stride_act_r, stride_act_f,
    HAS_ACT: tl.constexpr, EVEN_H: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr,
    SWIZZLE: tl.constexpr, SPAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    SEGMENTS: tl.constexpr = BLOCK_T // SPAN
    neurons *= ALIGNED
    stride_weight_h = tl.cast(stride_weight_h, tl.int64) * ALIGNED
    tiles_t = tl.cdiv(groups, SEGMENTS) * splits
    tiles_f = tl.cdiv(neurons, BLOCK_F)
    i_band = tl.program_id(0) // (SWIZZLE * tiles_f)
    i_in_band = tl.program_id(0) % (SWIZZLE * tiles_f)
    band = tl.minimum(tiles_t - i_band * SWIZZLE, SWIZZLE)
    i_t = i_band * SWIZZLE + i_in_band % band
    i_f = i_in_band // band
    i_split = i_t % splits
    i_first = (i_t // splits) * SEGMENTS

    # tile row -> group, (step, row) pair within it; 64-bit from here on: m R H passes 2^31
    o_t = tl.arange(0, BLOCK_T)
    i_group = i_first + o_t // SPAN
    i_pair = i_split * SPAN + o_t % SPAN
    is_pair = (i_group < groups) & (i_pair < steps * rows_per_group)
    i_k = i_pair % steps
    i_r = i_group.to(tl.int64) * rows_per_group + i_pair // steps
    o_h = tl.arange(0, BLOCK_H)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    is_neuron = o_f < neurons

    o_dy = i_k.to(tl.int64) * stride_grad_k + i_r * stride_grad_r
    p_dy = p_grad + o_dy[:, None] + o_h[None, :] * tl.cast(stride_grad_h, tl.int64)
    if not TMA:
        p_w = p_weight + o_h.to(tl.int64)[:, None] * stride_weight_h + o_f.to(tl.int64)[None, :] * stride_weight_f
    b_g = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for i_h in range(0, tl.cdiv(width, BLOCK_H)):
        if EVEN_H:
            b_dy = tl.load(p_dy, mask=is_pair[:, None], other=0.0)
        else:
            is_h = o_h < width - i_h * BLOCK_H
            b_dy = tl.load(p_dy, mask=is_pair[:, None] & is_h[None, :], other=0.0)
        if TMA:
            b_w = p_weight.load([i_h * BLOCK_H, i_f * BLOCK_F])
        elif EVEN_H:
            b_w = tl.load(p_w, mask=is_neuron[None, :], other=0.0)
        else:
            b_w = tl.load(p_w, mask=is_h[:, None] & is_neuron[None, :], other=0.0)
        if UPCAST:  # the interpreter computes garbage in bf16
            b_dy = b_dy.to(tl.float32)
            b_w = b_w.to(tl.float32)
        b_g = tl.dot(b_dy, b_w, b_g, input_precision="ieee")
        p_dy += BLOCK_H * tl.cast(stride_grad_h, tl.int64)
        if not TMA:
            p_w += BLOCK_H * stride_weight_h

    i_out = i_first + tl.arange(0, SEGMENTS)
    o_out = (i_split.to(tl.int64) * groups + i_out) * neurons
    # not multiplied by ALIGNED above, as the others are: 64-bit, it would live in registers through the product
    _write_sums(
        b_g, tl.load(p_weights + i_k), p_act + i_r * stride_act_r * ALIGNED if HAS_ACT else i_r, is_pair,
        p_s1, p_s2, o_out, i_out < groups, i_f * BLOCK_F, neurons, stride_act_f, HAS_ACT, SEGMENTS, BLOCK_T, BLOCK_F,
    )  # fmt: skip


def project_accumulate(
    grad: torch.Tensor, weight: torch.Tensor, weights: torch.Tensor, act: torch.Tensor | None, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel.

    grad [m, R, H] float32, bfloat16 or float16; weight [H, F] of its dtype; weights [m] float32 contiguous; act [R, F]
    of any of these dtypes or None; any strides; R = groups * P. Returns s1, s2 [groups, F] float32. Nothing is checked
    here.
    """
    steps, rows, width = grad.shape
    neurons = weight.shape[1]
    pairs = steps * rows // groups
    # without this Triton launches on the current device and faults on a tensor of another one
    with torch.cuda.device_of(grad):
        tile = choose_tile(TILES[architecture()][grad.element_size()], groups * pairs, neurons)
        block_t, block_f, block_h, num_warps, num_stages = tile
        span = min(block_t, triton.next_power_of_2(pairs))
        splits = triton.cdiv(pairs, span)
        programs = triton.cdiv(groups, block_t // span) * splits * triton.cdiv(neurons, block_f)
        # rows of W need not be multiples of 16 bytes (F 3420): Triton must know of which power of two they are one,
        # or it copies single elements, and not asynchronously
        stride_act_r, stride_act_f = (0, 0) if act is None else act.stride()
        aligned = math.gcd(weight.stride(0), neurons, stride_act_r, 16)
        s1 = torch.empty(splits, groups, neurons, dtype=torch.float32, device=grad.device)
        s2 = torch.empty_like(s1)
        wide_rows = weight.stride(1) == 1 and (weight.stride(0) * weight.element_size() | weight.data_ptr()) % 16 == 0
        tma = wide_rows and architecture() in TMA_ARCHITECTURES
        p_weight = TensorDescriptor.from_tensor(weight, [block_h, block_f]) if tma else weight
        project_accumulate_kernel[(programs,)](
            grad, p_weight, weights, act, s1, s2,
            steps, groups, rows // groups, splits, width, neurons // aligned,
            *grad.stride(), weight.stride(0) // aligned, weight.stride(1), stride_act_r // aligned, stride_act_f,
            HAS_ACT=act is not None, EVEN_H=width % block_h == 0, TMA=tma, UPCAST=INTERPRETED, ALIGNED=aligned,
            SWIZZLE=SWIZZLE, SPAN=span, BLOCK_T=block_t, BLOCK_F=block_f, BLOCK_H=block_h,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if splits == 1:
        return s1[0], s2[0]
    return s1.sum(0), s2.sum(0)


def architecture() -> str:
    """The key of TILES for the current device: the newest of its vendor that is no newer."""
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return next(name for name in ("sm_100", "sm_90", "sm_80") if target.arch >= int(name[3:]) or name == "sm_80")


def choose_tile(tiles: list[Tile], pairs: int, neurons: int) -> Tile:
    """The first of `tiles` with room for all pairs, else the last that gives every multiprocessor a program."""
    for tile in tiles:
        if tile[0] >= pairs:
            return tile
    for tile in reversed(tiles):
        if triton.cdiv(pairs, tile[0]) * triton.cdiv(neurons, tile[1]) >= ENOUGH_PROGRAMS:
            return tile
    return tiles[0]
