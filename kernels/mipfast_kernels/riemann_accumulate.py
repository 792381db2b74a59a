"""s1 = sum_k w_k g_k (times a) and s2 = sum_k w_k g_k^2 in one read of the gradient, per group of rows.

Memory bound: steps * R * F elements are read once, two fp32 rows per group are written. No atomics (scores
feed a top-k, so two runs must agree to the bit): long groups are split over programs and their partial sums
added up by a second stage whose order is fixed by the shape alone.
"""

import math

import torch
import triton
import triton.language as tl

# dtype -> (neurons per program, warps): 16 bytes per thread and load, the widest a GPU load instruction takes
TILES = {torch.float32: (512, 4), torch.bfloat16: (1024, 4), torch.float16: (1024, 4)}

# Below this many programs a group's rows are split; about 4 per multiprocessor of the largest current parts
# (148). A constant rather than the device's own count: the same input then gives the same bits on every GPU.
ENOUGH_PROGRAMS = 592


@triton.jit
def riemann_accumulate_kernel(
    p_grad, p_weights, p_act, p_s1, p_s2,
    steps, groups, rows_per_group, rows_per_split, neurons,
    stride_grad_k, stride_grad_r, stride_grad_f, stride_act_r, stride_act_f,
    HAS_ACT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    neurons *= ALIGNED
    # 64-bit from here on: R * F passes 2^31 at 113,360 rows of 18944 neurons, and is the stride of a step
    stride_grad_k = tl.cast(stride_grad_k, tl.int64) * ALIGNED
    stride_grad_r = tl.cast(stride_grad_r, tl.int64) * ALIGNED
    stride_act_r = tl.cast(stride_act_r, tl.int64) * ALIGNED
    i_group = (tl.program_id(0) % groups).to(tl.int64)
    i_split = (tl.program_id(0) // groups).to(tl.int64)
    o_f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = o_f < neurons

    b_s1 = tl.zeros([BLOCK_F], tl.float32)
    b_s2 = tl.zeros([BLOCK_F], tl.float32)
    b_lost1 = tl.zeros([BLOCK_F], tl.float32)
    b_lost2 = tl.zeros([BLOCK_F], tl.float32)
    first = i_split * rows_per_split
    for i_p in range(first, tl.minimum(first + rows_per_split, rows_per_group)):
        i_r = i_group * rows_per_group + i_p
        p_row = p_grad + i_r * stride_grad_r + o_f * stride_grad_f
        b_row1 = tl.zeros([BLOCK_F], tl.float32)
        b_row2 = tl.zeros([BLOCK_F], tl.float32)
        for i_k in range(steps):
            # upcast before any arithmetic: the interpreter computes garbage in bf16
            b_g = tl.load(p_row, mask=mask, other=0.0).to(tl.float32)
            b_wg = tl.load(p_weights + i_k) * b_g
            b_row1 += b_wg
            b_row2 += b_wg * b_g
            p_row += stride_grad_k
        if HAS_ACT:
            p_a = p_act + i_r * stride_act_r + o_f * stride_act_f
            b_row1 *= tl.load(p_a, mask=mask, other=0.0).to(tl.float32)
        # Kahan: a plain fp32 chain over the thousands of rows of a vision group loses about sqrt(rows) ulps
        b_y1 = b_row1 - b_lost1
        b_next1 = b_s1 + b_y1
        b_lost1 = (b_next1 - b_s1) - b_y1
        b_s1 = b_next1
        b_y2 = b_row2 - b_lost2
        b_next2 = b_s2 + b_y2
        b_lost2 = (b_next2 - b_s2) - b_y2
        b_s2 = b_next2

    o_out = (i_split * groups + i_group) * neurons + o_f
    tl.store(p_s1 + o_out, b_s1, mask=mask)
    tl.store(p_s2 + o_out, b_s2, mask=mask)


def riemann_accumulate(
    grad: torch.Tensor, weights: torch.Tensor, act: torch.Tensor | None, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel.

    grad [m, R, F] float32, bfloat16 or float16, any strides; weights [m] float32 contiguous; act [R, F] of
    any of these dtypes, any strides, or None; R = groups * P. Returns s1, s2 [groups, F] float32. Nothing is
    checked here.
    """
    steps, rows, neurons = grad.shape
    rows_per_group = rows // groups
    block_f, num_warps = TILES[grad.dtype]
    blocks = triton.cdiv(neurons, block_f)
    splits = min(rows_per_group, triton.cdiv(ENOUGH_PROGRAMS, groups * blocks))
    rows_per_split = triton.cdiv(rows_per_group, splits)
    splits = triton.cdiv(rows_per_group, rows_per_split)

    s1 = torch.empty(splits, groups, neurons, dtype=torch.float32, device=grad.device)
    s2 = torch.empty_like(s1)
    stride_act_r, stride_act_f = (0, 0) if act is None else act.stride()
    stride_k, stride_r, stride_f = grad.stride()
    # rows that are no multiples of 16 bytes (F 3420): Triton must know of which power of two, or it reads one element
    aligned = math.gcd(stride_k, stride_r, stride_act_r, neurons, 16)
    # without this Triton launches on the current device and faults on a tensor of another one
    with torch.cuda.device_of(grad):
        riemann_accumulate_kernel[(splits * groups, blocks)](
            grad, weights, act, s1, s2,
            steps, groups, rows_per_group, rows_per_split, neurons // aligned,
            stride_k // aligned, stride_r // aligned, stride_f, stride_act_r // aligned, stride_act_f,
            HAS_ACT=act is not None, ALIGNED=aligned, BLOCK_F=block_f, num_warps=num_warps,
        )  # fmt: skip
    if splits == 1:
        return s1[0], s2[0]
    return s1.sum(0), s2.sum(0)
