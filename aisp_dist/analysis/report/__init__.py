"""`aisp report`: finished outputs as one HTML page that needs nothing else.

contents reads the outputs, verdict says what their comparison means, figures draws, samples picks the answers that are
shown side by side, page puts the sections together, page.html is how it looks.
"""
