"""The decode engine: rounds in, trajectories out. model.py loads and probes a language model, attention.py lets rows
share a prompt's prefix, control.py rebuilds the control from a trace, decode.py steps the rows. Start at decode.Engine.
"""
