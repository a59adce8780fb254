"""The check of batch invariance, on a real engine without it."""

from __future__ import annotations

from typing import Any

import pytest

from aisp_dist.vllm import invariance
from aisp_dist.vllm.choice import Check


def test_without_it_there_is_a_row_whose_bits_depend_on_its_batch(
    service: Any, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No verdict where it is not asked for. The engine is left as it was found."""
    before = service.served
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
