"""Will the update from BEFORE to AFTER survive 4 bits? Answered from two checkpoints alone: no GPU, no data.

``audit.py`` compares, ``checkpoints.py``, ``adapters.py`` and ``gguf_files.py`` read the sides, ``roles.py`` says which
weights a deployment quantizes, ``figures.py`` is the report, ``markdown.py`` and ``page.py`` show it, ``gates.py``
decides about it, ``journal.py`` keeps what is done of an audit that is interrupted. With a text and the memory of one
model, ``calibration.py`` measures what arrives in the layers' outputs; ``predictors.py`` holds an audit against what
came back.
"""

from .audit import DEFAULT_FORMATS, audit
from .figures import (
    AuditReport,
    Calibration,
    Change,
    Figures,
    FormatRow,
    NotCompared,
    NotMeasured,
    OutputFigures,
    OutputRow,
    Row,
)

__all__ = [
    "DEFAULT_FORMATS",
    "AuditReport",
    "Calibration",
    "Change",
    "Figures",
    "FormatRow",
    "NotCompared",
    "NotMeasured",
    "OutputFigures",
    "OutputRow",
    "Row",
    "audit",
]
