"""The report as Markdown that fits a terminal of 80 columns."""

import math
import textwrap
from collections import Counter
from collections.abc import Iterator

from quail_kernels import get_format

from .figures import AuditReport, Calibration, Figures, FormatRow, Row, cosine, count, percent

_COLUMNS, _LISTED = 80, 8


def markdown(report: AuditReport) -> str:
    return "\n".join(_lines(report)) + "\n"


def _lines(report: AuditReport) -> Iterator[str]:
    yield "# Audit in 4 bits"
    yield ""
    yield f"- BEFORE: `{report.before}`"
    yield f"- AFTER: `{report.after}`"
    stored = " and ".join(dict.fromkeys(", ".join(side) for side in (report.stored_before, report.stored_after)))
    yield from _wrap(f"- compared in {report.dtype}, as a deployment loads them; stored as {stored}", indent="  ")
    yield from _wrap(f"- linear weights chosen by {report.selected_by}", indent="  ")
    rows = [(str(get_format(row.format)), row.figures, row) for row in report.formats.values()]
    yield ""
    yield from _delivered(rows)
    if report.calibration is not None:
        yield from _outputs(report.calibration)
    yield ""
    yield from _wrap(report.verdict)
    yield ""
    yield "Changed by the update, in % of the weights compared:"
    yield ""
    yield from _table(
        ("recipe", "weights", "codes", "flip law", "values", "codes B", "values B"),
        [
            (
                recipe,
                count(figures.weights),
                percent(figures.changed_share),
                percent(figures.predicted_flip_share),
                percent(1 - figures.value_overlap),
                percent(1 - figures.code_overlap_before_grid),
                percent(1 - figures.value_overlap_before_grid),
            )
            if figures
            else (recipe, "0")
            for recipe, figures, _ in rows
        ],
    )
    yield ""
    yield from _wrap(
        "codes: in another bucket, with each side's own scales; flip law: what mean min(dw/s, 1) expects "
        "of it; values: another dequantized value; B: on BEFORE's grid."
    )
    yield ""
    yield "The update dw against the step s:"
    yield ""
    yield from _table(
        ("recipe", "< s/2 %", "mean dw", "max dw", "zeros", "on grid", "BEFORE"),
        [
            (
                recipe,
                percent(figures.share_below_half_step),
                f"{figures.mean_abs_change:.2g}",
                f"{figures.max_abs_change:.2g}",
                count(figures.zero_groups),
                percent(figures.on_grid_share),
                row.shipped_in.removeprefix("this "),
            )
            if figures
            else (recipe, "")
            for recipe, figures, row in rows
        ],
    )
    yield ""
    yield from _wrap(
        "zeros: groups that are zero throughout; on grid: BEFORE's weights that are exactly what the recipe makes of "
        "them, in %; BEFORE: how it was shipped, as its weights show."
    )
    yield from _by_place("module", report.modules, report)
    yield from _by_place("layer", report.layers, report)
    changed = sorted((row for row in report.unquantized if row.change.changed), key=lambda row: -row.change.mean_abs)
    yield ""
    yield f"Left in full precision: {len(report.unquantized)} tensors, {len(changed)} of them changed."
    if changed:
        yield ""
        yield from _table(
            ("tensor", "weights", "mean dw", "max dw"),
            [
                (
                    _elide(row.name),
                    count(row.weights),
                    f"{row.change.mean_abs:.2g}",
                    f"{row.change.max_abs:.2g}",
                )
                for row in changed[:_LISTED]
            ],
        )
        if len(changed) > _LISTED:
            yield ""
            yield f"and {len(changed) - _LISTED} more that changed less."
    yield ""
    yield "Not compared:"
    yield ""
    groups = Counter((row.format, row.reason) for row in report.not_compared)
    first = {(row.format, row.reason): row.name for row in reversed(report.not_compared)}
    for (format, reason), number in groups.most_common():
        what = f"{number} tensors, as {first[format, reason]}" if number > 1 else first[format, reason]
        yield from _wrap(f"- {f'{format}: ' if format else ''}{reason}: {what}", indent="  ")
    if not groups:
        yield "- nothing was left out"


def _delivered(rows: list[tuple[str, Figures | None, FormatRow]]) -> Iterator[str]:
    """First, since its first column is what foretold best how much comes back: README.md beside this file has it."""
    yield "Delivered of the update dw, as the change dq of the deployed values:"
    yield ""
    yield from _table(
        ("recipe", "cosine", "share %", "dq/dw", "lost", "layers", "p50", "p99"),
        [
            (
                recipe,
                cosine(figures),
                _or_dash(figures.delivered_share, percent),
                _or_dash(figures.delivered_norm, _short),
                str(row.lost_tensors),
                str(len(row.lost_layers)),
                _short(figures.step_share_p50),
                _short(figures.step_share_p99),
            )
            if figures
            else (recipe, "")
            for recipe, figures, row in rows
        ],
    )
    yield ""
    yield from _wrap(
        "cosine: between dw and dq, how far the update stands out of the noise of rounding; the lower, the likelier "
        "that what was unlearned comes back, and lost: nothing arrives. share: what arrives along the direction of dw; "
        "dq/dw: of their norms; lost, layers: tensors and whole layers with an update that no weight's code shows; "
        "p50, p99: quantiles of dw over the step s, up to 2."
    )


def _outputs(calibration: Calibration) -> Iterator[str]:
    """What arrives in the layers' outputs: of all, and by layer."""
    figures = {format: found for format, found in calibration.formats.items() if found is not None}
    yield ""
    yield from _wrap(
        f"The update in the layers' outputs, as AFTER reads {calibration.tokens} tokens of "
        f"`{calibration.source}`: signal to noise in dB, and what arrives:"
    )
    yield ""
    yield from _table(
        ("recipe", "SNR", "median", "least", "flip law", "cosine", "share %"),
        [
            (
                str(get_format(format)),
                *(
                    _or_dash(snr, _decibels)
                    for snr in (
                        found.output_snr,
                        found.output_snr_median,
                        found.output_snr_min,
                        found.output_snr_flip_law,
                    )
                ),
                _or_dash(found.output_cosine, _short),
                _or_dash(found.output_share, percent),
            )
            if found
            else (str(get_format(format)), "")
            for format, found in calibration.formats.items()
        ],
    )
    yield ""
    yield from _wrap(
        "signal: dw x, with x the inputs of a layer, summed over all tokens and tensors; noise: (dq - dw) x; median, "
        "least: of the tensors; flip law: what it expects of weights shipped in 16 bits; share: of dw x, what arrives "
        "along its direction; lost: nothing arrives, so that the noise is the update itself and the SNR 0 dB."
    )
    rows = {(row.name, row.format): row.figures for row in calibration.layers if row.figures.output_snr is not None}
    layers = list(dict.fromkeys(name for name, _ in rows))
    if layers:
        # As many recipes as leave room for the names of layers.
        shown, room = [], _COLUMNS - 4
        texts = {
            cell: f"{_decibels(found.output_snr_median)}/{_decibels(found.output_snr_min)}"
            for cell, found in rows.items()
        }
        for format in figures:
            column = max(len(format), *(len(text) for (_, of), text in texts.items() if of == format), 1) + 3
            if room - column >= 15:
                shown.append(format)
                room -= column

        # The SNR of an update that is lost is above that of one that arrives inside noise: the cosine tells them apart.
        def least_cosine(name: str) -> float:
            return min(rows[name, format].output_cosine or 0.0 for format in shown if (name, format) in rows)

        least = sorted((name for name in layers if any((name, format) in rows for format in shown)), key=least_cosine)
        of = f"the {_LISTED} layers with the least cosine, of {len(layers)}"
        of = of if len(layers) > _LISTED else "every layer"
        yield ""
        yield from _wrap(f"SNR by layer in dB, the median of its tensors / the least: {of}:")
        yield ""
        yield from _table(
            ("layer", *shown),
            [
                (_elide(name, room), *(texts.get((name, format), "-") for format in shown))
                for name in (least[:_LISTED] if len(layers) > _LISTED else layers)
            ],
        )
    if calibration.not_measured:
        yield ""
        yield "Not measured on the text:"
        yield ""
        groups = Counter(row.reason for row in calibration.not_measured)
        first = {row.reason: row.name for row in reversed(calibration.not_measured)}
        for reason, number in groups.most_common():
            what = f"{number} tensors, as {first[reason]}" if number > 1 else first[reason]
            yield from _wrap(f"- {reason}: {what}", indent="  ")


def _decibels(ratio: float) -> str:
    # Where something arrives, it does not leave a noise that is the update to the last bit.
    return "lost" if ratio == 1 else f"{10 * math.log10(ratio):.1f}"


def _by_place(kind: str, rows: tuple[Row, ...], report: AuditReport) -> Iterator[str]:
    """The share that is delivered by layer or module, those with the least of it where there are many."""
    formats = [name for name, row in report.formats.items() if row.figures is not None][:4]
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.figures.delivered_share is not None and row.format in formats:
            shares.setdefault(row.name, {})[row.format] = row.figures.delivered_share
    if not shares:
        return
    least = sorted(shares, key=lambda name: min(shares[name].values()))[:_LISTED]
    of = f"the {_LISTED} {kind}s with the least, of {len(shares)}" if len(shares) > _LISTED else f"every {kind}"
    yield ""
    yield f"Share of the update that is delivered, in %: {of}:"
    yield ""
    yield from _table(
        (kind, *formats),
        [
            (_elide(name, 30), *(_or_dash(shares[name].get(format), percent) for format in formats))
            for name in (least if len(shares) > _LISTED else shares)
        ],
    )


def _or_dash(number: float | None, text) -> str:
    return "-" if number is None else text(number)


def _short(number: float) -> str:
    return f"{number:.2g}"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    rows = [header, *(row + ("",) * (len(header) - len(row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])} |" for row in rows]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    yield from (lines[0], f"|{rule}|", *lines[1:])


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _elide(name: str, width: int = 44) -> str:
    return name if len(name) <= width else f"{name[: width // 2 - 2]}...{name[-(width // 2 - 1) :]}"
