"""A reward behind HTTP: a chat model that is asked for a number, or a reward model that a server runs. Owns the wire
formats, what an answer must be, and whether silence is about a text; what a lost connection means is client.py's."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from aisp_dist.config import ConfigError, HttpReward
from aisp_dist.data.chat import as_chat
from aisp_dist.records import Prompt, Score
from aisp_dist.rewards.client import Client, Limited, Refused, Rejected, Unavailable
from aisp_dist.rewards.function import RewardError

_NUMBER = re.compile(
    r"[^\w-]*(?:(?:score|rating|reward|answer)[^\w-]+)?(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?[\s.*]*", re.I
)
_SAID = ("How many legs has a spider?", "A spider has eight legs."), ("Name a colour.", "Blue is a colour.")
_PROBES = tuple((Prompt("", 0, (("user", question),)), answer) for question, answer in _SAID)
LIMITS = 4  # a call takes at most so many times `seconds`


class Partly(Unavailable):
    """The server answered some responses in time; the others are to be asked again. scores: one for each response, None
    where there is no answer yet."""

    def __init__(self, scores: list[Score | None]) -> None:
        super().__init__("some responses are not answered yet")
        self.scores = scores


def load(name: str, settings: HttpReward, seconds: float = math.inf) -> Callable[[Prompt, Sequence[str]], list[Score]]:
    """The server behind its address, asked once for each distinct response, `max_parallel` at a time; scores come in
    the order of the responses. seconds: for the responses of one call. Where none of them is answered, the first is
    asked again alone, between two probes; each of these three has `seconds` of its own.

    chat: the rubric as one user message; the reply must be one number on the scale (`7`, `Score: 7`, `7/10`).
    classify: vLLM's POST /classify beside the API's /v1, with `input` (the rubric filled in) or `messages`, and with
    `use_activation: false`, which makes data[0].probs the raw logit. A server that does not know that field
    must be started with --pooler-config '{"use_activation": false}'; one that answers probabilities is refused.
    classify_sglang: SGLang's POST /classify of a server started with --is-embedding: raw `embedding` of one number.
    (SGLang's /v1/classify is no use: it answers the softmax, which is 1 for one class.)
    What cannot be read is a quarantined score. Raises ConfigError for a missing key, a server that rejects url, model
    or key, and probabilities; here and later client.Unavailable where it does not answer. The function that is returned
    raises RewardError for a response that the server does not answer though it answers the probes, and Partly where
    there is a limit of `seconds` and only some are answered.
    """
    client = Client(f"rewards.{name}", settings)
    root = settings.url.removesuffix("/v1")

    def ask(prompt: Prompt, response: str, deadline: float = math.inf, **more: Any) -> float | Refused:
        if settings.protocol == "chat":
            text = client.chat([{"role": "user", "content": _fill(settings, prompt, response)}], deadline)
            return text if isinstance(text, Refused) else number(text, settings.scale)
        body: dict[str, Any] = {"model": settings.model}
        if settings.protocol == "classify_sglang":
            body |= {"text": [_fill(settings, prompt, response)]}
        elif settings.rubric is not None:
            body |= {"input": [_fill(settings, prompt, response)], "use_activation": False}
        else:
            messages = (*as_chat(prompt.content), ("assistant", response))
            chat = [{"role": role, "content": text} for role, text in messages]
            body |= {"messages": chat, "add_generation_prompt": False, "use_activation": False}
        answer = client.post(f"{root}/classify", body | settings.body | more, deadline)
        return answer if isinstance(answer, Refused) else _logit(answer, settings.protocol)

    def alive() -> None:
        ask(*_PROBES[0], time.monotonic() + seconds)

    def several(prompt: Prompt, texts: Sequence[str]) -> dict[str, float | Refused]:
        """By text, what the server answers of them."""
        found: dict[str, float | Refused] = {}
        lost: list[Unavailable] = []
        deadline = time.monotonic() + seconds

        def one(text: str) -> None:
            if found or len(lost) < settings.max_parallel:  # else it seems to be down: no need to wait for every text
                try:
                    found[text] = ask(prompt, text, deadline)
                except Unavailable as error:
                    lost.append(error)

        client.map(one, texts)
        return found

    def alone(prompt: Prompt, text: str) -> float | Refused:
        """What had no answer, asked again while nothing else is. The probes around it tell a text that the server does
        not answer from a server that is down."""
        alive()
        try:
            return ask(prompt, text, time.monotonic() + seconds)
        except Limited:
            raise
        except Unavailable as error:
            alive()
            raise RewardError(f"{name}: the server answers others, but not this prompt's: {error.why}") from None

    def score(prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        found: dict[str, float | Refused] = {}
        while left := [text for text in dict.fromkeys(responses) if text not in found]:
            if found and seconds < math.inf:
                raise Partly([_score(found[text]) if text in found else None for text in responses])
            found |= several(prompt, left) or {left[0]: alone(prompt, left[0])}
        return [_score(found[text]) for text in responses]

    try:
        _probe(name, settings, ask)
    except Rejected as error:
        raise ConfigError(f"rewards.{name}: {error}") from None
    return score


def number(text: str, scale: tuple[float, float]) -> float | Refused:
    """The one number of a reply, if it is on the scale."""
    match = _NUMBER.fullmatch(text)
    if match is None or (match[2] and float(match[2]) != scale[1]):
        return Refused(f"the server's reply is not one number: {text[:200]!r}")
    value = float(match[1])
    if not scale[0] <= value <= scale[1]:
        return Refused(f"the server's {value:g} is not from {scale[0]:g} to {scale[1]:g}")
    return value


def _probe(name: str, settings: HttpReward, ask: Callable[..., float | Refused]) -> None:
    """One request shows a wrong address; classifiers show whether their numbers are probabilities."""
    if settings.protocol == "chat":
        ask(*_PROBES[0])
        return
    raw = [ask(*probe) for probe in _PROBES]
    if refused := next((x for x in raw if isinstance(x, Refused)), None):
        raise ConfigError(f"rewards.{name}: {settings.model!r} gives no score: {refused.reason}; is it a reward model?")
    squashed = all(x == 1.0 for x in raw)  # the softmax of one class
    if settings.protocol == "classify" and all(0 <= x <= 1 for x in raw if isinstance(x, float)):
        squashed |= [ask(*probe, use_activation=True) for probe in _PROBES] == raw  # a sigmoid, whatever is asked
    if squashed:
        raise ConfigError(
            f"rewards.{name}: {settings.url} answers probabilities ({raw[0]}), and a reward is a raw logit; use a vLLM "
            "whose /classify knows use_activation, or start the server without its activation"
        )


def _fill(settings: HttpReward, prompt: Prompt, response: str) -> str:
    """The rubric; of a chat of several messages, each begins with its role."""
    content = prompt.content
    if not isinstance(content, str):
        one = len(content) == 1 and content[0][0] == "user"
        content = content[0][1] if one else "\n\n".join(f"{role}: {text}" for role, text in content)
    fields = {"{prompt}": content, "{response}": response}
    assert settings.rubric is not None
    return re.sub(r"\{(prompt|response)\}", lambda match: fields[match[0]], settings.rubric)


def _score(answer: float | Refused) -> Score:
    return Score(None, answer.reason) if isinstance(answer, Refused) else Score(answer)


def _logit(answer: Any, protocol: str) -> float | Refused:
    try:
        value = answer["data"][0]["probs"] if protocol == "classify" else answer[0]["embedding"]
    except (KeyError, IndexError, TypeError):
        return Refused(f"the answer is not that of a classifier: {str(answer)[:200]}")
    values = value if isinstance(value, list) else [value]
    if len(values) != 1:
        return Refused(f"the model has {len(values)} outputs; a reward model has exactly one")
    if isinstance(values[0], bool) or not isinstance(values[0], (int, float)):
        return Refused(f"the reward is {values[0]!r}")
    return float(values[0]) if math.isfinite(values[0]) else Refused(f"the server's reward is {values[0]}, not finite")
