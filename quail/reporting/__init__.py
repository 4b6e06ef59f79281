"""The report of a run: ``read_run`` makes the numbers of its ``RESULTS.json``, ``page`` and ``markdown`` show them.

figures.py      what is shown and by which rules it is judged; nothing of it is known to the others
page.py         one HTML page that needs nothing beside it
charts.py       its pictures, as inline SVG
markdown.py     tables that fit 100 columns, for a README or a terminal
"""

from .figures import Run, read_run
from .markdown import markdown
from .page import page

__all__ = ["Run", "markdown", "page", "read_run"]
