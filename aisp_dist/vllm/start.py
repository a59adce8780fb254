"""From a configuration to a vLLM engine that has shown that it obeys: its arguments, what the checkpoint says of ends
and lengths, the hook in its workers."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine.checkpoints import cached, locate, locate_adapter
from aisp_dist.engine.served import read
from aisp_dist.vllm import lora
from aisp_dist.vllm.failures import one_line, refused
from aisp_dist.vllm.rows import control_bytes
from aisp_dist.vllm.service import Meter, Service

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

_USED = 0.92  # of the share of a GPU that an engine may take; more is left where controls need it
_BLOCK = 32  # tokens of a block of the prefix cache; CPUs have 128 by default, and most prompts would share none
_FIX = (
    "change that setting, lower prompts.max_tokens or generator.max_new_tokens where memory is short, or set "
    "generator.engine to local"
)
_CPU_CACHE = 1 << 30  # bytes of keys and values on a machine without GPUs


def arguments(
    settings: Generator, context: int, share: float = 1.0, gpu: int | None = None, dim: int = 0
) -> dict[str, Any]:
    """vLLM's engine arguments. context: longest sequence in tokens. share: of each GPU's memory, for this engine. gpu:
    that memory in bytes; None: there is none. dim: hidden size. settings.vllm wins over what is not the configuration's
    own. Raises ConfigError where controls alone would take the share."""
    found: dict[str, Any] = {
        "model": settings.model,
        "revision": settings.revision,
        "tokenizer_revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "load_format": "safetensors",  # pickled weights can run code
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
    if settings.adapter:
        found |= lora.arguments(settings.adapter)
    if settings.vllm.keys().isdisjoint(("gpu_memory_utilization", "kv_cache_memory_bytes")):
        controls = control_bytes(settings.rows, settings.max_new_tokens, dim)
        found |= memory(share, gpu, controls)
        if gpu is not None and found["gpu_memory_utilization"] <= 0:
            raise ConfigError(
                f"generator: controls of up to {settings.rows} rows x {settings.max_new_tokens} steps x {dim} numbers "
                f"take {controls / 1e9:.1f} GB, and the generator's share of the GPU is {share * gpu / 1e9:.1f} GB; "
                "lower generator.vllm.max_num_seqs or generator.max_new_tokens"
            )
    return found | settings.vllm


def memory(share: float, gpu: int | None, beside: int = 0) -> dict[str, Any]:
    """What an engine may take: of each GPU, of so many bytes, or else of the machine. beside: bytes that it shall leave
    of its share, since its profile does not see them."""
    if gpu is None:
        return {"kv_cache_memory_bytes": _CPU_CACHE}
    return {"gpu_memory_utilization": math.floor(1e4 * min(_USED * share, share - beside / gpu)) / 1e4}


def gpu_bytes() -> int | None:
    """The memory of the first GPU; None where vLLM runs on the CPU."""
    from vllm.platforms import current_platform

    on_cpu = current_platform.device_type == "cpu"
    return None if on_cpu else int(current_platform.get_device_total_memory())


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
    if settings.adapter:  # the runner with which adapters were compared with the local engine
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    try:
        from vllm import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase
    except ImportError as error:
        raise ConfigError(f"generator.engine: vllm cannot be imported ({error}); install aisp-dist[vllm]") from None

    place, adapter = locate("generator.model", settings.model, "generator"), locate_adapter(settings)
    settings = settings.model_copy(update={"model": place, "adapter": adapter})
    served = read(settings, prompt_tokens)
    if adapter:
        served = replace(served, adapter=LoRARequest("adapter", 1, adapter))
    wanted = arguments(settings, served.context_length, share, gpu_bytes(), served.dim)
    meter = Meter()

    class Logger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, *args: Any, **kwargs: Any) -> None:
            meter.record(*args, **kwargs)

        def log_engine_initialized(self) -> None: ...

    with refused(f"generator: {settings.model!r}", _FIX) as more:
        try:
            args = AsyncEngineArgs(**more | wanted)
        except TypeError as error:
            raise ConfigError(f"generator.vllm: {error}; give vLLM's own engine arguments") from None
        config = args.create_engine_config()
        llm = await asyncio.to_thread(AsyncLLM.from_vllm_config, config, stat_loggers=[Logger], disable_log_stats=True)
    service = Service(llm, served, meter, limit)
    try:
        if adapter:
            await _adapt(llm, settings, served.adapter)
        await service.install()
        await service.prove()
    except BaseException as error:
        service.close()
        if isinstance(error, Exception) and not isinstance(error, ConfigError) and not llm.errored:
            raise ConfigError(f"generator.engine: vllm: {one_line(error)}") from error
        raise
    service.broken = broken
    return service


async def _adapt(llm: AsyncLLM, settings: Generator, request: LoRARequest) -> None:
    """Load the adapter. Raises ConfigError for one that vLLM refuses, or would apply in part."""
    wrong = f"generator.adapter: {settings.adapter!r} does not fit generator.model {settings.model!r}"
    fix = "name the model that it was trained on, or another adapter, or set generator.engine to local"
    directory = cached(settings.model, settings.revision)
    if directory and (module := lora.misfit(request.path, directory)):
        raise ConfigError(f"{wrong}: there is no {module} of its shape; {fix}")
    try:
        await llm.add_lora(request)
    except Exception as error:
        if llm.errored:
            raise
        raise ConfigError(f"{wrong} ({one_line(error)}); {fix}") from error
