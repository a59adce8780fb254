def word_count(completions, **_):
    """Words of each answer; held out in this run."""
    return [float(len(text.split())) for text in (c if isinstance(c, str) else c[-1]["content"] for c in completions)]
