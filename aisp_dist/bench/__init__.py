"""Speed, as ratios to peers in the same run. decode.py, score.py and pipeline.py measure, each also by itself, as
`python -m aisp_dist.bench.decode --suite cpu`; command.py holds the flags, shapes.py makes models, paired.py times.
"""
