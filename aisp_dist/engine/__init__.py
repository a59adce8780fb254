"""The decode engine: rounds in, trajectories out. model.py loads and probes a language model, attention.py lets rows
share a prompt's prefix, control.py rebuilds the control from a trace, decode.py steps the rows. Start at decode.Engine.
"""

# Part of the fingerprint. Raised by every change after which the same seed and configuration may give other rows; 0.1.0
# had none.
VERSION = 2
