"""Where and how a run executes. Nothing here changes a row."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator

from aisp_dist.config.base import Section, doc


def known_place(output: str) -> str:
    """`output`, if it names a place that can hold an output. Raises ValueError; its message shows of a URI
    only the scheme, since the rest may hold a secret."""
    scheme, mark, rest = output.partition("://")
    if mark and scheme != "s3":
        raise ValueError(f"{scheme}:// is not implemented; give a local directory, or s3://bucket/path")
    if mark and not re.fullmatch(r"[a-z0-9][a-z0-9.-]+(/(?!\.{1,2}(/|$))[^/?#@\s]+)+/?", rest):
        raise ValueError("not of the form s3://bucket/path; credentials go into runtime.storage_options")
    if not output:
        raise ValueError("empty; name a directory")
    return output


class Replicas(Section):
    replicas: Annotated[int, Field(ge=1)] | Literal["auto"] = doc(
        "processes of this kind; auto: as many as the cluster holds, in the ratio that `aisp compare` measured", 1
    )
    at_least: int | None = doc("begin when this many are up; the others join later. null: all of them", None, ge=1)
    num_gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = doc(
        "GPUs of one process; auto: whole ones while there are enough, then shares by model size; 0 without GPUs",
        "auto",
    )
    num_cpus: float = doc("CPUs of one process; torch uses two threads from 2 on, else one", 1.0, ge=0)
    accelerator: str | None = doc("GPU type that the process needs, as Ray names it", None)

    @field_validator("num_gpus")
    @classmethod
    def one_at_most(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value > 1:
            raise ValueError(
                f"num_gpus is {value:g}; it is at most 1, a GPU or a part of one: give more replicas for more GPUs, or "
                "split a large model by generator.tensor_parallel with num_gpus: auto"
            )
        return value

    @property
    def needed(self) -> int:
        """Processes that must be up before a run begins."""
        most = 1 if self.replicas == "auto" else self.replicas
        return min(self.at_least or most, most)


class RewardReplicas(Replicas):
    num_cpus: float = doc("CPUs of one process; torch uses one thread", 0.5, ge=0)


class Timeouts(Section):
    """Time limits in seconds. What exceeds one is repeated elsewhere; no row is lost."""

    startup: float = doc("placing all processes and loading their models", 1800.0, gt=0)
    round: float = doc(
        "decoding one answer, from when it gets a row of the generator; waiting does not count", 600.0, gt=0
    )
    reward: float = doc(
        "one reward scoring the answers of one round of a prompt; of kind http, scoring some of them", 120.0, gt=0
    )
    stall: float = doc(
        "replace a process that does not answer, or is busy without progress, for this long", 120.0, gt=0
    )


Secret = Annotated[SecretStr, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]


class StorageOptions(Section):
    """Access to an output at s3://. What is null is found as AWS's tools find it (environment, profile, machine role).
    run.json and config.yaml hold no secret of these."""

    endpoint_override: str | None = doc("host:port of a store that is not AWS", None, pattern=r"^[^\s/@]+$")
    scheme: Literal["http", "https"] | None = doc("null: https", None)
    region: str | None = doc("AWS region", None)
    access_key: Secret | None = doc("access key id, together with secret_key", None)
    secret_key: Secret | None = doc("secret access key", None)
    session_token: Secret | None = doc("token of temporary credentials", None)

    @model_validator(mode="after")
    def both_keys(self) -> StorageOptions:
        if (self.access_key is None) != (self.secret_key is None) or (self.session_token and not self.access_key):
            raise ValueError("access_key and secret_key come together, session_token with both; give all, or none")
        return self


class Runtime(Section):
    """Where and how the run executes. Never changes a row, and may change between resumes."""

    generators: Replicas = doc("the processes that decode", Replicas())
    rewards: dict[str, RewardReplicas] = doc("the processes that score, by reward name", {})
    timeouts: Timeouts = doc("timeouts, in seconds", Timeouts())
    retries: int = doc("how often a call is repeated after a fault of the infrastructure", 3, ge=0)
    max_failed: float = doc("a larger share of failed rows ends the run, from 200 prompts on", 0.02, ge=0, le=1)
    shards: int = doc("number of coordinators; each fills every shards-th part of the output", 1, ge=1)
    autoscaling: bool = doc("the cluster adds machines on demand: models wait for a GPU instead of using CPUs", False)
    storage_options: StorageOptions = doc("access to an output at s3://", StorageOptions())
