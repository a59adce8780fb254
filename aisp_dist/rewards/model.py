"""A sequence-classification reward model as a reward. Owns its tokenizer, template and truncation; knows nothing of
what calls it, nor of how rows of tokens become logits. Raw logits, never through a sigmoid."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError

from aisp_dist import quiet
from aisp_dist.config import ConfigError, ModelReward
from aisp_dist.data.chat import as_chat, encode_chat
from aisp_dist.data.encode import Unrenderable, starts_with_bos, surplus
from aisp_dist.engine import checkpoints
from aisp_dist.records import Message, Prompt, Score
from aisp_dist.rewards import self_test, templates
from aisp_dist.rewards.prefix import Chain, Classifier, Ids, Scores, alike

# Heads by another name than transformers', of models whose own class is theirs in all but that: openbmb/UltraRM-13b
# (Llama) and openbmb/Eurus-RM-7b (Mistral) read the last token by a regression_head without bias.
HEADS = {r"^regression_head\.": "score."}

_CHAINS = 64  # texts that grow at a time; one that was let go is read again


def load(
    name: str, settings: ModelReward, device: str | None = None, share: float = 1.0
) -> Callable[[Prompt, Sequence[str]], list[Score]]:
    """A function from a prompt and its responses to the model's logits.

    The model reads the prompt's messages (a plain text is one user message) and the response under a chat template:
    settings.chat_template, or the tokenizer's own. Special tokens in their texts are text. Input longer than
    max_tokens, or than the model's positions, loses tokens from the left of the prompt but not BOS. A response is
    quarantined that does not fit by itself, whose prompt has messages that the template does not show, or whose logit
    is NaN.
    share: of a GPU's memory, where vLLM scores.
    Micro-batches follow from the set of responses in the call alone, so the same call gives the same bits and a
    permuted call permuted ones. Raises ConfigError: not loadable, not exactly one output, weights of the head missing,
    no chat template or one that does not show question and answer, or a defect that the self-test finds.
    """
    key = f"rewards.{name}.model"
    loaded = _served(key, settings, share) if settings.engine == "vllm" else _loaded(key, settings, device)
    tokenizer, classifier, max_length = loaded
    one_at_a_time = threading.Lock()

    def encode(messages: Sequence[Message]) -> list[int]:
        fix = f"set rewards.{name}.chat_template to another template, or wrap the model in a function reward"
        return encode_chat(tokenizer, messages, {}, add_generation_prompt=False, fix=fix)

    def tokens(prompt: Prompt, response: str) -> Ids | Score:
        *messages, _ = whole = chat(settings, prompt, response)
        try:
            ids = encode(whole)
            excess = len(ids) - max_length
            if excess <= 0:
                return tuple(ids)
            # What both encodings share is the prompt's: the answer's header and the answer are never cut.
            head = 1 if starts_with_bos(tokenizer, ids) else 0
            own = alike(ids, encode(messages))
        except Unrenderable as error:
            return Score(None, str(error))
        if excess > own - head:
            size = f"{len(ids) - own + head} tokens, more than the {max_length} that fit"
            return Score(
                None, f"the response alone has {size} (rewards.{name}.max_tokens, or all that the model takes)"
            )
        return tuple(ids[:head] + ids[head + excess :])

    try:  # a missing template, or one that shows no question or no answer, shows before any prompt is spent
        encode((("user", "a"), ("assistant", "b")))
        if settings.self_test:
            rows, toy = settings.batch_rows, checkpoints.is_embedded(settings.model)
            self_test.examine(name, tokenizer, encode, tokens, classifier, rows, max_length, toy)
    except BaseException as error:
        classifier.close()
        if isinstance(error, Unrenderable):
            raise ConfigError(f"rewards.{name}: {error}") from None
        raise

    def score(prompt: Prompt, responses: Sequence[str], chain: Chain | None = None) -> list[Score]:
        found = {response: tokens(prompt, response) for response in dict.fromkeys(responses)}
        rows = sorted({ids for ids in found.values() if isinstance(ids, tuple)}, key=lambda ids: (len(ids), ids))
        with one_at_a_time:
            logits = dict(zip(rows, classifier.logits(rows, settings.batch_rows, chain), strict=True))
        return [ids if isinstance(ids, Score) else _score(logits[ids]) for ids in map(found.__getitem__, responses)]

    chains: OrderedDict[Hashable, Chain] = OrderedDict()

    def growing(text: Hashable, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        """Scores of the ways a text may go on, `text` its name: what it begins with is kept from call to call."""
        chain = chains.setdefault(text, Chain())
        chains.move_to_end(text)
        while len(chains) > _CHAINS:
            chains.popitem(last=False)
        return score(prompt, responses, chain)

    score.growing = growing  # type: ignore[attr-defined]
    score.close = classifier.close  # type: ignore[attr-defined]
    return score


def chat(settings: ModelReward, prompt: Prompt, response: str) -> tuple[Message, ...]:
    """The messages that the model is shown."""
    messages = as_chat(prompt.content)
    kept = [m for m in messages if settings.system == "keep" or m[0] != "system"]
    return (*kept, ("assistant", response))


def template(tokenizer: Any, settings: ModelReward) -> Any:
    """The tokenizer, with the configured chat template in the place of its own."""
    if settings.chat_template:
        tokenizer.chat_template = templates.read(settings.chat_template)
    return tokenizer


def _score(value: float) -> Score:
    return Score(value) if math.isfinite(value) else Score(None, f"the reward is {value}; give it dtype: float32")


def _loaded(key: str, settings: ModelReward, device: str | None) -> tuple[Any, Scores, int]:
    """Tokenizer, classifier and longest input in tokens, by transformers in this process."""
    tokenizer, model = _checkpoint(key, settings, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return tokenizer, Classifier(model), min(settings.max_tokens, positions or settings.max_tokens)


def _served(key: str, settings: ModelReward, share: float) -> tuple[Any, Scores, int]:
    """As `_loaded`, by vLLM in processes of its own."""
    from aisp_dist.vllm.pooling import Pooled

    path = checkpoints.locate(key, settings.model, "reward")
    try:
        with quiet.loading():
            from transformers import AutoConfig, AutoTokenizer

            common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
            tokenizer = template(AutoTokenizer.from_pretrained(path, **common), settings)
            config = AutoConfig.from_pretrained(path, **common)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{key}: {settings.model!r} cannot be read ({str(error).splitlines()[0]})") from error
    text = config.get_text_config()
    if wrong := surplus(tokenizer, text.vocab_size):
        raise ConfigError(f"{key}: {settings.model!r}: {wrong}")
    max_length = min(settings.max_tokens, getattr(text, "max_position_embeddings", None) or settings.max_tokens)
    return tokenizer, Pooled(key, settings, path, config, max_length, share), max_length


def _checkpoint(key: str, settings: ModelReward, device: str) -> tuple[Any, Any]:
    path = checkpoints.locate(key, settings.model, "reward")
    common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        with quiet.loading():
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            tokenizer = template(AutoTokenizer.from_pretrained(path, **common), settings)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=1,
                dtype=settings.dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # to name them below
                output_loading_info=True,
                key_mapping=HEADS,
                **common,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(
            f"{key}: {settings.model!r} cannot be loaded as a sequence classifier ({str(error).splitlines()[0]}); give "
            "a directory or reachable hub id with safetensors weights (pickled ones can run code: convert them "
            "elsewhere by from_pretrained and save_pretrained)"
        ) from error
    # transformers fills what a checkpoint lacks with random numbers.
    if loading["mismatched_keys"]:
        shapes = ", ".join(f"{name} {tuple(there)}" for name, there, _ in loading["mismatched_keys"])
        raise ConfigError(f"{key}: {settings.model!r} has not one output ({shapes}); a reward model has exactly one")
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ConfigError(f"{key}: {settings.model!r} is no trained reward model, it lacks {missing}; give one that is")
    if wrong := surplus(tokenizer, len(model.get_input_embeddings().weight)):
        raise ConfigError(f"{key}: {settings.model!r}: {wrong}")
    return tokenizer, model.eval().to(device)
