"""silu(gate) up, and its gradients from d_out, gate and up alone: silu(gate) is neither written nor kept.

Memory bound: two tensors read and one written, then three and two. Elementwise, so two runs agree to the bit.
"""

import torch
import triton
import triton.language as tl

# dtype -> (elements per program, warps): 16 bytes per thread and tensor, twice
TILES = {torch.float32: (1024, 4), torch.bfloat16: (2048, 4), torch.float16: (2048, 4)}


@triton.jit
def swiglu_kernel(p_gate, p_up, p_out, size, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # rows * F passes 2^31
    mask = o < size
    b_gate = tl.load(p_gate + o, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + o, b_gate / (1 + tl.exp(-b_gate)) * b_up, mask=mask)


@triton.jit
def swiglu_gradients_kernel(p_d_out, p_gate, p_up, p_d_gate, p_d_up, size, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    b_d = tl.load(p_d_out + o, mask=mask, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o, mask=mask, other=0.0).to(tl.float32)
    b_sigmoid = 1 / (1 + tl.exp(-b_gate))
    tl.store(p_d_gate + o, b_d * b_up * (b_sigmoid * (1 + b_gate * (1 - b_sigmoid))), mask=mask)
    tl.store(p_d_up + o, b_d * (b_gate * b_sigmoid), mask=mask)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Launch the forward kernel.

    gate, up of one shape and dtype, float32, bfloat16 or float16, contiguous. Returns the same. Nothing is checked
    here, as in the next function.
    """
    out = torch.empty_like(gate)
    block, num_warps = TILES[gate.dtype]
    # without this Triton launches on the current device and faults on a tensor of another one
    with torch.cuda.device_of(gate):
        swiglu_kernel[(triton.cdiv(gate.numel(), block),)](
            gate, up, out, gate.numel(), BLOCK=block, num_warps=num_warps
        )
    return out


def swiglu_gradients(d_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the gradients' kernel: the gradients of gate and up, of their dtype."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(gate)
    block, num_warps = TILES[gate.dtype]
    with torch.cuda.device_of(gate):
        swiglu_gradients_kernel[(triton.cdiv(gate.numel(), block),)](
            d_out, gate, up, d_gate, d_up, gate.numel(), BLOCK=block, num_warps=num_warps
        )
    return d_gate, d_up
