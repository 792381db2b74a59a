"""Sums over a weight's words that tell it from any other: what model/fingerprint.py hashes in its place."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mipfast.ops.backends import call_extension, load_extension

ROW = 1 << 16  # bytes that two numbers stand for
PIECE = 1 << 19, 1 << 27  # bytes at a time, where torch computes: what a CPU's cache holds, and a GPU's memory


def word_sums(data: Tensor) -> np.ndarray:
    """Two numbers for every 64 KiB of bytes, the last filled up with zeros.

    With w the 8-byte words of a row and f, g factors as good as random: sum w f and sum (w >> 32) g modulo 2^64. A
    single word that changed is always seen, as the factors are odd. Of a difference in a word's upper bits the first
    product keeps no more than f's lower ones, so the upper halves are summed by themselves too.

    Args:
        data: [size] uint8, contiguous.

    Returns:
        [rows,2] int64, the same whatever the device.

    Example:
        >>> import torch
        >>> word_sums(torch.zeros(70_000, dtype=torch.uint8)).tolist()
        [[0, 0], [0, 0]]
    """
    if data.storage_offset() % 8:
        data = data.clone()
    if data.is_cpu and hasattr(load_extension(), "word_sums"):
        full = len(data) - len(data) % ROW
        return np.concatenate([_by_extension(data[:full]), _by_extension(_filled_up(data[full:]))])
    parts = [_by_torch(_filled_up(piece)) for piece in data.split(PIECE[data.is_cuda])]
    return torch.cat(parts or [torch.empty(0, 2, dtype=torch.int64)]).cpu().numpy()


def _filled_up(data: Tensor) -> Tensor:
    return F.pad(data, (0, -len(data) % ROW)) if len(data) % ROW else data


def _by_extension(data: Tensor) -> np.ndarray:
    factors, sums = _factors(), np.empty((len(data) // ROW, 2), np.int64)
    whole, upper, out = factors[0].ctypes.data, factors[1].ctypes.data, sums.ctypes.data
    call_extension(
        "word_sums", words=data, whole=whole, upper=upper, out=out, rows=len(sums), width=ROW // 8
    )  # fmt: skip
    return sums


def _by_torch(data: Tensor) -> Tensor:
    words, (whole, upper) = data.view(torch.int64).view(-1, ROW // 8), _factors_on(data.device)
    return torch.stack([(words * whole).sum(1), ((words >> 32) * upper).sum(1)], 1)


@functools.cache
def _factors() -> np.ndarray:
    """[2,ROW/8] int64, the same everywhere."""
    return np.frombuffer(hashlib.shake_128(b"mipfast").digest(2 * ROW), np.int64).reshape(2, -1) | 1


@functools.cache
def _factors_on(device: torch.device) -> Tensor:
    return torch.from_numpy(_factors()).to(device)
