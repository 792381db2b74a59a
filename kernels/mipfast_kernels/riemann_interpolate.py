"""out[k, r, j] = alpha_k a[r, j], at every neuron or only at those a row names (the others copied).

Memory bound: R * F elements are read once and steps * R * F written. Every element is written by one program, so two
runs agree to the bit.
"""

import math

import torch
import triton
import triton.language as tl

# dtype -> (neurons per program, warps): 16 bytes per thread and store, the widest a GPU's instruction takes
TILES = {torch.float32: (512, 4), torch.bfloat16: (1024, 4), torch.float16: (1024, 4)}


@triton.jit
def riemann_interpolate_kernel(
    p_act, p_alphas, p_named, p_out,
    steps, rows, neurons, num_named, stride_act_r, stride_act_f, stride_named_r, stride_named_i,
    HAS_NAMED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    neurons *= ALIGNED
    # 64-bit from here on: steps * R * F passes 2^31
    stride_act_r = tl.cast(stride_act_r, tl.int64) * ALIGNED
    stride_named_i = tl.cast(stride_named_i, tl.int64)
    i_r = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = o_f < neurons
    b_a = tl.load(p_act + i_r * stride_act_r + o_f.to(tl.int64) * stride_act_f, mask=mask, other=0.0).to(tl.float32)
    b_named = tl.zeros([BLOCK_F], tl.int1)
    if HAS_NAMED:  # a handful of comparisons per element: less than the stores take
        for i in range(num_named):
            b_named |= o_f == tl.load(p_named + i_r * stride_named_r + i * stride_named_i)
    p_row = p_out + i_r * neurons + o_f
    for i_k in range(steps):
        b_out = tl.load(p_alphas + i_k) * b_a
        if HAS_NAMED:
            b_out = tl.where(b_named, b_out, b_a)
        tl.store(p_row, b_out, mask=mask)
        p_row += tl.cast(rows, tl.int64) * neurons


def riemann_interpolate(act: torch.Tensor, alphas: torch.Tensor, named: torch.Tensor | None) -> torch.Tensor:
    """Launch the kernel.

    act [R, F] float32, bfloat16 or float16; alphas [m] float32 contiguous; named [R, k] int64 or None, -1 names no
    neuron; any strides. Returns [m, R, F] of act's dtype. Nothing is checked here.
    """
    rows, neurons = act.shape
    block_f, num_warps = TILES[act.dtype]
    # rows that are no multiples of 16 bytes (F 3420): Triton must know of which power of two, or it moves one element
    aligned = math.gcd(act.stride(0), neurons, 16)
    out = torch.empty(len(alphas), rows, neurons, dtype=act.dtype, device=act.device)
    # without this Triton launches on the current device and faults on a tensor of another one
    with torch.cuda.device_of(act):
        riemann_interpolate_kernel[(rows, triton.cdiv(neurons, block_f))](
            act, alphas, named, out,
            len(alphas), rows, neurons // aligned, 0 if named is None else named.shape[1],
            act.stride(0) // aligned, act.stride(1), *((0, 0) if named is None else named.stride()),
            HAS_NAMED=named is not None, ALIGNED=aligned, BLOCK_F=block_f, num_warps=num_warps,
        )  # fmt: skip
    return out
