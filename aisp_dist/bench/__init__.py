"""`aisp bench`: the engine's speed beside other ways to decode, in the same run.

decode.py measures; workload.py makes models, prompts and noise; peers.py holds the other ways; paired.py times.
"""
