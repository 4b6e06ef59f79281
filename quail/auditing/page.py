"""The report as one HTML page that needs nothing beside it: no script, no font, no network."""

import math
from collections.abc import Iterator
from html import escape

from quail_kernels import get_format

from ..pages import STYLE, color, table
from .figures import AuditReport, Calibration, Figures, NotCompared, OutputFigures, cosine, count, percent

_LOWEST_DB, _HIGHEST_DB = -40, 40


def page(report: AuditReport) -> str:
    return "\n".join(_lines(report)) + "\n"


def _lines(report: AuditReport) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>Audit in 4 bits: {escape(report.after)}</title>\n<style>{STYLE}</style>"
    yield "<h1>Audit in 4 bits</h1>"
    yield from _totals(report)
    if report.calibration is not None:
        yield from _outputs(report.calibration)
    yield f'<p class="verdict">{escape(report.verdict)}</p>'
    yield "<dl>"
    for term, text in (
        ("BEFORE", f"{report.before} ({', '.join(report.stored_before)})"),
        ("AFTER", f"{report.after} ({', '.join(report.stored_after)})"),
        ("compared in", f"{report.dtype}, as a deployment loads them"),
        ("linear weights", f"chosen by {report.selected_by}"),
    ):
        yield f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>"
    yield "</dl>"
    if report.calibration is not None:
        yield from _output_maps(report.calibration)
    yield from _heat_maps(report)
    yield from _unquantized(report)
    yield from _left_out(report)
    yield "</html>"


def _totals(report: AuditReport) -> Iterator[str]:
    header = (
        *("recipe", "cosine", "delivered", "|dq| / |dw|", "weights", "codes changed", "flip law", "values changed"),
        *("|dw| < s/2", "on grid", "lost layers", "BEFORE shipped in"),
    )
    rows = []
    for row in report.formats.values():
        name, figures = str(get_format(row.format)), row.figures
        if figures is None:
            rows.append((name, *[""] * 3, "0", *[""] * (len(header) - 5)))
            continue
        rows.append(
            (
                name,
                cosine(figures),
                _or_dash(figures.delivered_share, lambda share: f"{percent(share)} %"),
                _or_dash(figures.delivered_norm, lambda number: f"{number:.2g}"),
                count(figures.weights),
                *(
                    f"{percent(share)} %"
                    for share in (figures.changed_share, figures.predicted_flip_share, 1 - figures.value_overlap)
                ),
                f"{percent(figures.share_below_half_step)} %",
                f"{percent(figures.on_grid_share)} %",
                str(len(row.lost_layers)),
                row.shipped_in,
            )
        )
    yield "<h2>By recipe</h2>"
    yield from table(header, rows)
    yield (
        '<p class="note">dw: the update; dq: what it changes in the deployed values, each side on its own scales; '
        "s: the step of the weight's bucket. Cosine: between dw and dq, how far the update stands out of the noise of "
        "rounding; the lower, the likelier that what was unlearned comes back, and lost: nothing arrives. Delivered: "
        "&lt;dw, dq&gt; / |dw|&sup2;, what arrives along the direction of the update. Flip law: the mean of "
        "min(|dw| / s, 1), the share of codes that an update of weights in 16 bits is expected to change.</p>"
    )


def _outputs(calibration: Calibration) -> Iterator[str]:
    yield "<h2>The update in the layers' outputs</h2>"
    yield (
        f'<p class="note">As AFTER, not quantized, reads {calibration.tokens} tokens of {escape(calibration.source)}, '
        f"in {calibration.sequences} sequences.</p>"
    )
    header = ("recipe", "SNR", "median", "least", "flip law", "cosine", "share")
    rows = []
    for format, figures in calibration.formats.items():
        if figures is None:
            rows.append((str(get_format(format)), *[""] * (len(header) - 1)))
            continue
        ratios = (figures.output_snr, figures.output_snr_median, figures.output_snr_min, figures.output_snr_flip_law)
        rows.append(
            (
                str(get_format(format)),
                *(_or_dash(ratio, _in_decibels) for ratio in ratios),
                _or_dash(figures.output_cosine, lambda number: f"{number:.2g}"),
                _or_dash(figures.output_share, lambda share: f"{percent(share)} %"),
            )
        )
    yield from table(header, rows)
    yield (
        '<p class="note">Signal: dw x, with x the inputs of a layer; noise: (dq - dw) x; squares summed over tokens '
        "and tensors. Median, least: of the tensors. Flip law: what it expects of weights shipped in 16 bits. Share: "
        "of dw x, what arrives along its direction. Lost: nothing arrives, so that the noise is the update itself.</p>"
    )


def _output_maps(calibration: Calibration) -> Iterator[str]:
    yield "<h2>Signal to noise in the outputs in dB, by layer and module</h2>"
    yield from _legend(
        f"{_LOWEST_DB} dB", f"{_HIGHEST_DB} dB; lost: nothing arrives, the noise is the update itself; -: no update"
    )
    yield from _maps(calibration.formats, calibration.layers, calibration.modules, calibration.cells, _output_cell)
    if calibration.not_measured:
        yield "<h3>Not measured on the text</h3>"
        yield from table(("tensor", "reason"), [(row.name, row.reason) for row in calibration.not_measured])


def _heat_maps(report: AuditReport) -> Iterator[str]:
    yield "<h2>Delivered, by layer and module</h2>"
    yield from _legend("0 %", "100 % of the update delivered; -: no update")
    yield from _maps(report.formats, report.layers, report.modules, report.cells, _cell)


def _legend(low: str, high: str) -> Iterator[str]:
    colors = ", ".join(color(i / 4) for i in range(5))
    yield (
        f'<div class="legend"><span>{low}</span> <div class="bar" style="background: linear-gradient(90deg, {colors})">'
        f"</div> {high}</div>"
    )


def _maps(formats, rows_of_layers, rows_of_modules, rows_of_cells, cell) -> Iterator[str]:
    """A table a recipe, of layers by modules; ``cell`` makes the HTML of one from (layer, module, figures or None)."""
    cells = {(row.format, row.layer, row.module): row.figures for row in rows_of_cells}
    layers = list(dict.fromkeys([row.name for row in rows_of_layers] + [row.layer for row in rows_of_cells]))
    modules = list(dict.fromkeys(row.name for row in rows_of_modules))
    for name in formats:
        shown = [module for module in modules if any((name, layer, module) in cells for layer in layers)]
        if not shown:
            continue
        yield f'<h3>{escape(str(get_format(name)))}</h3><div class="scroll"><table class="heat">'
        yield f"<tr><th></th>{''.join(f'<th>{escape(module)}</th>' for module in shown)}</tr>"
        for layer in layers:
            row = [(module, cells.get((name, layer, module))) for module in shown]
            if any(figures for _, figures in row):
                label = escape(layer or "in no layer")
                yield f"<tr><td>{label}</td>{''.join(cell(layer, module, figures) for module, figures in row)}</tr>"
        yield "</table></div>"


def _cell(layer: str, module: str, figures: Figures | None) -> str:
    if figures is None:
        return '<td class="none"></td>'
    place = f"{layer}.{module}".strip(".")
    told = (
        f"{place}\n{count(figures.weights)} weights, codes changed {percent(figures.changed_share)} %, "
        f"flip law {percent(figures.predicted_flip_share)} %\n"
    )
    share = figures.delivered_share
    if share is None:
        return f'<td class="none" title="{escape(told)}no update">-</td>'
    told += f"delivered {percent(share)} %, cosine {cosine(figures)}, |dq| / |dw| {figures.delivered_norm:.2g}"
    ink = "#fff" if not 0.15 < share < 0.85 else "#1f2328"
    style = f"background: {color(share)}; color: {ink}"
    return f'<td style="{style}" title="{escape(told)}">{100 * share:.0f}</td>'


def _output_cell(layer: str, module: str, figures: OutputFigures | None) -> str:
    if figures is None:
        return '<td class="none"></td>'
    told = f"{layer}.{module}".strip(".") + "\n"
    if figures.output_snr is None or figures.output_share is None:
        return f'<td class="none" title="{escape(told)}no update">-</td>'
    told += f"SNR {_decibels(figures.output_snr)} dB, by the flip law {_decibels(figures.output_snr_flip_law)} dB\n"
    told += f"share {percent(figures.output_share)} %, cosine {figures.output_cosine:.2g}"
    lost = figures.output_snr == 1 and figures.output_share == 0
    share = 0.0 if lost else (figures.output_snr_db - _LOWEST_DB) / (_HIGHEST_DB - _LOWEST_DB)
    ink = "#fff" if not 0.15 < share < 0.85 else "#1f2328"
    text = "lost" if lost else str(round(figures.output_snr_db))
    return f'<td style="background: {color(share)}; color: {ink}" title="{escape(told)}">{text}</td>'


def _in_decibels(ratio: float) -> str:
    # Where something arrives, it does not leave a noise that is the update to the last bit.
    return "lost" if ratio == 1 else f"{_decibels(ratio)} dB"


def _decibels(ratio: float) -> str:
    return f"{10 * math.log10(ratio):.1f}"


def _unquantized(report: AuditReport) -> Iterator[str]:
    rows = sorted(report.unquantized, key=lambda row: -row.change.mean_abs)
    yield "<h2>Left in full precision by the deployment</h2>"
    yield from table(
        ("tensor", "weights", "changed", "mean |dw|", "max |dw|"),
        [
            (
                row.name,
                count(row.weights),
                f"{percent(row.change.changed / row.weights)} %",
                f"{row.change.mean_abs:.2g}",
                f"{row.change.max_abs:.2g}",
            )
            for row in rows
        ],
    )


def _left_out(report: AuditReport) -> Iterator[str]:
    rows: list[NotCompared] = [row for row in report.not_compared if row.change is None]
    yield "<h2>Not compared</h2>"
    yield from table(
        ("tensor", "weights", "recipe", "reason"),
        [(row.name, count(row.weights), row.format or "all", row.reason) for row in rows],
    )


def _or_dash(number: float | None, text) -> str:
    return "-" if number is None else text(number)
