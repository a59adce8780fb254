"""Which engine decodes an output, decided once: vLLM where GPUs and vLLM are, else the local engine. Pure but for
`here`; imports neither vLLM nor torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob
from typing import Any, Literal, NamedTuple

from aisp_dist import vllm
from aisp_dist.config import Args, ConfigError, ModelReward, ReControl, Reward, Run

LOWEST, BELOW = (0, 32), (0, 34)  # versions of vLLM that the hook was written for, as in pyproject.toml


Name = Literal["local", "vllm", "endpoint"]


@dataclass(frozen=True)
class Found:
    """What the machines that would decode have. gpus: how many in all; version: vLLM's there; None: not installed."""

    gpus: int
    version: str | None


@dataclass(frozen=True)
class Choice:
    """why: for the log. version: vLLM's, where the generator or a reward model runs on it. gpus: that were found."""

    engine: Name
    why: str
    version: str | None = None
    gpus: int = 0

    @property
    def component(self) -> str | None:
        """What the fingerprint holds of the engine; None for the local one, which has its own number there."""
        if self.engine == "endpoint":
            return "endpoint"
        return f"vllm {self.version}, hook {vllm.VERSION}" if self.engine == "vllm" else None

    @property
    def promise(self) -> str:
        if self.engine == "local":
            return "the same rows bit for bit whenever they are computed, on the same kind of hardware and software"
        if self.engine == "endpoint":
            return "every input exactly once; a row that is computed again may differ, since the server draws it"
        return (
            "every input exactly once; a row that is computed again may differ, since its bits depend on what shares a "
            "batch"
        )

    def line(self) -> str:
        name = f"vllm {self.version}" if self.engine == "vllm" else self.engine
        return f"engine: {name} ({self.why}); {self.promise}"


class Check(NamedTuple):
    """Whether what shares a batch changes the bits of a row, tried at an engine's start (invariance.py). rows: that
    were computed again and again. difference: the first that was found, None where there was none."""

    rows: int
    difference: str | None

    def __str__(self) -> str:
        if self.difference:
            return f"VLLM_BATCH_INVARIANT=1 is set, and yet {self.difference}"
        return f"VLLM_BATCH_INVARIANT=1: {self.rows} rows had the same bits alone and together, cached and not"


def weakest(checks: Sequence[Check | None]) -> Check | None:
    """What holds of the rows of several engines."""
    if not checks:
        return None
    if None in checks:
        lacking = f"{checks.count(None)} of {len(checks)} generators run without it"
        return Check(0, lacking) if any(checks) else None
    return next((one for one in checks if one and one.difference), checks[0])


def resolve(run: Run, before: Mapping[str, Any] | None, look: Callable[[], Found]) -> tuple[Run, Choice]:
    """The run with the engines of its generator and reward models. before: the configuration of the output, if it
    exists; one from before there was a choice has the local engine and transformers. Raises ConfigError as `choose`."""
    recorded = before.get("generator", {}).get("engine", "local") if before else None
    choice = choose(run, recorded, look)
    rewards = resolve_rewards(run, before, bool(choice.engine == "vllm" and choice.gpus))
    wanted = [name for name, reward in rewards.items() if isinstance(reward, ModelReward) and reward.engine == "vllm"]
    if wanted and choice.version is None:
        choice = replace(choice, version=usable(f"rewards.{wanted[0]}.engine", "transformers", look().version))
    generator = run.generator.model_copy(update={"engine": choice.engine})
    return run.model_copy(update={"generator": generator, "rewards": rewards}), choice


def resolve_rewards(run: Run, before: Mapping[str, Any] | None, on_vllm: bool = False) -> dict[str, Reward]:
    """The rewards of a run with the engines of its models. before: as for `resolve`. on_vllm: whether vLLM scores where
    there is no `before`."""
    scored = None if before is None else before.get("rewards", {})
    rewards: dict[str, Reward] = {}
    for name, reward in run.rewards.items():
        if isinstance(reward, ModelReward) and reward.engine == "auto":
            vllm_scores = on_vllm if scored is None else scored.get(name, {}).get("engine") == "vllm"
            reward = reward.model_copy(update={"engine": "vllm" if vllm_scores else "transformers"})
        rewards[name] = reward
    return rewards


def choose(run: Run, recorded: Name | None, look: Callable[[], Found]) -> Choice:
    """The engine of an output. recorded: that of the output, if it exists. look: asks the machines, where it matters.
    Raises ConfigError for vLLM where it is not installed, in a version that the hook does not know, or for a method
    that changes every step; for a server where the method needs more than tokens."""
    settings, asked = run.generator, run.generator.engine
    guided = isinstance(run.method, Args | ReControl)
    found: Found | None = None
    engine: Name
    if settings.endpoint is not None:
        if why := settings.refuses(run.method):
            raise ConfigError(why)
        return Choice("endpoint", f"{settings.endpoint.model} at {settings.endpoint.url}")
    if recorded == "endpoint":  # and the configuration has none any more: another output, as its fingerprint will say
        recorded = None
    if asked != "auto":
        engine, why = asked, "as configured"
    elif recorded is not None:
        engine, why = recorded, "as recorded for this output"
    elif guided:
        engine, why = "local", f"{run.method.kind} changes every step inside it"
    elif setting := settings.only_local:
        engine, why = "local", f"for {setting}"
    elif setting := settings.only_vllm:
        engine, why = "vllm", f"for {setting}"
    else:
        found = look()
        both = found.gpus and found.version and _known(found.version)
        engine = "vllm" if both else "local"
        why = f"{found.gpus or 'no'} GPU{'s' * (found.gpus != 1)}"
        if found.gpus:
            why += f", vLLM {found.version}" if found.version else ", vLLM is not installed there"
    if engine == "local":
        if setting := settings.only_vllm:
            raise ConfigError(f"generator.{setting} has no effect with the local engine ({why}); leave it out")
        return Choice("local", why)
    if guided:
        raise ConfigError(
            f"method: {run.method.kind} changes every step inside the local engine, which generator.engine: vllm "
            "excludes; set it to local"
        )
    if setting := settings.only_local:
        raise ConfigError(f"generator.{setting} has no effect with engine vllm ({why}); leave it out")
    found = found or look()
    return Choice("vllm", why, usable("generator.engine", "local", found.version), found.gpus)


def usable(key: str, instead: str, version: str | None) -> str:
    """vLLM's version. Raises ConfigError where it is missing or unknown."""
    if version is None:
        raise ConfigError(
            f"{key}: vllm is not installed where the model would run; pip install 'aisp-dist[vllm]' on every machine "
            f"with such a process, or set it to {instead}"
        )
    if not _known(version):
        raise ConfigError(
            f"{key}: vllm {version} is there, and its inside is known from {_text(LOWEST)} on and below "
            f"{_text(BELOW)}; install such a version, or set it to {instead}"
        )
    return version


def here() -> Found:
    """This machine, as its device files tell."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "x").strip() in ("", "-1")
    return Found(0 if hidden else len(glob("/dev/nvidia[0-9]*")), vllm.installed())


def _known(version: str) -> bool:
    parts = version.split(".")[:2]
    return len(parts) == 2 and all(map(str.isdecimal, parts)) and LOWEST <= (int(parts[0]), int(parts[1])) < BELOW


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
