"""Philox4x32-10, the counter-based generator of all random numbers, and the layout of its keys and counters:

    key      64 bits of blake2b(seed, prompt id)
    counter  (block of coordinates, step t, iteration k << 16 | sample i, stream)

The arithmetic works on Python ints and on int64 tensors, so this module needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

NOISE, UNIFORM, SHUFFLE, PARENT = range(4)  # streams
_MASK = 0xFFFFFFFF
_MUL0, _MUL1, _WEYL0, _WEYL1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: Sequence[Any], key: Sequence[Any]) -> list[Any]:
    """Ten rounds of Philox (Salmon et al. 2011): four counter words and two key words to four random words. All are
    32-bit, in ints or in int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MUL0, c2 * _MUL1  # int64 wraps modulo 2^64, which keeps these 64 bits
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL0 & _MASK, k1 + _WEYL1 & _MASK
    return [c0, c1, c2, c3]


def prompt_key(seed: int, prompt_id: str) -> tuple[int, int]:
    """The two key words of a prompt. 64 bits, since 32 would collide among 10M prompts."""
    digest = hashlib.blake2b(f"{seed}\0{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def sample_word(iteration: int, sample: int) -> int:
    """The counter word k << 16 | i. Raises ValueError from 65,536 samples or iterations on, as words would repeat."""
    if not (0 <= iteration < 1 << 16 and 0 <= sample < 1 << 16):
        raise ValueError(
            f"iteration {iteration}, sample {sample}: both must be in [0, 65536), so that each sample has its own noise"
        )
    return iteration << 16 | sample


def permutation(key: tuple[int, int], iteration: int, n: int) -> list[int]:
    """A keyed permutation of range(n), for the search that learns from shuffled rewards."""
    words = [philox4x32((0, i, iteration, SHUFFLE), key) for i in range(n)]
    return sorted(range(n), key=lambda i: (words[i][0], words[i][1], i))
