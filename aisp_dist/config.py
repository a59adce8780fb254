"""The configuration of a run: frozen sections, unknown keys refused. No torch, no file access.

What can change a row is separated from what cannot: `row_settings` feeds the fingerprint (fingerprint.py).
Each field's description is its help text on the command line and in the JSON schema.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from aisp_dist.records import Sampling, TopP


class ConfigError(ValueError):
    """A fault of the configuration or of what it names: one line with key, value, rule and fix; exit code 2."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def doc(text: str, default: Any = ..., **bounds: Any) -> Any:
    return Field(default=default, description=text, **bounds)


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


class Prompts(Section):
    """Where prompts come from and how they become tokens."""

    source: str = doc("demo, a .jsonl/.json/.csv/.parquet/.txt(.gz) path or glob, or a hub dataset id", "demo")
    subset: str | None = doc("hub dataset configuration name", None)
    revision: str | None = doc("hub dataset revision; a commit, for a run that may be resumed later", None)
    split: str = doc("hub dataset split", "train")
    column: str = doc("column with the prompt: text, or messages with role and content", "prompt")
    id_column: str | None = doc("column with your own id of a prompt; unique", None)
    keep: tuple[str, ...] = doc("columns carried into the output and handed to function rewards", ())
    shuffle_seed: int | None = doc("shuffle the input by this seed", None)
    limit: int | None = doc("read at most this many input lines; a larger one later extends the run", None, ge=0)
    format: Literal["chat", "raw", "shp", "hh"] = doc("chat: the model's own template; raw: the text as it is", "chat")
    begin: str = doc("role marker of the user in shp and hh", "User:")
    system: str | None = doc("system message put before every chat", None)
    template_kwargs: dict[str, Any] = doc("passed to the chat template", {})
    max_tokens: int = doc("longest prompt in tokens", 1024, ge=1)
    overlong: Literal["error", "left", "drop_turns"] = doc(
        "a longer prompt becomes a failed row, is cut from the left, or loses its oldest turns", "error"
    )


class Generator(Section):
    """The base model and how it decodes."""

    model: str = doc("demo, a local path, or a hub id")
    revision: str | None = doc("hub revision; resolved once and re-used by a resume", None)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = doc("auto: the checkpoint's own", "auto")
    chat_template: str | None = doc("path of a template that replaces the tokenizer's", None)
    quantization: Literal["int8", "nf4"] | None = doc(
        "null: as the checkpoint is, quantised or not; int8 (torchao, weights only) and nf4 (bitsandbytes) quantise a "
        "plain one while it loads",
        None,
    )
    tensor_parallel: int = doc("GPUs that one copy of the model is split over; only 1 is implemented", 1, ge=1)
    fp32_head: bool = doc("logits by a copy of the output layer in fp32, where the model is of another dtype", False)
    batch_rows: int = doc("rows decoded together; part of the fingerprint, since bits can depend on it", 64, ge=1)
    max_new_tokens: int = doc("tau, the longest response in tokens", 128, ge=1, lt=1 << 31)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = doc("strings that end a response; cut from it", ())
    trust_remote_code: bool = doc("run code that comes with the checkpoint", False)


class RewardBase(Section):
    weight: float = doc("factor in weighted_sum", 1.0)
    use: Literal["select", "report"] = doc("report: held out; scored on the results, never selects", "select")


class ModelReward(RewardBase):
    """A sequence-classification reward model with one output."""

    kind: Literal["model"] = doc("a reward model", "model")
    model: str = doc("demo, demo-judge, a local path, or a hub id")
    revision: str | None = doc("hub revision; resolved once and re-used by a resume", None)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = doc("auto: the checkpoint's own", "auto")
    max_tokens: int = doc("longest input; a longer prompt is cut from its left, the response never", 2048, ge=1)
    batch_rows: int = doc("responses scored together", 32, ge=1)
    trust_remote_code: bool = doc("run code that comes with the checkpoint", False)


class FunctionReward(RewardBase):
    """A Python function with TRL's signature: f(prompts, completions, **columns) -> list of float or None."""

    kind: Literal["function"] = doc("a Python function", "function")
    function: str = doc("file.py:function, relative to the config file, or module:function")


Reward = Annotated[ModelReward | FunctionReward, Discriminator("kind")]


class Ess(Section):
    ess: float = doc("target effective sample size as a fraction of num_samples", gt=0, lt=1)


class Ar1(Section):
    ar1: float = doc("correlation of neighbouring steps", ge=0, lt=1)


class Mixture(Section):
    mixture: float = doc("share of the variance that is one vector for all steps", ge=0, lt=1)


class Nucleus(Section):
    top_p: float = doc("smallest probability mass that is kept", gt=0, le=1)
    temperature: float = doc("softmax temperature", 1.0, gt=0)

    def record(self) -> TopP:
        return TopP(self.top_p, self.temperature)


class Gaussian(Section):
    gaussian: float = doc("variance of the noise on the pre-logits; decoding is greedy", gt=0, le=1e12)


Count = Annotated[int, Field(ge=1, lt=1 << 16)]


class Aisp(Section):
    """Adaptive importance sampling on pre-logits (arXiv 2510.26219, Algorithm 1)."""

    kind: Literal["aisp"] = doc("the method", "aisp")
    num_samples: Count = doc("n, trajectories of an iteration", 16)
    num_iterations: Count = doc("kappa", 8)
    sigma2: float = doc("sigma^2, variance of the noise", 0.5, gt=0, le=1e12)
    lambda_: float | Ess = doc("temperature of the weights, or {ess: fraction}", Ess(ess=0.1), alias="lambda")
    alpha: float = doc("discount of the mean in the prior", 0.9999, ge=0, le=1)
    noise: Literal["independent", "shared"] | Ar1 | Mixture = doc("covariance of the noise over time", "independent")
    decode: Literal["greedy"] | Nucleus = doc("greedy (the paper) or {top_p: .8, temperature: 1.0}", "greedy")
    after_eos: Literal["full", "marginal"] = doc("noise after a response's end: drawn, or integrated out", "full")
    shuffle_rewards: bool = doc("control: the update sees the rewards permuted; true ones select", False)

    @field_validator("lambda_")
    @classmethod
    def positive(cls, value: float | Ess) -> float | Ess:
        if isinstance(value, float) and value <= 0:
            raise ValueError(f"lambda is {value:g}; it must be positive (the paper uses .3 to 480), or {{ess: 0.1}}")
        return value

    def sampling(self) -> Sampling:
        noise: Literal["independent", "shared", "ar1", "mixture"]
        match self.noise:
            case Ar1(ar1=parameter):
                noise = "ar1"
            case Mixture(mixture=parameter):
                noise = "mixture"
            case kind:
                noise, parameter = kind, 0.0
        decode = None if isinstance(self.decode, str) else self.decode.record()
        return Sampling(self.sigma2, noise, parameter, self.alpha, decode, self.after_eos)


class BestOfN(Section):
    """Best of num_samples x num_iterations independent candidates."""

    kind: Literal["best_of_n"] = doc("the method", "best_of_n")
    num_samples: Count = doc("candidates drawn together", 16)
    num_iterations: Count = doc("how many times; N = num_samples x num_iterations", 8)
    sampling_: Nucleus | Gaussian = doc(
        "{top_p: .95, temperature: 1.0} or {gaussian: 0.5}", Nucleus(top_p=0.95), alias="sampling"
    )

    def sampling(self) -> Sampling:
        if isinstance(self.sampling_, Gaussian):
            return Sampling(sigma2=self.sampling_.gaussian)
        return Sampling(decode=self.sampling_.record())


Method = Annotated[Aisp | BestOfN, Discriminator("kind")]


class TopBottom(Section):
    top_bottom: int = doc("keep the k best and the k worst candidates of a prompt", ge=1)


class Save(Section):
    """What is written beside the rows, and how often."""

    candidates: Literal["all", "none"] | TopBottom = doc("which candidates are kept", TopBottom(top_bottom=4))
    trace: bool = doc("keep weights and lengths of every iteration", True)
    rows_per_file: int = doc("input lines a part covers", 1000, ge=1)
    flush_seconds: float = doc("at most this much finished work is lost to a kill", 60.0, ge=0)


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


class Run(Section):
    """A whole run."""

    output: str = doc(
        "directory of the output, or s3://bucket/path; relative to the current directory, absolute inside a Ray job"
    )
    seed: int = doc("decides all noise", 0, ge=0)
    prompts: Prompts = doc("where prompts come from", Prompts())
    generator: Generator = doc("the base model")
    rewards: dict[str, Reward] = doc("rewards by name")
    combine: Literal["weighted_sum", "standardized"] = doc(
        "how several rewards become one; standardized freezes mean and deviation at a prompt's first iteration",
        "weighted_sum",
    )
    method: Method = doc("how answers are searched", Aisp())
    save: Save = doc("what is written", Save())
    runtime: Runtime = doc("where it runs", Runtime())

    @field_validator("output")
    @classmethod
    def known(cls, value: str) -> str:
        return known_place(value)

    @model_validator(mode="after")
    def whole(self) -> Run:
        if not any(reward.use == "select" for reward in self.rewards.values()):
            raise ValueError("rewards: none has use: select, so nothing could choose a best answer; add one")
        unknown = sorted(set(self.runtime.rewards) - set(self.rewards))
        if unknown:
            raise ValueError(f"runtime.rewards: {', '.join(unknown)} is not among rewards ({', '.join(self.rewards)})")
        return self

    def replicas(self, reward: str) -> RewardReplicas:
        return self.runtime.rewards.get(reward, RewardReplicas())

    def row_settings(self) -> dict[str, Any]:
        """Everything in the configuration that can change a row, as JSON values."""
        return self.model_dump(
            mode="json", by_alias=True, exclude={"output": True, "save": True, "runtime": True, "prompts": {"limit"}}
        )
