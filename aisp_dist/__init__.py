"""Adaptive importance sampling on pre-logits: a prompt's run in one process. Knows nothing of Ray."""
