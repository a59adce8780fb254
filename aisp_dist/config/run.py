"""A whole run: prompts, base model, rewards, method, what is kept, where it executes.

What can change a row is separated from what cannot: `row_settings` feeds the fingerprint (fingerprint.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from aisp_dist.config.base import Section, doc
from aisp_dist.config.compare import Compare, Tune
from aisp_dist.config.guard import Guard
from aisp_dist.config.methods import Args, Method, ReControl
from aisp_dist.config.rewards import FREE, GeneratorEndpoint, Reward
from aisp_dist.config.runtime import RewardReplicas, Runtime, known_place
from aisp_dist.records import Rates

OF_TEMPLATES = (
    "messages",
    "conversation",
    "conversations",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)  # what transformers' apply_chat_template takes itself, but for tools and documents, which templates show


class Prompts(Section):
    """Where prompts come from and how they become tokens."""

    source: str = doc("demo, a file (jsonl, json, csv, parquet, txt), a pattern, a directory, or a hub dataset", "demo")
    subset: str | None = doc("configuration of a hub dataset or of a directory's README.md", None)
    revision: str | None = doc("revision of a hub dataset; give a commit if the run may be resumed later", None)
    split: str = doc("split of a hub dataset or of a directory; a file has none", "train")
    streaming: bool = doc("read a hub dataset row by row over the network, without storing it", False)
    column: str = doc("column with the prompt: text or a list of messages", "prompt")
    id_column: str | None = doc("column with your own ids, which are unique", None)
    keep: tuple[str, ...] = doc("columns that are kept in the output and passed to function rewards", ())
    shuffle_seed: int | None = doc("shuffle the input with this seed", None)
    skip: int = doc("skip this many input lines, after the shuffle", 0, ge=0)
    limit: int | None = doc(
        "read at most this many input lines, `aisp tune` apart; a larger limit extends a finished run", None, ge=0
    )
    format: Literal["chat", "raw", "shp", "hh"] = doc(
        "chat: the model's own chat template; raw: the text as it is; shp, hh: as the paper renders these datasets",
        "chat",
    )
    begin: str = doc("role marker of the user, for shp and hh", "User:")
    system: str | None = doc("system message put before every chat", None)
    template_kwargs: dict[str, Any] = doc("passed to the chat template", {})
    drop_last_answer: bool = doc(
        "drop the assistant's turn that ends a dialogue; keep it as original_completion, scored beside the new answer",
        False,
    )
    special_tokens: bool = doc(
        "read special tokens in the texts of messages as special tokens, not as text; a raw prompt's always are", False
    )
    max_tokens: int = doc("longest prompt in tokens", 1024, ge=1)
    overlong: Literal["error", "left", "drop_turns"] = doc(
        "a longer prompt becomes a failed row, is cut from the left, or loses its oldest turns", "error"
    )

    @field_validator("template_kwargs")
    @classmethod
    def variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in value if name in OF_TEMPLATES]:
            raise ValueError(f"{taken[0]} is set for every prompt and cannot be given; leave it out")
        return value

    @model_validator(mode="after")
    def effective(self) -> Prompts:
        if self.special_tokens and self.format == "raw":
            raise ValueError("special_tokens: has no effect on format: raw, which always reads them; leave it out")
        if self.drop_last_answer and self.format not in ("chat", "hh"):
            raise ValueError(f"drop_last_answer: needs dialogues, format chat or hh, not {self.format}; leave it out")
        return self


LOCAL_QUANTIZATION = ("int8", "nf4")
SEQUENCES = 256  # rows that vLLM decodes together, where generator.vllm does not say
FREE_VLLM = ("gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens")
_PLACE = "it is set by the other keys of generator and by runtime"
OWNED = dict.fromkeys(
    (
        "model",
        "tokenizer",
        "revision",
        "dtype",
        "quantization",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "trust_remote_code",
        "distributed_executor_backend",
        "worker_extension_cls",
        "worker_cls",
        "runner",
        "convert",
    ),
    _PLACE,
) | {
    "speculative_config": "speculative decoding checks tokens against logits without control",
    "hf_token": "run.json would show it; export HF_TOKEN on the machines instead",
    "logprobs_mode": "likelihoods are the base model's, at temperature 1",
    "data_parallel_size": "runtime.generators.replicas makes more copies",
    "logits_processors": "they would change what the search sees",
    **dict.fromkeys(("enable_lora", "max_loras", "max_lora_rank", "lora_target_modules"), "generator.adapter says it"),
}  # engine arguments of vLLM that are not free, and why


class Generator(Section):
    """The base model and how it decodes."""

    model: str = doc("demo, a local directory, file.gguf, package:file.gguf, or a hub id")
    revision: str | None = doc("hub revision; null: today's commit, which a resume uses again", None)
    adapter: str | None = doc(
        "directory with a LoRA adapter (peft): merged into the model while it loads, with vllm beside it",
        None,
        min_length=1,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = doc(
        "auto: the checkpoint's own; bfloat16 for a quantised GGUF file", "auto"
    )
    chat_template: str | None = doc("file with a chat template that replaces the tokenizer's", None)
    engine: Literal["auto", "local", "vllm", "endpoint"] = doc(
        "what decodes: local (exact, portable), vllm (GPUs), endpoint (a server), or auto: endpoint where one is "
        "given, else vllm where GPUs and vLLM are; decided once per output",
        "auto",
    )
    endpoint: GeneratorEndpoint | None = doc("a server that runs the model, for methods without noise", None)
    quantization: str | None = doc(
        "quantise a plain checkpoint while it loads: int8 (torchao, weights only) or nf4 (bitsandbytes) with local, "
        "one of vLLM's own names, such as fp8, with vllm; null: load it as it is",
        None,
        min_length=1,
    )
    tensor_parallel: int = doc("GPUs of one machine that each layer is split over; with vllm", 1, ge=1)
    pipeline_parallel: int = doc("GPUs of one machine that the layers are divided among; with vllm", 1, ge=1)
    vllm: dict[str, Any] = doc("further engine arguments of vLLM by their own names, as {max_num_seqs: 128}", {})
    fp32_head: bool = doc("compute logits with a copy of the output layer in fp32; with local", False)
    batch_rows: int = doc(
        "rows decoded together; part of the fingerprint, since bits can depend on it; with local", 64, ge=1
    )
    max_new_tokens: int = doc("longest response in tokens", 128, ge=1, lt=1 << 31)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = doc("strings that end a response and are cut from it", ())
    thinking: Literal["keep", "strip"] = doc(
        "strip: remove a reasoning model's thinking from what rewards see and from the completion", "keep"
    )
    thinking_tags: tuple[str, str] = doc("the tags around a block of thinking", ("<think>", "</think>"))
    trust_remote_code: bool = doc("run code that comes with the checkpoint", False)

    @model_validator(mode="after")
    def effective(self) -> Generator:
        """Refuse what would have no effect with the engine that is named, or that another setting asks for."""
        if owned := sorted(set(self.vllm) & OWNED.keys()):
            raise ValueError(f"vllm.{owned[0]}: {OWNED[owned[0]]}; leave it out")
        for name in ("max_num_seqs", "max_model_len"):
            if type(given := self.vllm.get(name, 1)) is not int or given < 1:
                raise ValueError(f"vllm.{name}: {given!r}; give a whole number of at least 1")
        if self.adapter and self.quantization:
            raise ValueError(
                f"adapter: {self.adapter} is merged into plain weights, and quantization: {self.quantization} would "
                "round it; leave one of them out"
            )
        ours, theirs = self.only_local, self.only_vllm
        if (self.engine == "endpoint") > (self.endpoint is not None):
            raise ValueError("engine: endpoint needs the section endpoint, with url and model; add it")
        if self.endpoint is not None:
            if self.engine not in ("auto", "endpoint"):
                raise ValueError(f"endpoint has no effect with engine: {self.engine}; leave one of them out")
            if self.model.endswith(".gguf"):
                raise ValueError(
                    f"model: {self.model}; with endpoint, name the directory or hub id that the server runs"
                )
            told = {"adapter": self.adapter, "quantization": self.quantization, "dtype": self.dtype != "auto"}
            if other := ours or theirs or next((name for name, given in told.items() if given), None):
                raise ValueError(f"{other} has no effect behind endpoint, where the server decides it; leave it out")
            return self
        if self.engine != "local" and ours and theirs:
            raise ValueError(f"{ours} needs engine: local and {theirs} engine: vllm; leave one of them out")
        if self.engine == "local" and theirs:
            raise ValueError(f"{theirs} has no effect with engine: local; leave it out, or give engine: vllm")
        if self.engine == "vllm" and ours:
            raise ValueError(f"{ours} has no effect with engine: vllm; leave it out, or give engine: local")
        return self

    def refuses(self, method: Method) -> str | None:
        """Why a server behind `endpoint` cannot decode for this method; None where it can, or there is none."""
        sampling, rates = method.draws()
        if self.endpoint is None or not (sampling.sigma2 or sampling.guide or rates != Rates()):
            return None
        return (
            f"method: {method.kind} as configured needs the model's hidden states or probabilities for its noise, "
            "guide or flip rate, which a server behind generator.endpoint does not give; take best_of_n, population "
            "or qalign with sampling: {top_p: ...}, or another engine"
        )

    @property
    def only_local(self) -> str | None:
        """A setting that vLLM does not have, with its value."""
        rows = type(self).model_fields["batch_rows"].default
        told = {
            f"quantization: {self.quantization}": self.quantization in LOCAL_QUANTIZATION,
            "fp32_head: true": self.fp32_head,
            f"model: {self.model}": self.model.endswith(".gguf"),
            f"batch_rows: {self.batch_rows}": self.batch_rows != rows,
        }
        return next((setting for setting, given in told.items() if given), None)

    @property
    def only_vllm(self) -> str | None:
        """A setting that the local engine does not have, with its value."""
        told = {
            f"quantization: {self.quantization}": self.quantization not in (None, *LOCAL_QUANTIZATION),
            f"tensor_parallel: {self.tensor_parallel}": self.tensor_parallel > 1,
            f"pipeline_parallel: {self.pipeline_parallel}": self.pipeline_parallel > 1,
            f"vllm: {self.vllm}": bool(self.vllm),
        }
        return next((setting for setting, given in told.items() if given), None)

    @property
    def rows(self) -> int:
        """Rows that are decoded together at most."""
        if self.endpoint is not None:
            return self.endpoint.max_parallel
        return int(self.vllm.get("max_num_seqs", SEQUENCES)) if self.engine == "vllm" else self.batch_rows

    @property
    def gpus(self) -> int:
        """GPUs of one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel

    @field_validator("thinking_tags")
    @classmethod
    def tags(cls, value: tuple[str, str]) -> tuple[str, str]:
        if not all(value) or value[0] == value[1]:
            raise ValueError(f"{list(value)}: give two different texts, the opening and the closing one")
        return value


class TopBottom(Section):
    top_bottom: int = doc(
        "keep the k best candidates of a prompt, those within method.limit first, and the k worst", ge=1
    )

    @property
    def extremes(self) -> tuple[int, int]:
        return self.top_bottom, self.top_bottom


class Top(Section):
    top: int = doc("keep the k best candidates of a prompt, those within method.limit first", ge=1)

    @property
    def extremes(self) -> tuple[int, int]:
        return self.top, 0


class Save(Section):
    """What is written beside the rows, and how often."""

    candidates: Literal["all", "none"] | TopBottom | Top = doc(
        "candidates that are kept of a prompt", TopBottom(top_bottom=4)
    )
    trace: bool = doc("keep the weights and lengths of every iteration", True)
    rows_per_file: int = doc("input lines that one file of a table covers", 1000, ge=1)
    flush_seconds: float = doc("finished prompts are written at least this often", 60.0, ge=0)

    @property
    def keep(self) -> Literal["all", "none"] | tuple[int, int]:
        """The candidates kept of a prompt; a pair: so many best and so many worst."""
        return self.candidates if isinstance(self.candidates, str) else self.candidates.extremes


class Run(Section):
    """A whole run."""

    output: str = doc("directory, or s3://bucket/path; relative to the current directory, absolute in a Ray job")
    seed: int = doc("seed of all random draws", 0, ge=0)
    prompts: Prompts = doc("where prompts come from", Prompts())
    generator: Generator = doc("the base model")
    rewards: dict[str, Reward] = doc("rewards by name")
    combine: Literal["weighted_sum", "standardized"] = doc(
        "how several rewards become one; standardized: with mean and deviation of the prompt's first iteration",
        "weighted_sum",
    )
    method: Method = doc(
        "how answers are searched, by kind", examples=[{"kind": "best_of_n", "num_samples": 16, "num_iterations": 8}]
    )
    save: Save = doc("what is kept", Save())
    guard: Guard = doc("bounds on what a gain in reward may cost", Guard())
    runtime: Runtime = doc("where it runs", Runtime())
    compare: Compare = doc("what `aisp compare` runs", Compare())
    tune: Tune = doc("how `aisp tune` searches", Tune())

    @field_validator("output")
    @classmethod
    def known(cls, value: str) -> str:
        return known_place(value)

    @model_validator(mode="after")
    def whole(self) -> Run:
        if "" in self.rewards:
            raise ValueError("rewards: one has an empty name; give it a name")
        if not any(reward.use == "select" for reward in self.rewards.values()):
            raise ValueError("rewards: none has use: select, so nothing could choose a best answer; add one")
        if why := self.generator.refuses(self.method):
            raise ValueError(why)
        if self.generator.endpoint is not None and self.runtime.generators.num_gpus not in ("auto", 0):
            raise ValueError(
                f"runtime.generators.num_gpus: {self.runtime.generators.num_gpus:g}, and processes that ask "
                "generator.endpoint use no GPU; leave it out"
            )
        if isinstance(self.method, Args | ReControl) and (setting := self._needs_vllm()):
            raise ValueError(
                f"method: {self.method.kind} changes every step inside the local engine, which {setting} excludes; set "
                "generator.engine to local and leave out what is vLLM's"
            )
        if isinstance(self.method, Args):
            if self.generator.thinking == "strip":
                raise ValueError(
                    "generator.thinking: args scores texts that are not finished, whose thinking cannot be told from "
                    "the answer; set it to keep"
                )
            select = {name: reward for name, reward in self.rewards.items() if reward.use == "select"}
            remote = [f"rewards.{name} of kind http" for name, reward in select.items() if reward.kind == "http"]
            remote += [
                f"rewards.{n}.engine: vllm" for n, r in select.items() if r.kind == "model" and r.engine == "vllm"
            ]
            if remote or self.combine == "standardized":
                what = remote[0] if remote else "combine: standardized"
                raise ValueError(
                    f"method: args asks for rewards at every token, inside the generator, which {what} cannot serve; "
                    "give rewards of kind model (engine: transformers) or function, and combine: weighted_sum"
                )
        if self.guard.held_out_gain is not None and all(reward.use == "select" for reward in self.rewards.values()):
            raise ValueError("guard.held_out_gain: no reward has use: report; add one that never selects")
        if self.generator.gpus > 1 and self.runtime.generators.num_gpus not in ("auto", 0):
            raise ValueError(
                f"runtime.generators.num_gpus: {self.runtime.generators.num_gpus:g}, but generator.tensor_parallel x "
                f"pipeline_parallel takes {self.generator.gpus} whole GPUs; leave it at auto"
            )
        unknown = sorted(set(self.runtime.rewards) - set(self.rewards))
        if unknown:
            raise ValueError(f"runtime.rewards: {', '.join(unknown)} is not among rewards ({', '.join(self.rewards)})")
        return self

    def _needs_vllm(self) -> str | None:
        return "generator.engine: vllm" if self.generator.engine == "vllm" else self.generator.only_vllm

    def replicas(self, reward: str) -> RewardReplicas:
        return self.runtime.rewards.get(reward, RewardReplicas())

    def row_settings(self) -> dict[str, Any]:
        """Everything in the configuration that can change a row, as JSON values."""
        beside: dict[str, Any] = dict.fromkeys(("output", "save", "guard", "runtime", "compare", "tune"), True)
        free = {**beside, "prompts": {"limit"}, "rewards": {"__all__": set(FREE)}}
        settings = self.model_dump(mode="json", by_alias=True, exclude=free)
        for reward in settings["rewards"].values():
            if reward["kind"] == "model" and reward["engine"] != "vllm":  # as it was before there was a choice
                del reward["engine"]
        generator = settings["generator"]
        if self.generator.endpoint is None:
            del generator["endpoint"]
        else:
            del generator["batch_rows"], generator["fp32_head"]
            generator["endpoint"] = {name: generator["endpoint"][name] for name in ("url", "model")}
        if self.generator.engine == "vllm":
            del generator["batch_rows"], generator["fp32_head"]
            generator["vllm"] = {name: value for name, value in self.generator.vllm.items() if name not in FREE_VLLM}
        else:  # as it was before there was a choice
            for name, value in (("engine", generator["engine"]), ("pipeline_parallel", 1), ("vllm", {})):
                if generator[name] == value:
                    del generator[name]
        return settings
