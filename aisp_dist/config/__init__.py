"""The configuration of a run: frozen sections that refuse unknown keys. No torch, no file access. The description of a
field is its help text on the command line and in the JSON schema."""

from aisp_dist.config.base import ConfigError, Section, doc
from aisp_dist.config.compare import Compare, Tune
from aisp_dist.config.guard import Guard
from aisp_dist.config.methods import (
    Aisp,
    Algorithm1,
    Args,
    BatchedAisp,
    BestOfN,
    Method,
    MethodSection,
    Population,
    Qalign,
    ReControl,
    as_published,
)
from aisp_dist.config.outdated import readable, recorded
from aisp_dist.config.rewards import FunctionReward, HttpReward, JudgeSettings, ModelReward, Reward, RewardBase
from aisp_dist.config.run import Generator, Prompts, Run, Save, Top, TopBottom
from aisp_dist.config.runtime import Replicas, RewardReplicas, Runtime, StorageOptions, Timeouts, known_place
from aisp_dist.config.sampling import Ar1, Deviations, Ess, FlipRate, Gaussian, Limit, Mixture, Nucleus, Spend

__all__ = [
    "Aisp",
    "Algorithm1",
    "Ar1",
    "Args",
    "BatchedAisp",
    "BestOfN",
    "Compare",
    "ConfigError",
    "Deviations",
    "Ess",
    "FlipRate",
    "FunctionReward",
    "Gaussian",
    "Generator",
    "Guard",
    "HttpReward",
    "JudgeSettings",
    "Limit",
    "Method",
    "MethodSection",
    "Mixture",
    "ModelReward",
    "Nucleus",
    "Population",
    "Prompts",
    "Qalign",
    "ReControl",
    "Replicas",
    "Reward",
    "RewardBase",
    "RewardReplicas",
    "Run",
    "Runtime",
    "Save",
    "Section",
    "Spend",
    "StorageOptions",
    "Timeouts",
    "Top",
    "TopBottom",
    "Tune",
    "as_published",
    "doc",
    "known_place",
    "readable",
    "recorded",
]
