"""Reward functions as users write them for TRL."""

import math


def length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def raw_length(prompts, completions):
    return [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]


async def mentions(completions, topic):
    return [topic_ in completion[0]["content"] for completion, topic_ in zip(completions, topic, strict=True)]


def sometimes(completions):
    return [{"": math.nan, "none": None, "inf": math.inf}.get(c[0]["content"], 1.0) for c in completions]


def too_few(completions):
    return [1.0]


def raises(completions):
    return [1 / 0 for _ in completions]


def leaves(completions):
    raise SystemExit(3)


def texts(completions):
    return ["1.0" for _ in completions]


def needs_colour(completions, colour):
    return [0.0 for _ in completions]


def vandal(prompts, completions, notes):
    """Changes what it is handed."""
    seen = [len(prompt) + len(note) for prompt, note in zip(prompts, notes, strict=True)]
    for prompt, completion, note in zip(prompts, completions, notes, strict=True):
        prompt.clear(), completion.clear(), note.clear()
    return seen


NOT_A_FUNCTION = 3
