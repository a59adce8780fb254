"""A sequence classifier behind vLLM's pooling runner, in the place of rewards/prefix.py's. Owns one engine and the
refusals of checkpoints that vLLM would score wrongly; templates, truncation and padding are not its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from aisp_dist.config import ConfigError, ModelReward
from aisp_dist.vllm.failures import refused
from aisp_dist.vllm.service import Dead
from aisp_dist.vllm.start import environment, gpu_bytes, memory

_FIX = "change that setting, lower max_tokens of the reward where memory is short, or set its engine to transformers"


class Pooled:
    """path, config: of the checkpoint. max_length: longest input in tokens. share: of the GPU's memory, for this
    engine. Raises ConfigError for a checkpoint or a setting that cannot be used."""

    pad_token_id: int | None = None  # vLLM pads nothing

    def __init__(
        self,
        key: str,
        settings: ModelReward,
        path: str,
        config: Any,
        max_length: int,
        share: float = 1.0,
        threads: int = 1,
    ) -> None:
        kinds = getattr(config, "architectures", None) or []
        if config.num_labels != 1 or not all(kind.endswith("ForSequenceClassification") for kind in kinds or [""]):
            what = f"{', '.join(kinds) or 'no architecture'} with {config.num_labels} outputs"
            raise ConfigError(
                f"{key}: {settings.model!r} is {what}; vLLM scores ForSequenceClassification with one: set engine to "
                "transformers"
            )
        for name, value in environment(threads).items():
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM
            from vllm.config import PoolerConfig
        except ImportError as error:
            raise ConfigError(f"{key}: vllm cannot be imported ({error}); install aisp-dist[vllm]") from None
        with refused(f"{key}: {settings.model!r}", _FIX) as more:
            self.llm = LLM(
                path,
                runner="pooling",
                convert="classify",
                revision=settings.revision,
                load_format="safetensors",  # pickled weights can run code
                dtype=settings.dtype,
                trust_remote_code=settings.trust_remote_code,
                max_model_len=max_length,
                pooler_config=PoolerConfig(use_activation=False),  # else a sigmoid
                disable_log_stats=True,
                enforce_eager=gpu_bytes() is None,  # else on a CPU each start compiles, for about half a minute
                **memory(share, gpu_bytes()) | more,
            )
        self.dtype: torch.dtype = self.llm.llm_engine.model_config.dtype

    def logits(self, rows: Sequence[tuple[int, ...]], batch_rows: int, chain: object = None) -> list[float]:
        """Raw logits of rows of tokens. vLLM makes its own batches. Raises Dead."""
        from vllm import PoolingParams, TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        asked = [TokensPrompt(prompt_token_ids=list(row)) for row in rows]
        try:
            found = self.llm.classify(asked, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        except EngineDeadError as error:
            raise Dead(f"vLLM's engine has died: {error}") from error
        return [float(one.outputs.probs[0]) for one in found]

    def close(self) -> None:
        """End the engine and its processes."""
        self.llm.llm_engine.engine_core.shutdown()
