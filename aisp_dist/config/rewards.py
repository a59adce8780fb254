"""Rewards, by kind, and the judge, which is reached in the same way as an HTTP reward."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, field_validator, model_validator

from aisp_dist.config.base import Section, doc


class RewardBase(Section):
    weight: float = doc("factor of this reward in the weighted sum", 1.0)
    use: Literal["select", "report"] = doc(
        "report: held out; scored on the selected and the base answer, never selects", "select"
    )

    @model_validator(mode="after")
    def weighs(self) -> RewardBase:
        if self.use == "report" and self.weight != 1:
            raise ValueError(
                f"weight is {self.weight:g}, which has no effect with use: report, since that reward is in no sum; "
                "leave weight out, or give use: select"
            )
        return self


class ModelReward(RewardBase):
    """A sequence-classification reward model with one output."""

    kind: Literal["model"] = doc("a sequence classifier", "model")
    model: str = doc("demo, demo-judge, a local path, or a hub id")
    revision: str | None = doc("hub revision; null: today's commit, which a resume uses again", None)
    engine: Literal["auto", "transformers", "vllm"] = doc(
        "what scores; auto: vllm where GPUs are and the generator runs on it, decided once per output", "auto"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = doc("auto: the checkpoint's own", "auto")
    max_tokens: int = doc(
        "longest input in tokens; a longer one is cut from the left of its prompt",
        2048,
        ge=1,
    )
    batch_rows: int = doc("responses scored together", 32, ge=1)
    chat_template: str | None = doc(
        "ultrarm, eurus, or a file, relative to the configuration file; null: the tokenizer's own", None
    )
    system: Literal["keep", "drop"] = doc("drop: leave out system messages, for models trained without them", "keep")
    self_test: bool = doc("test the model for known defects when it is loaded", True)
    trust_remote_code: bool = doc("run code that comes with the checkpoint", False)


class FunctionReward(RewardBase):
    """A Python function with TRL's signature: f(prompts, completions, **columns) -> list of float or None."""

    kind: Literal["function"] = doc("a Python function", "function")
    function: str = doc("file.py:function (relative to the configuration file), module:function, or an entry point")


class Server(Section):
    """A model behind HTTP. Only url and model can change its answers."""

    url: str = doc("base URL of the API, as http://host:8000/v1")
    model: str = doc("name of the model on the server")
    api_key_env: str | None = doc("environment variable that holds the API key, which is sent as a bearer token", None)
    timeout: float = doc("seconds for one request", 60.0, gt=0)
    retries: int = doc("how often a request is repeated after 429, 5xx or a lost connection", 5, ge=0)
    max_parallel: int = doc("concurrent requests of one process", 8, ge=1)
    requests_per_minute: float | None = doc("limit of one process; null: none", None, gt=0)

    @field_validator("url")
    @classmethod
    def reachable(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            whole = False
        if not whole or parts.username or parts.password or parts.query or parts.fragment:
            # The value may hold a secret, so it is not repeated here.
            raise ValueError("not of the form http://host:port/path; a key goes into the variable named by api_key_env")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def named(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("not the name of an environment variable; give the name, never the key")
        return value


class GeneratorEndpoint(Server):
    """The base model behind an OpenAI-compatible server whose completions take and return token ids, as vLLM's."""

    timeout: float = doc("seconds for one request", 600.0, gt=0)
    max_parallel: int = doc("concurrent requests of one process", 128, ge=1)


class Endpoint(Server):
    """A model behind HTTP that writes text or scores. Only url, model, max_tokens and body can change its answers."""

    max_tokens: int = doc("longest reply of a chat model in tokens", 512, ge=1)
    body: dict[str, Any] = doc("further fields of every request", {})

    @field_validator("body")
    @classmethod
    def beside(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(value.keys() & {"model", "messages", "input", "text", "stream", "n", "use_activation"}):
            raise ValueError(f"{', '.join(taken)} may not be set here; leave it out")
        return value


class JudgeSettings(Endpoint):
    """A chat model that compares answers."""


class HttpReward(RewardBase, Endpoint):
    """A chat model that gives a number, or a reward model behind vLLM's or SGLang's /classify."""

    kind: Literal["http"] = doc("a server", "http")
    protocol: Literal["chat", "classify", "classify_sglang"] = doc(
        "chat: OpenAI's /chat/completions; classify: vLLM's /classify; classify_sglang: SGLang's", "chat"
    )
    rubric: str | None = doc(
        "text with {prompt} and {response}: the question to a chat model, or the text to classify; null: messages, "
        "rendered by vLLM's server",
        None,
    )
    scale: tuple[float, float] = doc("smallest and largest number that a chat model may give", (1.0, 10.0))

    @model_validator(mode="after")
    def whole(self) -> HttpReward:
        if self.rubric is None and self.protocol != "classify":
            raise ValueError(f"rubric: missing; {self.protocol} needs a text with {{prompt}} and {{response}}")
        if self.rubric is not None:
            for field in ("{prompt}", "{response}")[self.protocol != "chat" :]:
                if field not in self.rubric:
                    raise ValueError(f"rubric: has no {field}, so the model would not see it; put it into the text")
        if self.protocol != "chat":
            for field in ("scale", "max_tokens"):
                if (value := getattr(self, field)) != type(self).model_fields[field].default:
                    raise ValueError(
                        f"{field} is {value}, which has no effect with protocol: {self.protocol}; leave it out"
                    )
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale: {self.scale[0]:g} is not below {self.scale[1]:g}; give smallest, then largest")
        return self

    def refuses(self, seconds: float) -> str | None:
        """Why no call could be sure of an answer within `seconds`, timeouts.reward; None where it can. Answers are kept
        from call to call, so that one in each is enough, whatever num_samples is."""
        most = seconds / 2.5  # of what a scorer gives the server, 0.9 of it, half is left for the answer
        if self.requests_per_minute is None or 60 / self.requests_per_minute <= most:
            return None
        limit, needed = self.requests_per_minute, math.ceil(2.5 * 60 / self.requests_per_minute)
        return (
            f"requests_per_minute: {limit:g} is one in {60 / limit:g} s, and runtime.timeouts.reward: {seconds:g} needs"
            f" one in {most:g} s; give at least {math.ceil(60 / most)}, or runtime.timeouts.reward: {needed}"
        )


Reward = Annotated[ModelReward | FunctionReward | HttpReward, Discriminator("kind")]

# Of a reward, what cannot change a score.
FREE = frozenset({"self_test", "api_key_env", "timeout", "retries", "max_parallel", "requests_per_minute"})
