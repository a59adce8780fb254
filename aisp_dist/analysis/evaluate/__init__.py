"""`aisp evaluate`: measures of the selected answers of a finished output, beside the base answers and those of another
method.

evaluated.py    what evaluation asks of the outputs that are evaluated
texts.py        measures of an answer's text
states.py       measures of one answer by the base model: KL, flips
search.py       those over sampled rows, from the trace of their search
document.py     all of it as evaluation.json and as a table
"""
