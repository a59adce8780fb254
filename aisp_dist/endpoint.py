"""The base model behind an OpenAI-compatible server: rounds in, trajectories out, as the engines' services answer them.

Prompts and given tokens go out as token ids and answers come back as token ids, so that the template, the ends and the
text of an answer are decided here, as with the other engines. Servers of vLLM (0.10.2 and later) do that. What they
cannot do is refused: noise on the pre-logits, guides, and rates that need the model's probabilities.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine.admissible import check
from aisp_dist.engine.served import Served, read
from aisp_dist.records import Calibration, Late, Rollout, Round, Sampling, Trajectory
from aisp_dist.rewards.client import AsyncClient, Refused, Rejected, Unavailable
from aisp_dist.together import together

# What a server's own defaults must not change (vLLM takes them from the model's generation_config.json).
_PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

_NEVER = 9999.0  # what vLLM writes for the logarithm of 0, with a minus


class Service:
    """Answers requests by one server, `max_parallel` at a time, until `close`. Made on the event loop that uses it.

    limit: seconds for one answer, from when it is asked for. A round with a slower one fails with Late if the server
    answered others meanwhile; else, and where the server is down, with client.Unavailable."""

    def __init__(self, settings: Generator, served: Served, limit: float = math.inf) -> None:
        assert settings.endpoint is not None
        self.endpoint, self.served, self.limit = settings.endpoint, served, limit
        self.work = 0  # requests that were answered
        self.busy = False  # the time limit alone says how long a request may take
        self._client = AsyncClient("generator.endpoint", settings.endpoint)
        self._room = asyncio.Semaphore(settings.endpoint.max_parallel)
        self._loop = asyncio.get_running_loop()
        self._seconds = 0.0  # of all requests
        self._began = time.monotonic()

    async def rollout(self, round: Round) -> Rollout:
        """Decode a round. Raises ValueError for one that the model cannot take or the server refuses."""
        check(round, self.served, self.served.max_new_tokens, self.served.end_ids)
        how = round.sampling
        if how.sigma2 or how.guide:
            raise ValueError("a server behind generator.endpoint decodes neither under noise nor with a guide")
        samples = range(round.start, round.stop)
        found = await together(*(self._decode(round, sample) for sample in samples))
        if how.likelihood:
            losses = await self.nll(round.prompt_tokens, [t.token_ids for t in found])
            found = [replace(t, nll=loss) for t, loss in zip(found, losses, strict=True)]
        return Rollout(tuple(found))

    async def nll(self, prompt_tokens: tuple[int, ...], responses: Sequence[tuple[int, ...]]) -> list[float]:
        """The base model's mean negative log-likelihood per token of each response, in nats."""
        if not prompt_tokens or not all(responses):
            raise ValueError("nll needs at least one prompt token and one response token")
        return await together(*(self._nll(prompt_tokens, response) for response in responses))

    async def calibrate(self, request: Calibration) -> Sampling:
        raise ValueError("a flip rate needs the model's probabilities, which no server gives; give top_p")

    def figures(self) -> dict[str, float]:
        """What grows: seconds of work and alive. A second of work has `max_parallel` requests in flight."""
        busy = self._seconds / self.endpoint.max_parallel
        return {"busy_seconds": busy, "up_seconds": time.monotonic() - self._began}

    def close(self) -> None:
        """Close the connections. May be called from another thread."""
        with suppress(RuntimeError):  # the loop has ended
            asyncio.run_coroutine_threadsafe(self._client.close(), self._loop)

    async def prove(self) -> None:
        """Ask for the server's limit, and for a few tokens of a text. Raises ConfigError for a server that cannot
        serve, or has another tokenizer; client.Unavailable where it does not answer."""
        try:
            told = await self._request("GET", "models", None)
            tokens = tuple(self.served.tokenizer.encode("The first numbers are one, two,", add_special_tokens=False))
            answer = await self._ask(tokens, max_tokens=4, temperature=0.0, ignore_eos=True)
            await self.nll(tokens, [_ids(answer)])
        except Rejected as error:
            raise ConfigError(f"generator.endpoint: {error}") from None
        except ValueError as error:
            raise ConfigError(
                f"generator.endpoint: {self.endpoint.url}: {error}; it must take and return token ids and the "
                "likelihood of a prompt, as vLLM's server from 0.10.2 on does (return_token_ids, prompt_logprobs)"
            ) from None
        said, ours = answer["text"], self.served.tokenizer.decode(_ids(answer), skip_special_tokens=True)
        if "\ufffd" not in ours and said.strip() != ours.strip():
            raise ConfigError(
                f"generator.model: its tokenizer reads as {ours!r} what the model {self.endpoint.model!r} behind "
                f"generator.endpoint wrote as {said!r}; name the checkpoint that the server runs"
            )
        if (longest := _longest(told, self.endpoint.model)) is not None:
            # The likelihood of an answer asks for a token more.
            context = min(self.served.context_length, longest - 1)
            self.served = replace(self.served, context_length=context)
            if context <= self.served.max_new_tokens:
                raise ConfigError(
                    f"generator.endpoint: the server holds {longest} tokens, and generator.max_new_tokens is "
                    f"{self.served.max_new_tokens}, which leaves no room for a prompt; lower it, or start the server "
                    "with a larger --max-model-len"
                )

    async def _decode(self, round: Round, sample: int) -> Trajectory:
        told, decode = self.served, round.sampling.decode
        given = tokens = round.starts[sample - round.start] if round.starts else ()
        how: dict[str, Any] = {"temperature": 0.0}
        if decode is not None:
            how = {"temperature": decode.temperature, "top_p": decode.p, "seed": _seed(round, sample)}
        how |= {"ignore_eos": True, "stop_token_ids": sorted(told.end_ids)}
        # The server may see a stop string where the text has none, such as in halves of characters, or end an answer
        # earlier than it was asked to; then it is asked for the rest.
        stop, done = told.stop, None
        while done is None:
            asked = {**how, "max_tokens": told.max_new_tokens - len(tokens), "stop": list(stop)}
            if tokens != given and decode is not None:
                asked["seed"] = _seed(round, sample, len(tokens))
            tokens += _ids(await self._ask((*round.prompt_tokens, *tokens), **asked))
            done, stop = told.ended(round.prompt_tokens, tokens, len(given)), ()
        tokens, finish, text = done
        return Trajectory(sample, tokens, text, finish)

    async def _nll(self, prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
        answer = await self._ask((*prompt, *response), max_tokens=1, temperature=0.0, prompt_logprobs=0)
        places = (answer.get("prompt_logprobs") or ())[-len(response) :]
        try:
            losses = [-float(place[str(token)]["logprob"]) for token, place in zip(response, places, strict=True)]
        except (KeyError, TypeError, ValueError):
            raise ValueError("the server gives no likelihood of the tokens of a prompt") from None
        if not all(map(math.isfinite, losses)) or max(losses) >= _NEVER:
            raise ValueError("the likelihood of a given answer is not finite")
        return math.fsum(losses) / len(losses)

    async def _ask(self, prompt: tuple[int, ...], **how: Any) -> dict[str, Any]:
        """The one choice of a completion. Raises ValueError where it is refused or is none."""
        body = {"model": self.endpoint.model, "prompt": list(prompt), **_PLAIN, "top_p": 1.0, "return_token_ids": True}
        answer = await self._request("POST", "completions", body | how)
        try:
            choice: dict[str, Any] = answer["choices"][0]
            _ids(choice)
        except (KeyError, IndexError, TypeError):
            raise ValueError("the answer is no completion") from None
        return choice

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON of an answer. Raises ValueError where the request is refused; Late; client.Unavailable."""
        async with self._room:
            began, before = time.monotonic(), self.work
            try:
                answer = await self._client.request(method, f"{self.endpoint.url}/{path}", body, self.limit)
            except Rejected:
                raise
            except Unavailable as error:
                if self.work > before:  # the server is well, and this request takes it too long
                    raise Late(f"{error}, while others were answered") from None
                raise
            self.work, self._seconds = self.work + 1, self._seconds + time.monotonic() - began
        if isinstance(answer, Refused):
            raise ValueError(answer.reason)
        return answer


async def connect(settings: Generator, prompt_tokens: int, limit: float = math.inf) -> Service:
    """A server that has shown that it serves. prompt_tokens: longest prompt. limit: seconds for one answer. Raises
    ConfigError as Service.prove, and for a checkpoint whose tokenizer and configuration cannot be read."""
    service = Service(settings, read(settings, prompt_tokens, spare=1), limit)
    try:
        await service.prove()
    except BaseException:
        service.close()
        raise
    return service


def _longest(models: Any, name: str) -> int | None:
    """max_model_len of vLLM's list of models; None where it does not say."""
    listed = models.get("data") if isinstance(models, dict) else None
    found = [one.get("max_model_len") for one in listed or () if isinstance(one, dict) and one.get("id") == name]
    return found[0] if found and type(found[0]) is int else None


def _ids(choice: dict[str, Any]) -> tuple[int, ...]:
    found = choice.get("token_ids")
    if not isinstance(found, list) or not found or not all(type(token) is int for token in found):
        raise ValueError("the server returns no token ids")
    return tuple(found)


def _seed(round: Round, sample: int, drawn: int = 0) -> int:
    """Of one request: of this sample and no other. drawn: tokens that an earlier request of the sample has drawn."""
    key = f"{round.seed}\0{round.prompt_id}\0{round.iteration}\0{sample}\0{drawn}"
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) >> 1
