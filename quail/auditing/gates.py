"""Conditions under which an audit fails: ``delivered_share<0.5``, ``bnb-nf4:lost_layers>0``."""

import operator
import re
from dataclasses import dataclass

from .figures import AuditReport, figure_names, output_figure_names

_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_COUNTS = ("lost_tensors", "lost_layers", "tensors")
_GATE = re.compile(r"\s*(?:(?P<format>[^:<>=\s]+)\s*:)?\s*(?P<figure>\w+)\s*(?P<operator>[<>]=?)\s*(?P<limit>\S+)\s*")


@dataclass(frozen=True)
class Gate:
    """Fails on a recipe whose figure is beyond the limit, or is undefined.

    Attributes:
        text: as it was written.
        format: the recipe that it is about, as it was asked for; None: every one.
        figure: a field of ``Figures``, for all compared tensors together, ``lost_tensors``, ``lost_layers`` or
            ``tensors`` of ``FormatRow``, or one of ``OutputFigures`` that starts with output.
        operator: ``<``, ``<=``, ``>`` or ``>=``.
        limit: a number.
    """

    text: str
    format: str | None
    figure: str
    operator: str
    limit: float

    def failures(self, report: AuditReport) -> list[str]:
        """One line a recipe that fails."""
        lines = []
        for format, row in report.formats.items():
            if self.format not in (None, format):
                continue
            if self.figure == "lost_layers":
                value = len(row.lost_layers)
            elif self.figure in _COUNTS:
                value = getattr(row, self.figure)
            elif self.figure in output_figure_names():
                outputs = report.calibration and report.calibration.formats[format]
                value = outputs and getattr(outputs, self.figure)
            else:
                value = None if row.figures is None else getattr(row.figures, self.figure)
            if value is None:
                lines.append(f"{format}: {self.figure} is undefined, where {self.text} was to be false")
            elif _OPERATORS[self.operator](value, self.limit):
                lines.append(f"{format}: {self.figure} {value:.6g} {self.operator} {self.limit:g}")
        return lines


def parse_gate(text: str, formats: tuple[str, ...], calibrated: bool = True) -> Gate:
    """A gate of its text; ``calibrated``: whether the audit will have a calibration.

    Raises:
        ValueError: in one line, on what is no condition, names no figure, a recipe that is not among ``formats``,
            or a figure of the outputs without a calibration.
    """
    match = _GATE.fullmatch(text)
    try:
        limit = float(match["limit"]) if match else None
    except ValueError:
        limit = None
    if limit is None or limit != limit:
        raise ValueError(f"fail-if: expected a condition as 'delivered_share<0.5' or 'bnb-nf4:changed>0'; got {text!r}")
    names = (*figure_names(), *_COUNTS, *output_figure_names())
    if match["figure"] not in names:
        raise ValueError(f"fail-if: expected one of {', '.join(names)}; got {match['figure']!r}")
    if match["figure"] in output_figure_names() and not calibrated:
        raise ValueError(f"fail-if: expected a calibration for {match['figure']}; got none")
    if match["format"] not in (None, *formats):
        raise ValueError(f"fail-if: expected a recipe of this audit, {', '.join(formats)}; got {match['format']!r}")
    return Gate(text.strip(), match["format"], match["figure"], match["operator"], limit)
