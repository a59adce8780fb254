"""The configuration of a run: frozen sections, unknown keys refused. No torch, no file access. Each field's description
is its help text on the command line and in the JSON schema."""

from aisp_dist.config.base import ConfigError, Section, doc
from aisp_dist.config.compare import Compare, Grids, Tune
from aisp_dist.config.guard import Guard
from aisp_dist.config.methods import (
    AUTO,
    Aisp,
    Ar1,
    Args,
    BatchedAisp,
    BestOfN,
    Branch,
    Ess,
    FlipRate,
    Gaussian,
    Limit,
    Method,
    Mixture,
    Nucleus,
    ReControl,
    Search,
    Spend,
)
from aisp_dist.config.rewards import FunctionReward, HttpReward, JudgeSettings, ModelReward, Reward, RewardBase
from aisp_dist.config.run import Generator, Prompts, Run, Save, Top, TopBottom
from aisp_dist.config.runtime import Replicas, RewardReplicas, Runtime, StorageOptions, Timeouts, known_place

__all__ = [
    "AUTO",
    "Aisp",
    "Ar1",
    "Args",
    "BatchedAisp",
    "BestOfN",
    "Branch",
    "Compare",
    "ConfigError",
    "Ess",
    "FlipRate",
    "FunctionReward",
    "Gaussian",
    "Generator",
    "Grids",
    "Guard",
    "HttpReward",
    "JudgeSettings",
    "Limit",
    "Method",
    "Mixture",
    "ModelReward",
    "Nucleus",
    "Prompts",
    "ReControl",
    "Replicas",
    "Reward",
    "RewardBase",
    "RewardReplicas",
    "Run",
    "Runtime",
    "Save",
    "Search",
    "Section",
    "Spend",
    "StorageOptions",
    "Timeouts",
    "Top",
    "TopBottom",
    "Tune",
    "doc",
    "known_place",
]
