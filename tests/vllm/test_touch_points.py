"""A vLLM whose inside has changed is refused, and the part that moved is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aisp_dist.vllm import runners


def runner() -> Any:
    """What the first model runner has of the parts that are touched."""

    def execute_model(scheduler_output: Any, intermediate_tensors: Any = None) -> None: ...
    def apply_logits_processors(logits: Any, sampling_metadata: Any) -> None: ...

    return SimpleNamespace(
        execute_model=execute_model,
        model=SimpleNamespace(compute_logits=lambda hidden_states: None),
        sampler=SimpleNamespace(apply_logits_processors=apply_logits_processors),
        input_batch=SimpleNamespace(req_ids=[]),
        kv_caches=[],
        requests={},
        optimistic_seq_lens_cpu=None,
        model_config=SimpleNamespace(get_hidden_size=lambda: 8),
        max_num_reqs=4,
        device="cpu",
    )


@pytest.mark.parametrize("name", [name for name, _ in runners.V1])
def test_a_part_that_is_gone_is_named(name: str) -> None:
    there = runner()
    runners.check(there, runners.V1)
    *path, last = name.split(".")
    holder = there
    for part in path:
        holder = getattr(holder, part)
    delattr(holder, last)
    with pytest.raises(runners.Moved, match=f"vLLM 0.*SimpleNamespace.{name} is gone.*generator.engine: local"):
        runners.check(there, runners.V1)


def test_a_part_that_is_called_otherwise_is_named() -> None:
    there = runner()
    there.execute_model = lambda batch: None
    with pytest.raises(runners.Moved, match="execute_model takes .'batch',. and not .'scheduler_output',."):
        runners.check(there, runners.V1)


def test_speculative_decoding_is_refused() -> None:
    there = runner()
    there.speculative_config = object()
    with pytest.raises(runners.Moved, match="speculative decoding"):
        runners.install(there, v2=False)
