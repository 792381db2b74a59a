"""`ops.word_sums`: C++ and torch give the same bits, and what they must tell apart."""

import numpy as np
import pytest
import torch

from mipfast.ops import word_sums

ROW = word_sums.ROW


def by_torch(data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(word_sums, "load_extension", lambda: None)
        return word_sums.word_sums(data)


def by_definition(data):
    """In Python's integers."""
    filled = bytes(data.tolist()) + bytes(-len(data) % ROW)
    factors = word_sums._factors().tolist()
    sums = []
    for start in range(0, len(filled), ROW):
        words = [int.from_bytes(filled[i : i + 8], "little", signed=True) for i in range(start, start + ROW, 8)]
        whole = sum(w * f for w, f in zip(words, factors[0], strict=True))
        upper = sum((w >> 32) * f for w, f in zip(words, factors[1], strict=True))
        sums.append([(one + 2**63) % 2**64 - 2**63 for one in (whole, upper)])
    return np.array(sums, np.int64).reshape(-1, 2)


@pytest.mark.parametrize("size", [0, 1, 8, 4097, ROW - 1, ROW, ROW + 1, 3 * ROW + 12345])
@pytest.mark.parametrize("offset", [0, 3])
def test_one_number_whatever_computes_it(size, offset, monkeypatch):
    generator = torch.Generator().manual_seed(size)
    data = torch.randint(0, 256, (size + offset,), dtype=torch.uint8, generator=generator)[offset:]
    expected = by_definition(data)
    assert expected.shape == (-(-size // ROW), 2)
    assert np.array_equal(by_torch(data, monkeypatch), expected)
    assert np.array_equal(word_sums.word_sums(data), expected)


def test_a_word_that_changed_is_seen_wherever_it_lies():
    """Any bit of any word, and the same change in two words, which sums without factors would miss."""
    data = torch.zeros(2 * ROW, dtype=torch.uint8)
    clean = word_sums.word_sums(data).tolist()
    for place in (0, 7, 8, ROW - 1, ROW, 2 * ROW - 1):
        for bit in range(8):
            changed = data.clone()
            changed[place] = 1 << bit
            assert word_sums.word_sums(changed).tolist() != clean
    changed = data.clone()
    changed[7], changed[15] = 128, 128  # the highest bits: whole sums alone would cancel
    assert word_sums.word_sums(changed).tolist() != clean
