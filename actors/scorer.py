"""One reward behind an actor. A request holds one round's responses of one prompt; they are scored together, and with
no others."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from aisp_dist import quiet, rewards
from aisp_dist.config import ModelReward, Reward
from aisp_dist.placement import Group
from aisp_dist.records import Prompt, Score
from aisp_dist.rewards.http import Partly
from aisp_dist.vllm.service import Dead


class Scorer:
    def __init__(
        self,
        reward: str,
        settings: Reward,
        base_dir: Path,
        columns: Sequence[str],
        name: str,
        group: Group,
        timeout: float,
    ) -> None:
        """timeout: timeouts.reward, in seconds."""
        self.reward, self.settings, self.base_dir, self.columns = reward, settings, base_dir, columns
        self.seconds = 0.9 * timeout  # a server that is slow is told from a process that hangs
        self.name, self.group = name, group
        self.answered = 0
        self.busy_seconds = 0.0
        self.began = time.monotonic()

    def __repr__(self) -> str:
        return self.name

    def load(self) -> None:
        """Load the reward. Raises ConfigError for one that cannot be used."""
        if isinstance(self.settings, ModelReward):
            import torch

            torch.set_num_threads(self.group.threads)
            if self.settings.engine != "vllm" and torch.cuda.is_available() and self.group.num_gpus:
                torch.cuda.set_per_process_memory_fraction(self.group.memory)
        self.scores = rewards.load(
            self.reward,
            self.settings,
            self.base_dir,
            columns=self.columns,
            seconds=self.seconds,
            share=self.group.memory,
        )
        quiet.libraries()
        self.began = time.monotonic()

    def score(self, prompt: Prompt, responses: Sequence[str]) -> Sequence[Score | None]:
        """One score for each response, in order; None for some that a server has not answered yet. Raises what the
        reward raises."""
        began = time.monotonic()
        try:
            return self.scores(prompt, responses)
        except Partly as error:
            return error.scores
        except KeyboardInterrupt as error:  # the reward's own: Ctrl-C reaches no actor. Ray would say "cancelled"
            raise rewards.RewardError(str(error)) from error
        except Dead as error:  # vLLM's engine, which is most of this process
            traceback.print_exception(error)
            os._exit(1)
        finally:
            self.answered += 1
            self.busy_seconds += time.monotonic() - began

    def health(self) -> dict[str, float]:
        """See fleet.Replica. Never busy: timeouts.reward alone says how long a request may take."""
        up = time.monotonic() - self.began
        return {"progress": self.answered, "busy": 0.0, "busy_seconds": self.busy_seconds, "up_seconds": up}
