"""Where and how a run executes: nothing here changes a row."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, SecretStr, model_validator

from aisp_dist.config.base import Section, doc


def known_place(output: str) -> str:
    """`output`, if it names a place that outputs can be in. Raises ValueError, which shows no more of a URI than its
    scheme: there may be a secret in it."""
    scheme, mark, rest = output.partition("://")
    if mark and scheme != "s3":
        raise ValueError(f"{scheme}:// is not implemented; give a local directory, or s3://bucket/path")
    if mark and not re.fullmatch(r"[a-z0-9][a-z0-9.-]+(/(?!\.{1,2}(/|$))[^/?#@\s]+)+/?", rest):
        raise ValueError("not of the form s3://bucket/path; credentials go into runtime.storage_options")
    if not output:
        raise ValueError("empty; name a directory")
    return output


class Replicas(Section):
    replicas: int = doc("actors of this kind", 1, ge=1)
    at_least: int | None = doc("begin with so many; the others join as machines do. null: all of them", None, ge=1)
    num_gpus: float | Literal["auto"] = doc("GPUs an actor takes; auto: 1 where the cluster has any, else 0", "auto")
    num_cpus: float = doc("CPUs an actor takes; from 2 on its torch uses two threads", 1.0, ge=0)
    accelerator: str | None = doc("GPU type the actor must be placed on, as Ray names it", None)

    @property
    def needed(self) -> int:
        """Actors without which a run does not begin."""
        return min(self.at_least or self.replicas, self.replicas)


class RewardReplicas(Replicas):
    num_cpus: float = doc("CPUs an actor takes; its torch uses one thread", 0.5, ge=0)


class Timeouts(Section):
    """Seconds after which a call counts as lost and is routed elsewhere."""

    startup: float = doc("placing and loading all actors", 1800.0, gt=0)
    round: float = doc("decoding one round", 600.0, gt=0)
    reward: float = doc("scoring one round", 120.0, gt=0)
    stall: float = doc("a process without a sign of life, or busy without progress, is replaced", 120.0, gt=0)


Secret = Annotated[SecretStr, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]


class StorageOptions(Section):
    """How an output at s3:// is reached; what is null is found as AWS's tools find it (environment, profile, machine).
    run.json and config.yaml hold no secret of these."""

    endpoint_override: str | None = doc("host:port of a store other than AWS", None, pattern=r"^[^\s/@]+$")
    scheme: Literal["http", "https"] | None = doc("https where null", None)
    region: str | None = doc("AWS region", None)
    access_key: Secret | None = doc("access key id; with secret_key", None)
    secret_key: Secret | None = doc("secret access key", None)
    session_token: Secret | None = doc("token of temporary credentials", None)

    @model_validator(mode="after")
    def both_keys(self) -> StorageOptions:
        if (self.access_key is None) != (self.secret_key is None) or (self.session_token and not self.access_key):
            raise ValueError("access_key and secret_key come together, session_token with both; give all, or none")
        return self


class Runtime(Section):
    """Where and how the run executes. Never changes rows; free to change between resumes."""

    generators: Replicas = doc("generator actors", Replicas())
    rewards: dict[str, RewardReplicas] = doc("reward actors, by reward name", {})
    timeouts: Timeouts = doc("timeouts in seconds", Timeouts())
    retries: int = doc("how often a call is repeated on a fault of the infrastructure", 3, ge=0)
    max_failed: float = doc("share of failed rows, after 200 prompts, that ends the run", 0.02, ge=0, le=1)
    shards: int = doc("coordinators; each fills every shards-th part", 1, ge=1)
    storage_options: StorageOptions = doc("access to an output at s3://", StorageOptions())
