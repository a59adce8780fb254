"""From a configuration to a vLLM engine that has shown that it obeys: its arguments, what the checkpoint says of ends
and lengths, the hook in its workers."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable
from typing import Any

from aisp_dist.config import ConfigError, Generator
from aisp_dist.data.encode import surplus
from aisp_dist.engine import model, pretrained
from aisp_dist.engine.checkpoints import locate
from aisp_dist.engine.endings import end_ids, stops, warn_of_turn_end
from aisp_dist.vllm.service import Meter, Served, Service

_USED = 0.92  # of the share of a GPU that an engine may take; the rest is for controls and what others need
_BLOCK = 32  # tokens of a block of the prefix cache; CPUs have 128 by default, and most prompts would share none
_CPU_CACHE = 1 << 30  # bytes of keys and values on a machine without GPUs


def arguments(settings: Generator, context: int, share: float = 1.0, gpus: bool = True) -> dict[str, Any]:
    """vLLM's engine arguments. context: longest sequence in tokens. share: of each GPU's memory, for this engine. gpus:
    whether there are GPUs. settings.vllm wins over what is not the configuration's own."""
    found: dict[str, Any] = {
        "model": settings.model,
        "revision": settings.revision,
        "tokenizer_revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "tensor_parallel_size": settings.tensor_parallel,
        "pipeline_parallel_size": settings.pipeline_parallel,
        "distributed_executor_backend": "mp" if settings.gpus > 1 else "uni",
        "worker_extension_cls": "aisp_dist.vllm.worker.Worker",
        "generation_config": "vllm",
        "max_model_len": context,
        "max_num_seqs": settings.rows,
        "enable_prefix_caching": True,
        "block_size": _BLOCK,
        "seed": 0,
        "disable_log_stats": True,
    }
    if settings.vllm.keys().isdisjoint(("gpu_memory_utilization", "kv_cache_memory_bytes")):
        found |= memory(share, gpus)
    return found | settings.vllm


def memory(share: float, gpus: bool) -> dict[str, Any]:
    """What an engine may take, of each GPU or else of the machine."""
    return {"gpu_memory_utilization": round(_USED * share, 4)} if gpus else {"kv_cache_memory_bytes": _CPU_CACHE}


def reason(error: Exception) -> str:
    """A message of vLLM's in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines)[:500]


def environment(threads: int) -> dict[str, str]:
    """Variables of a process that runs vLLM, unless they are set: no network, few words, its CPU threads."""
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }


async def start(
    settings: Generator,
    prompt_tokens: int,
    *,
    share: float = 1.0,
    threads: int = 1,
    limit: float = math.inf,
    broken: Callable[[BaseException], None] = lambda error: None,
) -> Service:
    """An engine for this configuration, on the running event loop. prompt_tokens: longest prompt. Raises ConfigError
    for a model, a setting or a version of vLLM that cannot be used."""
    for name, value in environment(threads).items():
        os.environ.setdefault(name, value)
    try:
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase
    except ImportError as error:
        raise ConfigError(f"generator.engine: vllm cannot be imported ({error}); install aisp-dist[vllm]") from None

    settings = settings.model_copy(update={"model": locate("generator.model", settings.model, "generator")})
    served = _served(settings, prompt_tokens)
    gpus = current_platform.device_type != "cpu"
    wanted = arguments(settings, served.context_length, share, gpus)
    meter = Meter()

    class Logger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, *args: Any, **kwargs: Any) -> None:
            meter.record(*args, **kwargs)

        def log_engine_initialized(self) -> None: ...

    try:
        args = AsyncEngineArgs(**wanted)
        config = args.create_engine_config()
    except TypeError as error:
        raise ConfigError(f"generator.vllm: {error}; give vLLM's own engine arguments") from None
    except (ValueError, ImportError, OSError, NotImplementedError) as error:
        raise ConfigError(f"generator: vLLM refuses {settings.model!r} or its settings: {reason(error)}") from None
    llm = await asyncio.to_thread(AsyncLLM.from_vllm_config, config, stat_loggers=[Logger], disable_log_stats=True)
    service = Service(llm, served, meter, limit, broken)
    try:
        await llm.collective_rpc("aisp_install")
        await service.prove()
    except Exception as error:
        service.close()
        raise ConfigError(f"generator.engine: vllm: {error}") from error
    return service


def _served(settings: Generator, prompt_tokens: int) -> Served:
    """What the checkpoint's files say. Raises ConfigError."""
    from transformers import AutoConfig, GenerationConfig

    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    tokenizer = pretrained.tokenizer(settings)
    try:
        config = AutoConfig.from_pretrained(settings.model, **source).get_text_config(decoder=True)
        try:
            generation = GenerationConfig.from_pretrained(settings.model, revision=settings.revision)
        except OSError:
            generation = GenerationConfig.from_model_config(config)
        limit = model.context_length(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise pretrained.refusal(settings, error) from error
    if wrong := surplus(tokenizer, config.vocab_size):
        raise ConfigError(f"generator.model: {settings.model!r}: {wrong}")
    ends, turn_end = end_ids(config, generation, tokenizer)
    warn_of_turn_end(settings, tokenizer, turn_end)
    ends, strings = stops(tokenizer, ends, settings.stop)
    context = min(limit or math.inf, settings.vllm.get("max_model_len") or prompt_tokens + settings.max_new_tokens)
    sizes = settings.max_new_tokens, int(context), config.vocab_size, settings.rows
    return Served(tokenizer, ends, strings, *sizes)
