"""The entry points: `aisp VERB` and `python -m jobs.VERB` are the same."""
