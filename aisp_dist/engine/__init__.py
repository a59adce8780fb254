"""The local decode engine: rounds in, trajectories out. Start at decode.Engine.

checkpoints.py, intact.py, gguf.py, sizes.py   find a checkpoint, read from its files what it is
pretrained.py, quantized.py, adapter.py        load it by transformers, merge an adapter into it by peft
model.py, lm.py                 take it over, check that the engine decodes it correctly
attention.py, kv.py             attention over a shared prefix, keys and values of prompts and rows
endings.py                      what ends a response
packed.py                       weights of a model on a CPU in the layout that products want
step.py, nucleus.py             one token for every row on the model's device; draws from the nucleus
control.py, noise.py            the control of a round from its trace, keyed noise
rows.py                         trajectories, rounds and prompts in flight
starts.py                       given first tokens of answers, passed through the model before their rows begin
memory.py, admissible.py        what fits, which rounds can be decoded
calibrate.py, guide.py          a sampling by its effect, what ARGS and RE-Control add to a step
service.py                      one engine for many callers
"""

# Part of the fingerprint. Raise it with every change that may give other rows for the same configuration and seed.
VERSION = 6
