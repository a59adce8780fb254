"""The decode engine: decodes the trajectories of many rounds in a batch of fixed size. Owns the slots, the prefilled
prompts and the order in which trajectories run. Knows nothing of rewards, Ray or how rounds are chosen.

    submit -> waiting trajectories -> step: admit, prefill, one token for every row (step.py), retire -> Rollout

A row is a trajectory in a slot. When it ends, the next waiting trajectory, of any prompt, takes its slot at once. Where
no room is left for what rows decode, the youngest of them are preempted: they wait and begin anew. A trajectory's bits
depend on its Round, the model and the number of slots, never on what else is in flight (kv.py says why) nor on how
often it began. An engine must be used from one thread only.

Shapes: B rows, D hidden size, V vocabulary, T steps (max_new_tokens).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

import torch

from aisp_dist.data.detokenize import stopped, text_after
from aisp_dist.engine import attention, memory, noise, starts
from aisp_dist.engine.admissible import check
from aisp_dist.engine.control import cost, rebuild
from aisp_dist.engine.endings import stops
from aisp_dist.engine.guide import Guide, Unscored, choose
from aisp_dist.engine.lm import LM
from aisp_dist.engine.rows import Job, Row, Shared
from aisp_dist.engine.step import ENDED, FINITE, TOKEN, Batch, Seat
from aisp_dist.engine.widths import widths
from aisp_dist.records import Ascent, Finish, Rollout, Round, TokenReward, Trajectory

_HEAD_ROWS = 256  # positions per head product in nll, to bound the logits


class DecodeError(RuntimeError):
    """A round that cannot be finished, for a reason that decoding it again would reproduce. It has left the engine."""

    def __init__(self, round: Round, reason: str) -> None:
        super().__init__(f"prompt {round.prompt_id!r}, iteration {round.iteration}: {reason}")
        self.round = round


class Engine:
    """Decodes rounds with one model.

    batch_rows: slots, rounded up to a multiple of 32. max_new_tokens: T. stop: strings that end a response; one that is
    a special token of the tokenizer acts as an end token. idle_tokens: prompts without a round in flight stay
    prefilled up to this many tokens in all, the most recently used first. kv_tokens: tokens whose keys and values are
    kept, of prompts, starts and rows in all; default: as many as fit into memory, of which this process may use
    `memory_share`. guide: what moves the rounds that have a guide.

    steps, row_steps: steps taken so far, and tokens that trajectories got in them. passes: prompts, and the starts of
    rounds, that went through the model before a step; they may take far longer than the step.

    Raises ConfigError if a first block of every row and one full prompt do not fit into memory.
    """

    def __init__(
        self,
        lm: LM,
        batch_rows: int,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        idle_tokens: int = 1 << 14,
        kv_tokens: int | None = None,
        guide: Guide | None = None,
        memory_share: float = 1.0,
    ) -> None:
        self.lm, self.max_new_tokens, self.guide = lm, max_new_tokens, guide or Guide()
        self.end_ids, self.stop = stops(lm.tokenizer, lm.eos_ids, stop)
        num_rows = batch_rows + -batch_rows % attention.TILE
        self.kv = memory.kv_cache(lm, num_rows, max_new_tokens, kv_tokens, memory_share)
        self.rows: list[Row | None] = [None] * num_rows
        self.batch = Batch(lm, num_rows, max_new_tokens, self.end_ids, self.guide.value)
        self.widths = widths(lm, num_rows)
        self.idle_tokens = idle_tokens
        self.prompts: OrderedDict[Hashable, Shared] = OrderedDict()
        self.steps = self.row_steps = self.passes = 0
        self._waiting: list[tuple[tuple[int, int], Row]] = []  # a heap by age
        self._age = itertools.count()
        self._jobs: list[Job] = []
        self._finished: list[tuple[Round, Rollout]] = []
        self._broken: list[DecodeError] = []
        self._unscored: list[DecodeError] = []  # in the step that is being taken

    @property
    def busy(self) -> bool:
        """Whether a step has something to do or to return."""
        return bool(self._jobs or self._finished or self._broken)

    def submit(self, round: Round) -> None:
        """Queues a round's trajectories. Raises ValueError for a round that cannot be decoded."""
        check(round, self.lm, self.max_new_tokens, self.end_ids, self.guide, self.kv)
        key = (round.seed, round.prompt_id, round.prompt_tokens)
        prompt = self.prompts.setdefault(key, Shared(round.prompt_tokens, next(self._age)))
        self.prompts.move_to_end(key)
        prompt.rounds += 1
        job = Job(round, prompt, noise.prompt_key(round.seed, round.prompt_id))
        self._jobs.append(job)
        for sample in range(round.start, round.stop):
            start = round.starts[sample - round.start] if round.starts else ()
            row = Row((prompt.age, next(self._age)), job, sample, start, list(start))
            heapq.heappush(self._waiting, (row.age, row))

    @torch.inference_mode()
    def step(self) -> list[tuple[Round, Rollout]]:
        """Decodes one token of every row; returns the rounds that this completed. Raises DecodeError for a round that
        cannot be finished; the next call goes on with the others."""
        laps = self.batch.laps
        laps.start()
        self._admit()
        self._reach()
        laps.lap("prefill")
        if any(self.rows):
            self._decode()
            for error in self._unscored:
                self._broken.append(error)
                for job in [job for job in self._jobs if job.round == error.round]:
                    self._leave(job)
            self._unscored.clear()
            self._retire()
            laps.lap("record")
        if self._broken:
            raise self._broken.pop()
        finished, self._finished = self._finished, []
        return finished

    @torch.inference_mode()
    def cancel(self, round: Round) -> None:
        """Forgets a round that is in flight or not returned yet. The next step gives its slots to others."""
        self._finished = [entry for entry in self._finished if entry[0] != round]
        self._broken = [error for error in self._broken if error.round != round]
        for job in [job for job in self._jobs if job.round == round]:
            self._leave(job)

    def run(self, rounds: Iterable[Round]) -> list[Rollout]:
        """Decodes rounds to their end and returns their rollouts in order. Raises RuntimeError if anything else is in
        flight."""
        if self.busy:
            raise RuntimeError("the engine is busy: finish or cancel its rounds before run()")
        rounds = list(rounds)
        for round in rounds:
            self.submit(round)
        answers: dict[Round, Rollout] = {}
        while self.busy:
            answers.update(self.step())
        return [answers[round] for round in rounds]

    @torch.inference_mode()
    def nll(self, prompt_tokens: Sequence[int], response_tokens: Sequence[int]) -> float:
        """Mean negative log-likelihood of the response under the base model, in nats per token. Raises ValueError if
        either has no token."""
        if not prompt_tokens or not response_tokens:
            raise ValueError("nll needs at least one prompt token and one response token")
        z_TD, _ = self.lm.dense((*prompt_tokens, *response_tokens[:-1]))
        total = []
        targets = torch.split(torch.tensor(response_tokens, device=self.lm.device), _HEAD_ROWS)
        for states, target in zip(torch.split(z_TD[len(prompt_tokens) - 1 :], _HEAD_ROWS), targets, strict=True):
            total.append(self.lm.logits(states).log_softmax(-1).gather(1, target[:, None]).double().sum())
        return -float(torch.stack(total).sum()) / len(response_tokens)

    def _admit(self) -> None:
        """Puts waiting trajectories into free slots, those of the oldest prompt first, so that prompts finish one after
        the other and a killed process leaves few of them half done."""
        seats = []
        for slot, row in enumerate(self.rows):
            if row is None and self._waiting:
                if not self._room(self._waiting[0][1]):
                    break
                _, row = heapq.heappop(self._waiting)
                self.rows[slot] = row
                job, prefix = row.job, self._prefill(row.job)
                tiles = self._tiles(row, prefix)
                self.kv.seat(slot, prefix, [tile.kv for tile in tiles])
                word = noise.sample_word(job.round.iteration, row.sample) if job.round.iteration >= 0 else 0
                plan = self.batch.plans.line(job.round.sampling)
                nll = [loss for tile in tiles for loss in tile.nll or ()][: len(row.start)]
                seats.append(Seat(slot, prefix.length, plan, job.line, job.key, word, prefix.z_D, row.start, nll))
        if seats:
            self.batch.seat(seats)

    def _room(self, row: Row) -> bool:
        """Whether the row's prompt and start have passed through the model or have room to, and there are blocks for
        what it has reached, beside those for what preempted rows in slots had reached. Drops what no row uses to make
        room."""
        prompt, seated, kv = row.job.prompt, [row for row in self.rows if row], self.kv
        blocks = kv.blocks(max(len(row.start), row.reached if seated else 0))  # alone it goes as far as it can
        blocks += sum(max(0, kv.blocks(other.reached) - kv.blocks(len(other.tokens))) for other in seated)

        def short() -> bool:
            tiled = starts.chain(prompt.tiles, row.start, row.job.round.sampling.likelihood) is not None
            need = (0 if prompt.prefix else len(prompt.tokens)) + (0 if tiled else starts.size([row.start]))
            return not kv.room(need, blocks)

        while short():
            if not self._evict():
                return False
        return True

    def _evict(self) -> bool:
        """Drops the least recently used prefix that no row uses, idle prompts' first, else a prompt's tiles. False if
        there are none."""
        seated = {id(row.job.prompt) for row in self.rows if row}
        unused = [prompt for prompt in self.prompts.values() if prompt.prefix and id(prompt) not in seated]
        tiled = [prompt for prompt in self.prompts.values() if prompt.tiles]
        if unused:
            self._drop(min(unused, key=lambda prompt: prompt.rounds > 0))
        elif tiled:
            self._keep(tiled[0], {})
        return bool(unused or tiled)

    def _reach(self) -> None:
        """Takes the blocks that rows reach in this step, for the oldest rows first. Where none is left, the youngest
        row is preempted; a row that is left alone without room is given up."""
        seated = [(row.age, slot, row) for slot, row in enumerate(self.rows) if row]
        for _, slot, row in sorted(seated):
            while self.rows[slot] is row and not self.kv.reach(slot, len(row.tokens) - 1):
                if self._evict():
                    continue
                *others, (_, last) = sorted((row.age, slot) for slot, row in enumerate(self.rows) if row)
                if others:
                    self._preempt(last)
                    continue
                reason = (
                    f"sample {row.sample} has {len(row.tokens)} tokens after a prompt of {len(row.job.prompt.tokens)} "
                    f"and no room for more, even alone: there is room for the keys and values of {self.kv.capacity} "
                    f"tokens, {self.lm.token_bytes / 1e3:.1f} kB each, {self.kv.arena_size} of them at a time; lower "
                    "generator.max_new_tokens, prompts.max_tokens or generator.batch_rows"
                )
                self._broken.append(DecodeError(row.job.round, reason))
                self._leave(row.job)

    def _preempt(self, slot: int) -> None:
        """Sends a row back to wait. It begins anew, and gets the same tokens again."""
        row = self.rows[slot]
        assert row is not None
        row.reached, row.tokens = max(row.reached, len(row.tokens)), list(row.start)
        self._clear([slot])
        heapq.heappush(self._waiting, (row.age, row))

    def _drop(self, prompt: Shared) -> None:
        if prompt.prefix:
            self.kv.drop(prompt.prefix)
            prompt.prefix = prompt.control = None
            self._keep(prompt, {})

    def _keep(self, prompt: Shared, tiles: starts.Tiles) -> None:
        """Puts these tiles of a prompt in place of those that it had."""
        self.kv.free += starts.held(prompt.tiles) - starts.held(tiles)
        prompt.tiles = tiles

    def _decode(self) -> None:
        """One token for every row."""
        samplings = [row.job.round.sampling for row in self.rows if row]
        ascents = [s.guide for s in samplings if isinstance(s.guide, Ascent)]  # widths are not tried for their network
        # A step passes the token before the one it decodes through the model; a row's first step has none.
        places = [len(row.tokens) - 1 if row else -1 for row in self.rows]
        taken = len(self.rows) if ascents else max(slot for slot, row in enumerate(self.rows) if row) + 1
        self.batch.first(next(rows for rows in self.widths if rows >= taken)).step(
            self.kv.attend(places) if max(places) >= 0 else None,
            controlled=any(sampling.sigma2 for sampling in samplings),
            drawn=any(sampling.decode for sampling in samplings),
            measured=any(sampling.likelihood for sampling in samplings),
            ascent=ascents[0] if ascents else None,
            choose=self._choose if any(isinstance(s.guide, TokenReward) for s in samplings) else None,
        )
        self.steps += 1

    def _choose(self, logits_BV: torch.Tensor, token_B: torch.Tensor) -> torch.Tensor:
        """The tokens [B], those of rows under ARGS chosen by reward. A row that gets no reward breaks its round."""
        assert self.guide.reward is not None
        token_B = token_B.clone()
        for slot, row in enumerate(self.rows):
            if row and isinstance(row.job.round.sampling.guide, TokenReward):
                round, tokens = row.job.round, row.tokens
                try:
                    token_B[slot] = choose(
                        self.guide.reward, self.lm, self.end_ids, round, row.sample, tokens, logits_BV[slot]
                    )
                except Unscored as error:
                    self._unscored.append(DecodeError(row.job.round, str(error)))
        return token_B

    def _prefill(self, job: Job) -> attention.Prefix:
        """The prompt's prefix, computed alone and once for all its rows and iterations; and the round's control, into
        the job."""
        prompt = job.prompt
        if prompt.prefix is None:
            z_TD, dense = self.lm.dense(prompt.tokens, keep=True)
            prompt.prefix = self.kv.keep(dense, z_TD[-1].clone())
            self.passes += 1
        if job.control is None and job.round.sampling.sigma2:
            device = self.lm.device
            job.control = rebuild(job.round, self.max_new_tokens, self.lm.hidden_size, device, prompt.control)
            prompt.control = job.control
            job.line = self.batch.controls.put(job.control.m_TD) if job.round.trace else 0
        return prompt.prefix

    def _tiles(self, row: Row, prefix: attention.Prefix) -> list[starts.Tile]:
        """The tiles of the row's start. With the first ones of a round come those of all its samples, if there is room,
        so that they fill the passes; tiles of earlier rounds go."""
        job, measured = row.job, row.job.round.sampling.likelihood
        found = starts.chain(job.prompt.tiles, row.start, measured)
        if found is None:
            everything, blocks = starts.size(job.round.starts), self.kv.blocks(len(row.start))
            wanted = job.round.starts if self.kv.room(everything, blocks) else (row.start,)
            self._keep(job.prompt, starts.extend(self.lm, prefix, job.prompt.tiles, wanted, measured))
            self.passes += 1
            found = starts.chain(job.prompt.tiles, row.start, measured)
        assert found is not None
        return found

    def _retire(self) -> None:
        """Takes trajectories that ended out of their slots, and gives up rounds whose logits are not finite."""
        for slot, (ended, finite, token) in enumerate(self.batch.rows_BF[:, [ENDED, FINITE, TOKEN]].tolist()):
            row = self.rows[slot]
            if row is None:
                continue
            row.tokens.append(token)
            if not finite:
                reason = f"the logits of sample {row.sample} are not finite at token {len(row.tokens)}"
                self._broken.append(DecodeError(row.job.round, f"{reason}; lower method.sigma2 or use a wider dtype"))
                self._leave(row.job)
                continue
            self.row_steps += 1
            if (ended or self.stop) and (ending := self._ending(row)):
                self._complete(slot, row, *ending)

    def _complete(self, slot: int, row: Row, finish: Finish, text: str) -> None:
        """Files a row's trajectory, and its round if this is the last one."""
        job, tokens, costs = row.job, row.tokens, (0.0, 0.0)
        if job.control and job.round.trace:
            dots: list[float] = self.batch.dots_BT[slot, : len(tokens)].tolist()
            costs = cost(job.control, job.round, row.sample, dots)
        nll = None
        if job.round.sampling.likelihood:
            losses: list[float] = self.batch.nll_BT[slot, : len(tokens)].tolist()
            nll = math.fsum(losses) / len(losses)
        job.done[row.sample] = Trajectory(row.sample, tuple(tokens), text, finish, *costs, nll)
        self._clear([slot])
        if len(job.done) == job.round.stop - job.round.start:
            self._leave(job)
            trajectories = tuple(job.done[sample] for sample in sorted(job.done))
            self._finished.append((job.round, Rollout(trajectories, job.control.u_sq if job.control else 0.0)))

    def _ending(self, row: Row) -> tuple[Finish, str] | None:
        """Why a trajectory ends, and its text; None if it does not end."""
        prompt_tokens, tokens = row.job.round.prompt_tokens, row.tokens
        if tokens[-1] in self.end_ids:
            return "stop", text_after(self.lm.tokenizer, prompt_tokens, tokens[:-1])
        if self.stop and (text := stopped(self.lm.tokenizer, prompt_tokens, tokens, self.stop)) is not None:
            return "stop", text
        if len(tokens) == self.max_new_tokens:
            return "length", text_after(self.lm.tokenizer, prompt_tokens, tokens, cut=True)
        return None

    def _clear(self, slots: list[int]) -> None:
        self.batch.clear(slots)
        for slot in slots:
            self.rows[slot] = None
            self.kv.leave(slot)

    def _leave(self, job: Job) -> None:
        """Removes a job and its rows; forgets idle prompts beyond `idle_tokens`, the least recently used first."""
        self._jobs.remove(job)
        self._waiting = sorted(entry for entry in self._waiting if entry[1].job is not job)
        self._clear([slot for slot, row in enumerate(self.rows) if row and row.job is job])
        if job.line:
            self.batch.controls.free.append(job.line)
        job.prompt.rounds -= 1
        idle = controls = 0
        for key, prompt in reversed(list(self.prompts.items())):
            idle += 0 if prompt.rounds else len(prompt.tokens) + starts.held(prompt.tiles)
            controls += prompt.control is not None and not prompt.rounds
            if not prompt.rounds and controls > len(self.rows) // 4:
                prompt.control = None  # the next round rebuilds it from its trace
            if not prompt.rounds and idle > self.idle_tokens:
                self._drop(prompt)
                del self.prompts[key]
