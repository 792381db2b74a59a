"""mean over the rows that count of ||h - t||^2 / D, and its gradient 2 (h - t) dL / (D rows).

Memory bound. The loss reads h once; the gradient reads it once more and writes itself, scaled: storing it during the
first read, unscaled, would take a buffer of h's size, one more pass over it, and underflow in float16. Rows that do not
count are not read, so that their NaN cannot leak. No atomics: programs write partial sums, added up in fixed order.
"""

import torch
import triton
import triton.language as tl

# dtype -> (rows, width per step, warps): 16 bytes per thread and load, twice
TILES = {torch.float32: (2, 512, 4), torch.bfloat16: (2, 1024, 4), torch.float16: (2, 1024, 4)}


@triton.jit
def misdirection_loss_kernel(
    p_hidden, p_target, p_kept, p_partial,
    rows, width, stride_hidden_r, stride_hidden_d, stride_target_r, stride_target_d,
    HAS_MASK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = o_r < rows
    if HAS_MASK:
        is_row &= tl.load(p_kept + o_r, mask=is_row, other=0) != 0
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i_d in range(0, tl.cdiv(width, BLOCK_D)):
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = is_row[:, None] & (o_d < width)[None, :]
        p_h = p_hidden + o_r[:, None] * stride_hidden_r + o_d.to(tl.int64)[None, :] * stride_hidden_d
        p_t = p_target + o_r[:, None] * stride_target_r + o_d.to(tl.int64)[None, :] * stride_target_d
        b_h = tl.load(p_h, mask=mask, other=0.0).to(tl.float32)
        b_diff = b_h - tl.load(p_t, mask=mask, other=0.0).to(tl.float32)
        b_sum += b_diff * b_diff
    tl.store(p_partial + tl.program_id(0), tl.sum(tl.sum(b_sum, 1), 0))


@triton.jit
def misdirection_gradient_kernel(
    p_hidden, p_target, p_kept, p_scale, p_out,
    rows, width, stride_hidden_r, stride_hidden_d, stride_target_r, stride_target_d,
    HAS_MASK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_out = (o_r < rows)[:, None] & (o_d < width)[None, :]
    mask = is_out
    if HAS_MASK:
        mask = is_out & (tl.load(p_kept + o_r, mask=o_r < rows, other=0) != 0)[:, None]
    p_h = p_hidden + o_r[:, None] * stride_hidden_r + o_d.to(tl.int64)[None, :] * stride_hidden_d
    p_t = p_target + o_r[:, None] * stride_target_r + o_d.to(tl.int64)[None, :] * stride_target_d
    b_h = tl.load(p_h, mask=mask, other=0.0).to(tl.float32)
    b_diff = b_h - tl.load(p_t, mask=mask, other=0.0).to(tl.float32)
    # where, not a product: the scale of a loss that overflowed is not finite
    b_out = tl.where(mask, b_diff * tl.load(p_scale), 0.0)
    tl.store(p_out + o_r[:, None] * width + o_d[None, :], b_out, mask=is_out)


def misdirection_loss(hidden: torch.Tensor, target: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Sum over the rows that count of ||h - t||^2, a float32 scalar.

    hidden [T, D] and target [T, D] or [D] float32, bfloat16 or float16, any strides; kept [T] int8 contiguous, not
    zero where a row counts, or None: all do. Nothing is checked here.
    """
    rows, width = hidden.shape
    block_r, block_d, num_warps = TILES[hidden.dtype]
    programs = triton.cdiv(rows, block_r)
    partial = torch.empty(programs, dtype=torch.float32, device=hidden.device)
    # without this Triton launches on the current device and faults on a tensor of another one
    with torch.cuda.device_of(hidden):
        misdirection_loss_kernel[(programs,)](
            hidden, target, kept, partial,
            rows, width, *hidden.stride(), *target.expand_as(hidden).stride(),
            HAS_MASK=kept is not None, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    return partial.sum()


def misdirection_gradient(
    hidden: torch.Tensor, target: torch.Tensor, kept: torch.Tensor | None, scale: torch.Tensor
) -> torch.Tensor:
    """scale (h - t) in the rows that count, 0 in the others: [T, D] of hidden's dtype.

    scale a float32 scalar tensor; the others as in `misdirection_loss`. Nothing is checked here.
    """
    rows, width = hidden.shape
    block_r, block_d, num_warps = TILES[hidden.dtype]
    out = torch.empty(rows, width, dtype=hidden.dtype, device=hidden.device)
    with torch.cuda.device_of(hidden):
        misdirection_gradient_kernel[(triton.cdiv(rows, block_r), triton.cdiv(width, block_d))](
            hidden, target, kept, scale, out,
            rows, width, *hidden.stride(), *target.expand_as(hidden).stride(),
            HAS_MASK=kept is not None, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    return out
