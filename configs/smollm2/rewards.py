"""Two rewards of an answer's text alone, with TRL's signature: no model and no network."""

import re


def reading_ease(completions, **columns):
    """Flesch's reading ease (Flesch 1948), at most 100, of an answer that ends with a sentence; one that breaks off
    loses 20, and one without ten words has none."""
    return [_ease(completion[-1]["content"].strip()) for completion in completions]


def on_topic(prompts, completions, **columns):
    """Share of the question's longer words that the answer uses."""
    pairs = zip(prompts, completions, strict=True)
    return [_shared(prompt[-1]["content"], completion[-1]["content"]) for prompt, completion in pairs]


def _ease(text):
    words = re.findall(r"[a-z']+", text.lower())
    if len(words) < 10:
        return 0.0
    sentences = max(1, len(re.findall(r"[.!?](?:\s|$)", text)))
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", word.removesuffix("e")))) for word in words)
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    return min(100.0, ease) - 20 * (text[-1] not in ".!?")


def _shared(question, answer):
    asked = {word for word in re.findall(r"[a-z]+", question.lower()) if len(word) > 4}
    return len(asked & set(re.findall(r"[a-z]+", answer.lower()))) / max(1, len(asked))
