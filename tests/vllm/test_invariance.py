"""The check of batch invariance, on a real engine without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aisp_dist.records import Rollout, Round
from aisp_dist.vllm import invariance
from aisp_dist.vllm.choice import Check


def test_a_row_whose_bits_depend_on_its_batch_is_found(service: Any, on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No verdict where it is not asked for. The engine is left as it was found."""
    before, right, flying = service.served, service.rollout, list[Round]()

    async def shaken(round: Round) -> Rollout:
        flying.append(round)
        made = await right(round)
        alone = flying == [round]
        flying.remove(round)
        (one,) = made.trajectories
        return made if alone else replace(made, trajectories=(replace(one, nll=one.nll + 1e-9),))

    monkeypatch.setattr(service, "rollout", shaken)
    assert on(invariance.check(service)) is None
    monkeypatch.setattr("vllm.envs.VLLM_BATCH_INVARIANT", True)
    monkeypatch.setattr(invariance, "ROWS", 16)
    found = on(invariance.check(service))
    assert isinstance(found, Check) and found.rows == 16
    assert "together" in str(found.difference) and str(found).startswith("VLLM_BATCH_INVARIANT=1 is set, and yet row")
    assert service.served == before and not service.busy


def test_where_nothing_shares_a_batch_or_a_prefix_no_row_differs(
    service: Any, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariance, "_LONGEST", 20)  # below a block of the prefix cache
    assert on(invariance.difference(service, rows=8, company=1)) is None
