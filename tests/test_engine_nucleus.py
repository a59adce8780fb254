"""Draws from a nucleus: those of sorting the whole vocabulary, for any logits, and the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from aisp_dist.engine import nucleus
from aisp_dist.records import TopP


def draw(logits_RV: torch.Tensor, wanted: TopP, uniform_R: torch.Tensor) -> torch.Tensor:
    p_R = torch.full((len(logits_RV),), wanted.p, dtype=torch.float64)
    return nucleus.draw(logits_RV, p_R, torch.full_like(p_R, wanted.temperature), uniform_R)


def by_sorting(
    logits_RV: torch.Tensor, p_R: torch.Tensor, temperature_R: torch.Tensor, uniform_R: torch.Tensor
) -> torch.Tensor:
    """The definition: the fewest likeliest tokens whose probabilities add up to p, equal ones in the order of ids."""
    probability, order = (logits_RV.double() / temperature_R[:, None]).softmax(-1).sort(stable=True, descending=True)
    reached = probability.cumsum(-1)
    kept = reached - probability < p_R[:, None]
    mass_R1 = (probability * kept).sum(-1, keepdim=True)
    rank_R1 = torch.searchsorted(reached, uniform_R[:, None] * mass_R1)
    return order.gather(1, torch.minimum(rank_R1, kept.sum(-1, keepdim=True) - 1))[:, 0]


def logits_of(shape: str, vocab_size: int, rows: int, draws: torch.Generator) -> torch.Tensor:
    x = torch.randn(rows, vocab_size, generator=draws)
    scale = {"flat": 0.01, "usual": 3.0, "peaked": 30.0, "ties": 3.0, "masked": 3.0}[shape]
    x *= scale
    if shape == "ties":
        x = x.round()
    if shape == "masked":
        x[:, vocab_size // 2 :] = -torch.inf
    return x


@pytest.mark.parametrize("shape", ["flat", "usual", "peaked", "ties", "masked"])
@pytest.mark.parametrize("vocab_size", [5, 257, 5000, 128_256])
def test_a_draw_is_that_of_the_sorted_vocabulary(shape: str, vocab_size: int) -> None:
    draws = torch.Generator().manual_seed(vocab_size)
    rows = 64 if vocab_size < 10_000 else 12
    logits_RV = logits_of(shape, vocab_size, rows, draws)
    choose = torch.randint(6, (2, rows), generator=draws)
    p_R = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0], dtype=torch.float64)[choose[0]]
    temperature_R = torch.tensor([0.05, 0.3, 0.7, 1.0, 1.5, 4.0], dtype=torch.float64)[choose[1]]
    uniform_R = torch.rand(rows, dtype=torch.float64, generator=draws)
    drawn_R = nucleus.draw(logits_RV, p_R, temperature_R, uniform_R)
    assert drawn_R.tolist() == by_sorting(logits_RV, p_R, temperature_R, uniform_R).tolist()


@pytest.mark.parametrize("vocab_size", [40, 600, 6000])
def test_a_nucleus_that_the_rough_total_leaves_open_is_that_of_the_exact_one(vocab_size: int) -> None:
    logits_RV = torch.zeros(3, vocab_size)  # half of them have half of the total: wanted is more
    uniform_R = torch.tensor([0.1111, 0.5123, 0.9837], dtype=torch.float64)
    expected = (uniform_R * (vocab_size / 2 + 1)).long()
    assert draw(logits_RV, TopP(0.5 + 1e-6, 1.0), uniform_R).tolist() == expected.tolist()


def test_a_row_alone_has_the_bits_that_it_has_in_company() -> None:
    draws = torch.Generator().manual_seed(0)
    logits_RV = torch.cat([logits_of(shape, 6000, 8, draws) for shape in ("flat", "usual", "peaked", "ties")])
    uniform_R = torch.rand(len(logits_RV), dtype=torch.float64, generator=draws)
    p_R, temperature_R = torch.full_like(uniform_R, 0.9), torch.ones_like(uniform_R)
    together = nucleus.draw(logits_RV, p_R, temperature_R, uniform_R)
    for keep in (slice(0, 1), slice(7, 9), slice(3, 31)):
        given = (x[keep] for x in (logits_RV, p_R, temperature_R, uniform_R))
        assert nucleus.draw(*given).tolist() == together[keep].tolist()


def test_masses_are_those_of_the_sorted_vocabulary() -> None:
    draws = torch.Generator().manual_seed(1)
    logits_RV = torch.cat([logits_of(shape, 6000, 8, draws) for shape in ("flat", "usual", "peaked", "ties")])
    p_P = torch.tensor([0.5, 0.7, 0.95], dtype=torch.float64)
    first_R, mass_RP = nucleus.masses(logits_RV, p_P)
    sorted_RV = logits_RV.double().softmax(-1).sort(descending=True).values
    reached_RV = sorted_RV.cumsum(-1)
    expected = [torch.where(reached_RV - sorted_RV < p, sorted_RV, 0.0).sum(-1) for p in p_P]
    torch.testing.assert_close(first_R, sorted_RV[:, 0])
    torch.testing.assert_close(mass_RP, torch.stack(expected, -1))


def test_a_draw_is_the_inverse_cdf_over_the_nucleus() -> None:
    logits_RV = torch.log(torch.tensor([[0.1, 0.4, 0.1, 0.3, 0.1]])).repeat(6, 1)
    uniform_R = torch.tensor([0.0, 0.49, 0.51, 0.99, 0.6, 1.0], dtype=torch.float64)
    assert draw(logits_RV, TopP(0.75, 1.0), uniform_R).tolist() == [
        1,
        1,
        3,
        0,
        3,
        0,
    ]  # 0 is the first of the equal ones
    assert draw(logits_RV, TopP(0.3, 1.0), uniform_R).tolist() == [1] * 6
    assert draw(logits_RV, TopP(1.0, 1.0), uniform_R)[5] == 4
    assert draw(logits_RV, TopP(0.6, 1e-3), uniform_R).tolist() == [1] * 6


def test_draws_follow_the_tempered_nucleus() -> None:
    logits_V = torch.tensor([0.3, -1.0, 2.0, 1.0, -4.0])
    expected = (logits_V.double() / 0.7).softmax(0) * torch.tensor([1, 0, 1, 1, 0])
    uniform_R = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    counts = draw(logits_V.expand(20000, -1), TopP(0.95, 0.7), uniform_R).bincount(minlength=5)
    torch.testing.assert_close(counts / 20000, expected / expected.sum(), rtol=0, atol=2e-4, check_dtype=False)
