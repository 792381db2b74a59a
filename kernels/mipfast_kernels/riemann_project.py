"""The projections W a of interpolated rows, by linearity: y + (alpha_k - 1) sum_j a_j W_j over the neurons j that a row
names, of y = W a, one product at any number of steps.

Memory bound: y is read once, steps * R * H elements are written, and the k columns of W that a row names gathered (rows
of one sample name the same, which a tile's rows then find in the L1 cache). Every element is written by one program, so
two runs agree to the bit.
"""

import math

import torch
import triton
import triton.language as tl

# dtype -> (rows, outputs per program, warps): 16 bytes per thread and store
TILES = {torch.float32: (4, 128, 4), torch.bfloat16: (8, 128, 4), torch.float16: (8, 128, 4)}


@triton.jit
def riemann_project_kernel(
    p_base, p_act, p_weight, p_alphas, p_named, p_out,
    steps, rows, width, neurons, num_named,
    stride_act_r, stride_act_f, stride_weight_h, stride_weight_f, stride_named_r, stride_named_i,
    ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    width *= ALIGNED
    # 64-bit from here on: steps * R * H passes 2^31
    stride_named_i = tl.cast(stride_named_i, tl.int64)
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_row = o_r < rows
    mask = is_row[:, None] & (o_h < width)[None, :]
    o_out = o_r[:, None] * width + o_h[None, :]
    b_base = tl.load(p_base + o_out, mask=mask, other=0.0).to(tl.float32)
    b_moving = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    for i in range(num_named):
        b_j = tl.load(p_named + o_r * stride_named_r + i * stride_named_i, mask=is_row, other=-1)
        is_named = (b_j >= 0) & (b_j < neurons)
        b_a = tl.load(p_act + o_r * stride_act_r + b_j * stride_act_f, mask=is_named, other=0.0)
        p_w = p_weight + o_h.to(tl.int64)[None, :] * stride_weight_h + b_j[:, None] * stride_weight_f
        b_w = tl.load(p_w, mask=mask & is_named[:, None], other=0.0)
        b_moving += b_a.to(tl.float32)[:, None] * b_w.to(tl.float32)
    p_row = p_out + o_out
    for i_k in range(steps):
        tl.store(p_row, b_base + (tl.load(p_alphas + i_k) - 1) * b_moving, mask=mask)
        p_row += tl.cast(rows, tl.int64) * width


def riemann_project(
    base: torch.Tensor, act: torch.Tensor, weight: torch.Tensor, alphas: torch.Tensor, named: torch.Tensor
) -> torch.Tensor:
    """Launch the kernel.

    base [R, H] float32, bfloat16 or float16, contiguous: the product of act [R, F] and weight [H, F], both of its
    dtype; alphas [m] float32 contiguous; named [R, k] int64: no row names one twice, and what is not in [0, F) names
    none; any strides. Returns [m, R, H] of base's dtype. Nothing is checked here.
    """
    rows, width = base.shape
    block_r, block_h, num_warps = TILES[base.dtype]
    aligned = math.gcd(width, 16)
    out = torch.empty(len(alphas), rows, width, dtype=base.dtype, device=base.device)
    # without this Triton launches on the current device and faults on a tensor of another one
    with torch.cuda.device_of(base):
        riemann_project_kernel[(triton.cdiv(rows, block_r), triton.cdiv(width, block_h))](
            base, act, weight, alphas, named, out,
            len(alphas), rows, width // aligned, act.shape[1], named.shape[1],
            *act.stride(), *weight.stride(), *named.stride(),
            ALIGNED=aligned, BLOCK_R=block_r, BLOCK_H=block_h, num_warps=num_warps,
        )  # fmt: skip
    return out
