"""Speed, as ratios to peers in the same run. decode.py, score.py and pipeline.py measure; command.py holds the flags,
shapes.py makes models, paired.py times.
"""
