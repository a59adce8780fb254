"""Measures of finished outputs: what a table's answers are like, beside the base answers and beside another method's.

outputs.py      which rows there are and what they say; refuses outputs that cannot be compared
texts.py        measures of an answer's text
states.py       measures of one answer by the base model: KL, flips
search.py       those over sampled rows, from the trace of their search
projections.py  pre-logits of one token on a few axes
document.py     all of it as evaluation.json and as a table
"""
