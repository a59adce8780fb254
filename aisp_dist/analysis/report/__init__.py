"""`aisp report`: finished outputs as one HTML page that needs nothing else.

sources finds and reads the outputs, verdict says what their figures mean, figures draws, page puts the sections
together, page.html is how it looks.
"""
