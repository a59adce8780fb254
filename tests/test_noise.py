"""Known answers of the generator, and the laws of keyed noise and its covariance over time."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
from toy import covariance

from aisp_dist.engine import noise
from aisp_dist.philox import permutation, philox4x32, prompt_key, sample_word
from aisp_dist.records import Sampling

KINDS = [
    Sampling(1.0, "independent"),
    Sampling(1.0, "ar1", 0.8),
    Sampling(1.0, "mixture", 0.6),
    Sampling(1.0, "mixture", 0.0),
    Sampling(1.0, "shared"),
]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's published vectors for philox4x32-10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert philox4x32(counter, key) == expected
    tensors = philox4x32([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert [int(word) for word in tensors] == expected


def rows(count: int, step: int = 1, iteration: int = 0, seed: int = 0, dim: int = 64) -> torch.Tensor:
    key = torch.tensor(prompt_key(seed, "p")).expand(count, 2)
    word = torch.tensor([sample_word(iteration, i) for i in range(count)])
    return noise.white(key, torch.full((count,), step), word, dim)


def test_the_bits_of_noise_never_change():
    """Outputs that users have were drawn from these bits."""
    drawn = rows(4, step=3, iteration=2, seed=7, dim=20)
    assert hashlib.blake2b(drawn.numpy().tobytes(), digest_size=8).hexdigest() == "1a1e4b374cf33a45"
    assert prompt_key(7, "p") == (423232560, 265607245)
    assert permutation(prompt_key(7, "p"), 3, 8) == [1, 0, 7, 2, 3, 4, 6, 5]


def test_any_subset_in_any_shape_has_the_same_bits():
    whole = rows(32, dim=50)
    key = torch.tensor(prompt_key(0, "p"))
    for i in (0, 7, 31):
        alone = noise.white(key, torch.tensor(1), torch.tensor(sample_word(0, i)), 50)
        assert torch.equal(alone, whole[i])
    assert torch.equal(rows(32, dim=24), whole[:, :24])


def test_every_part_of_the_key_matters():
    draws = [rows(1), rows(2)[1:], rows(1, step=2), rows(1, iteration=1), rows(1, seed=1)]
    for a, b in itertools.combinations(draws, 2):
        assert not torch.equal(a, b)


def test_moments():
    x = torch.cat([rows(2000, step=t, dim=64) for t in range(1, 9)]).double()
    count = x.numel()
    assert abs(x.mean()) < 4 / count**0.5
    assert abs(x.square().mean() - 1) < 4 * (2 / count) ** 0.5
    assert abs(x.pow(4).mean() - 3) < 0.05
    neighbours = (x[:, 1:] * x[:, :-1]).mean()
    assert abs(neighbours) < 4 / count**0.5
    assert noise.normal_table().double().square().mean() == pytest.approx(1, abs=1e-6)
    assert 4.3 < x.abs().max() < 4.34


def test_uniforms_are_in_the_open_interval_and_flat():
    key = torch.tensor(prompt_key(0, "p")).expand(20000, 2)
    u = noise.uniform(key, torch.ones(20000, dtype=torch.int64), torch.arange(20000))
    assert u.min() > 0 and u.max() < 1
    assert np.abs(np.histogram(u, 10, (0, 1))[0] / 2000 - 1).max() < 0.1


def test_samples_beyond_the_word_are_refused():
    for k, i in ((1 << 16, 0), (0, 1 << 16), (-1, 0)):
        with pytest.raises(ValueError, match="65536"):
            sample_word(k, i)


@pytest.mark.parametrize("sampling", KINDS, ids=lambda s: f"{s.noise}{s.parameter}")
def test_the_filter_is_the_cholesky_factor_of_the_covariance(sampling):
    """Unit impulses through the recursion give L. It is lower triangular, and L L' is the kind's covariance."""
    steps = 9
    filt = noise.time_filter(sampling, steps)
    state = torch.zeros(steps, 1)
    columns = []
    for t in range(1, steps + 1):
        impulse = (torch.arange(steps) == t - 1).float()[:, None]
        v, state = filt.step(impulse, state, torch.full((steps,), t))
        columns.append(v[:, 0])
    lower = torch.stack(columns).double().numpy()  # [T out, T in]
    assert np.abs(lower - np.tril(lower)).max() == 0
    np.testing.assert_allclose(lower @ lower.T, covariance(sampling, steps), atol=1e-6)


def test_a_permutation_is_a_permutation_and_depends_on_the_round():
    key = prompt_key(0, "p")
    assert sorted(permutation(key, 0, 50)) == list(range(50))
    assert permutation(key, 0, 50) != permutation(key, 1, 50)
