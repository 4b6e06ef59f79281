"""A run as one HTML page that needs nothing beside it: no script, no font, no network."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape

from ..pages import STYLE, color
from . import charts
from .figures import (
    CAME_BACK,
    FULL,
    HALF,
    KEPT,
    LARGEST_RECOVERY,
    LARGEST_RETAIN_LOSS,
    LOSS,
    MISSING,
    NOT_JUDGED,
    NOT_REACHED,
    RETAIN_FELL,
    VALIDATION,
    Audit,
    Candidate,
    Deployment,
    Highest,
    Method,
    Regime,
    Run,
    Score,
    percent,
)
from .words import (
    about_bar,
    about_intervals,
    choice,
    failures,
    footnotes,
    halves,
    hole_notes,
    points,
    times_bar,
    verdict_sentences,
)

_OWN_STYLE = (
    charts.STYLE
    + """
body { overflow-wrap: break-word } h3 { font-size: 1rem; margin: 1.5rem 0 .4rem } summary { cursor: pointer }
details { margin: .6rem 0 } .lead { max-width: 52rem }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
figure { margin: 0; max-width: 30rem } figcaption { font-weight: 600; font-size: .9rem }
svg.swatch { display: inline-block; width: 14px; height: 14px; vertical-align: -2px }
.legend { flex-wrap: wrap; gap: .2rem 1rem } .legend span { white-space: nowrap }
th { white-space: normal; min-width: 3.5rem; vertical-align: bottom }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page);
  border-bottom: 0; box-shadow: inset 0 -1px var(--line); white-space: normal; min-width: 7rem }
td.interval { white-space: normal; min-width: 4.6rem }
/* A shadow at the right edge wherever there is more to scroll to. */
.scroll { background: linear-gradient(90deg, transparent, var(--page) 70%) right / 2rem 100% local no-repeat,
  linear-gradient(90deg, transparent, var(--line)) right / .8rem 100% scroll no-repeat }
tr.start td { font-style: italic } td.missing { color: var(--faint); background: var(--cell) }
td.kept { color: var(--kept) } td.back { color: var(--back); font-weight: 600 } td.unknown { color: var(--faint) }
tr.chosen td { font-weight: 600 }
td.words { white-space: normal; text-align: left; min-width: 9rem } ol.notes { color: var(--faint); font-size: .9rem }
table.heat th { min-width: 0 } table.heat th:first-child { min-width: 7rem }
table.heat td:first-child { box-shadow: none }
code { font-size: .9em }
"""
)
_WORST_DB, _BEST_DB = -40, 40
_TEXT = 200  # characters of an example that are shown
# What the audit's figures are called; those of the outputs are there where the audit read a text.
_AUDIT_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("changed_share", "codes changed", lambda v: f"{_share(v)} %"),
    ("predicted_flip_share", "flip law", lambda v: f"{_share(v)} %"),
    ("code_overlap", "code overlap", lambda v: f"{100 * v:.2f} %"),
    ("value_overlap", "value overlap", lambda v: f"{100 * v:.2f} %"),
    ("delivered_share", "delivered", lambda v: f"{_share(v)} %"),
    ("delivered_cosine", "cosine", lambda v: f"{v:.2f}"),
    ("weight_snr_db", "SNR, weights", lambda v: f"{v:.1f} dB"),
    ("output_snr_db", "SNR, outputs", lambda v: f"{v:.1f} dB"),
    ("output_cosine", "cosine, outputs", lambda v: f"{v:.2f}"),
    ("lost_layers", "layers lost", lambda v: f"{v:g}"),
)
_PREDICTORS = {
    "code_overlap": "code overlap",
    "value_overlap": "value overlap",
    "flip_law": "flip law: few codes should change",
    "flip_law_deficit": "fewer codes changed than the flip law expects",
    "delivered_cosine": "low cosine of intended and delivered update",
    "delivered_share": "little delivered along the update",
    "output_snr": "low signal to noise in the outputs",
    "output_snr_median": "the same, median of the tensors",
    "output_snr_flip_law": "the same, as the flip law expects it",
    "output_snr_delivered": "the same, only what arrives along the update as signal",
    "output_cosine": "low cosine in the outputs",
    "output_share": "little delivered in the outputs",
}


def page(run: Run) -> str:
    return "\n".join(_lines(run)) + "\n"


def _lines(run: Run) -> Iterator[str]:
    title = f"Does the forgetting survive 4 bits? {run.recipe}"
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>\n<style>{STYLE}{_OWN_STYLE}</style>\n</head>\n<body>"
    yield f"<h1>{escape(title)}</h1>"
    if run.about:
        yield f'<p class="lead">{escape(run.about)}.</p>'
    yield f'<p class="verdict"><strong>{escape(run.headline)}</strong></p>'
    if run.not_run:
        yield f'<p class="lead">{escape(run.not_run)}</p>'
    yield from _failed(run)
    if run.quick:
        yield '<p class="lead">This is the quick form of the recipe: it shows that it runs, not what is true.</p>'
    yield f'<p class="note lead">{escape(halves(run))} {escape(about_intervals(run))}</p>'
    yield from _selection(run)
    for regime in run.regimes:
        yield from _regime(run, regime)
    yield from _foretold(run)
    yield from _what_was_run(run)
    yield "</body>\n</html>"


def _failed(run: Run) -> Iterator[str]:
    if not run.failed:
        return
    yield f'<p class="lead">{escape(failures(run))}</p>'
    yield "<ul>"
    for each in run.failed:
        yield f"<li>{escape(each.cell)}: {escape(each.reason)}</li>"
    yield "</ul>"


def _selection(run: Run) -> Iterator[str]:
    if not run.selection:
        return
    yield "<h2>Chosen on one half, reported on the other</h2>"
    yield f'<p class="lead">{escape(choice(run))}</p>'
    holes = hole_notes(run)
    notes = {text: number for number, text in enumerate(holes.values(), 1)}
    rows = []
    for each in run.selection:
        cells = [f"<td>{_name(each)}</td>", f'<td class="interval">{times_bar(run, each)}</td>']
        for half, reach in ((VALIDATION, each.validation), (HALF, each.report)):
            mark = f" <sup>{notes[holes[each.number, half]]}</sup>" if reach.holes else ""
            cells.append(_highest_cell(reach.recovery, mark))
            cells.append(_highest_loss_cell(reach.retain_loss))
        kind = ' class="chosen"' if each == run.chosen else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    header = [f"{half} half: {what}" for half in (VALIDATION, HALF) for what in ("recovery", "retain lost")]
    yield from _table(("method", "times the bar", *header), rows)
    about = f"The highest recovery of {run.metric} and the most points of retain lost, {about_bar(run)}"
    yield f'<p class="note lead">{escape(about)}</p>'
    yield from _stopped(run, run.selection)
    yield from _notes(notes)


def _highest_cell(found: Highest | None, mark: str) -> str:
    if found is None:
        return f'<td class="unknown">no estimate{mark}</td>'
    kind = "back" if found.value >= LARGEST_RECOVERY else "kept"
    where = f"{escape(found.quantizer)}, <br>{escape(found.regime)}"
    return f'<td class="{kind}">{percent(found.value)} % at {where}{mark}</td>'


def _highest_loss_cell(found: Highest | None) -> str:
    if found is None:
        return _missing()
    kind = "back" if found.value > LARGEST_RETAIN_LOSS + 1e-9 else "kept"
    return f'<td class="{kind}">{points(found.value)}</td>'


def _regime(run: Run, regime: Regime) -> Iterator[str]:
    yield f"<h2>{escape(regime.title)}</h2>"
    yield "<ul>"
    for sentence in verdict_sentences(run, regime):
        yield f"<li>{escape(sentence)}</li>"
    yield "</ul>"
    if regime.shown:
        yield from _scatters(run, regime)
    if regime.shown or any(regime.start.values()):
        yield from _scores(run, regime)
    if regime.shown:
        yield from _recovery(run, regime)
    yield from _audits(regime)
    if regime.shown:
        yield from _examples(run, regime)


def _scatters(run: Run, regime: Regime) -> Iterator[str]:
    yield "<h3>Forget against retain</h3>"
    legend = (
        ("ring", "full precision"),
        ("kept", "quantized, recovery under 5 %"),
        ("back", "quantized, 5 % or more came back"),
        ("unknown", "no estimate"),
        ("start", "nothing forgotten"),
    )
    marks = " ".join(f"<span>{charts.swatch(kind)} {escape(text)}</span>" for kind, text in legend)
    yield f'<div class="legend">{marks}</div>'
    yield '<p class="note">Numbers are those of the methods in the tables. Best is the upper left corner.</p>'
    yield '<div class="panels">'
    for quantizer in charts.quantized(run):
        yield f"<figure><figcaption>Full precision to {escape(quantizer)}</figcaption>"
        yield from charts.scatter(run, regime, quantizer)
        yield "</figure>"
    yield "</div>"


def _scores(run: Run, regime: Regime) -> Iterator[str]:
    yield f"<h3>{escape(run.metric.capitalize())}, forget / retain</h3>"
    header = ("method", *(_bits(name) for name in run.quantizers))
    yield from _table(header, _score_rows(run, regime, lambda score: (_number(score.forget), _number(score.retain))))
    for figure, sets in _other_figures(regime, run.metric).items():
        title = f"{figure}, {' / '.join(sets)}"
        yield f"<details><summary>{escape(title)}</summary>"

        def each(score: Score, figure: str = figure, sets: Sequence[str] = tuple(sets)) -> tuple[str, ...]:
            of_sets = (score.metrics.get(name, {}) for name in sets)
            return tuple(_number(of_set[figure]) if figure in of_set else "-" for of_set in of_sets)

        yield from _table(header, _score_rows(run, regime, each))
        yield "</details>"


def _score_rows(run: Run, regime: Regime, texts: Callable[[Score], tuple[str, ...]]) -> list[str]:
    def cell(score: Score | None) -> str:
        if score is None:
            return _missing()
        return f"<td>{escape(' / '.join(texts(score)))}{_seeds_of(score, run)}</td>"

    first = "".join(cell(regime.start[name]) for name in run.quantizers)
    rows = [f'<tr class="start"><td>start, nothing forgotten</td>{first}</tr>']
    for method in regime.shown:
        cells = "".join(cell(method.deployments[name].score) for name in run.quantizers)
        rows.append(f"<tr><td>{_name(method)}</td>{cells}</tr>")
    return rows


def _other_figures(regime: Regime, metric: str) -> dict[str, list[str]]:
    """Each figure but ``metric``, with the sets that have it."""
    scores = [*regime.start.values(), *(d.score for m in regime.shown for d in m.deployments.values())]
    figures: dict[str, dict[str, None]] = {}
    for score in filter(None, scores):
        for name, of_set in score.metrics.items():
            for figure in of_set:
                figures.setdefault(figure, {})[name] = None
    return {figure: list(sets) for figure, sets in figures.items() if figure != metric}


def _recovery(run: Run, regime: Regime) -> Iterator[str]:
    quantizers = [name for name in run.quantizers if name != FULL]
    notes = footnotes(regime, quantizers)
    yield f"<h3>Recovery of {escape(run.metric)}</h3>"
    yield (
        '<p class="note lead">(quantized unlearned - unlearned) / (quantized original - unlearned), on the forget '
        f"set: 0 % stayed forgotten, 100 % is all that the quantized original knows. Dashed: "
        f"{_share(LARGEST_RECOVERY)} %. An arrow: the interval goes on.</p>"
    )
    yield '<div class="panels">'
    yield from charts.recoveries(run, regime)
    yield "</div>"
    rows = []
    for method in regime.shown:
        cells = [f"<td>{_name(method)}</td>"]
        cells += [_recovery_cell(method, method.deployments[name], notes) for name in quantizers]
        cells.append(_retain_cell(method))
        steps = ", ".join(str(count) for count in method.steps.values()) or "-"
        cells.append(f"<td>{steps}</td>")
        cells.append(f"<td>{'-' if method.seconds is None else f'{method.seconds:.0f}'}</td>")
        cells.append(_verdict_cell(method))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    yield from _table(("method", *quantizers, "most retain lost", "steps", "seconds", "verdict"), rows)
    yield (
        f'<p class="note">Most retain lost: points of {escape(run.metric)} on the retain set below the method in full '
        f"precision, at the 4-bit quantizer where that is most; up to {100 * LARGEST_RETAIN_LOSS:g} are allowed. In "
        "brackets: what the start loses there. Steps by seed; seconds of unlearning, mean over seeds.</p>"
    )
    yield from _stopped(run, regime.shown)
    yield from _notes(notes)
    yield f"<details><summary>Recovery of {LOSS.upper()}, by the same formula</summary>"
    loss_notes = footnotes(regime, quantizers, of_loss=True)
    rows = []
    for method in regime.shown:
        cells = [_recovery_cell(method, method.deployments[name], loss_notes, of_loss=True) for name in quantizers]
        rows.append(f"<tr><td>{_name(method)}</td>{''.join(cells)}</tr>")
    yield from _table(("method", *quantizers), rows)
    yield from _notes(loss_notes)
    yield "</details>"


def _stopped(run: Run, methods: Iterable[Method | Candidate]) -> Iterator[str]:
    if any(method.not_reached for method in methods):
        stop = run.content.get("stop") or {}
        rule = f"{stop.get('metric')} of at most {stop.get('at')} on the validation half"
        yield f'<p class="note">\u2020 ended by steps before the stop rule was met: {escape(rule)}.</p>'


def _notes(notes: dict[str, int]) -> Iterator[str]:
    if notes:
        yield '<ol class="notes">'
        for reason in notes:
            yield f"<li>{escape(reason)}</li>"
        yield "</ol>"


def _verdict_cell(method: Method) -> str:
    kind = {KEPT: "kept", NOT_REACHED: "kept", CAME_BACK: "back", RETAIN_FELL: "back", NOT_JUDGED: "unknown"}
    return f'<td class="{kind[method.verdict]} words">{escape(f"{method.verdict}: {method.why}")}</td>'


def _recovery_cell(method: Method, here: Deployment, notes: dict[str, int], of_loss: bool = False) -> str:
    found, reason = (here.loss_recovery, here.loss_reason) if of_loss else (here.recovery, here.reason)
    if here.score is None:
        return _missing()
    if found is None or found.value is None:
        return (
            f'<td class="unknown">no estimate <sup>{notes[f"{method.name} at {here.quantizer}: {reason}"]}</sup></td>'
        )
    kind = "back" if found.value >= LARGEST_RECOVERY else "kept"
    value, _, interval = charts.recovery_text(found).replace(" ", "\u00a0").partition("\u00a0(")
    return f'<td class="{kind} interval">{value} ({interval}</td>'


def _retain_cell(method: Method) -> str:
    worst = method.costliest
    if worst is None:
        return _missing()
    kind = "back" if worst.retain_loss > LARGEST_RETAIN_LOSS + 1e-9 else "kept"
    start = "" if worst.start_retain_loss is None else f" [{points(worst.start_retain_loss)}]"
    return f'<td class="{kind} interval">{points(worst.retain_loss)}{start} at {escape(worst.quantizer)}</td>'


def _audits(regime: Regime) -> Iterator[str]:
    if not regime.audits:
        return
    yield "<h3>Buckets: what the update did to the weights</h3>"
    for format in dict.fromkeys(audit.format for audit in regime.audits):
        audits = [audit for audit in regime.audits if audit.format == format]
        columns = [column for column in _AUDIT_COLUMNS if any(column[0] in audit.figures for audit in audits)]
        rows = []
        for audit in audits:
            texts = [_or_dash(audit.figures.get(key), text) for key, _, text in columns]
            cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
            rows.append(f"<tr><td>{escape(_numbered(regime, audit))}</td>{cells}</tr>")
        yield f"<p><strong>{escape(format)}</strong></p>"
        yield from _table(("method", *(name for _, name, _ in columns)), rows)
        yield from _layers(regime, format, audits)
    yield (
        '<p class="note lead">Means over seeds. Flip law: the mean of min(|dw| / s, 1), the share of codes that the '
        "update dw should change where weights lie anywhere in their bucket of width s. Delivered: what arrives along "
        "dw, of |dw|; cosine: of dw and what arrives. SNR, weights: cosine&sup2; / (1 - cosine&sup2;) in dB, what "
        "arrives along the update against what arrives beside it"
        + (
            "; SNR, outputs: of the layers' outputs on calibration text"
            if any("output_snr_db" in audit.figures for audit in regime.audits)
            else ""
        )
        + ".</p>"
    )


def _layers(regime: Regime, format: str, audits: Sequence[Audit]) -> Iterator[str]:
    layers = list(dict.fromkeys(name for audit in audits for name in audit.layers))
    if not layers:
        return
    yield f"<details><summary>{escape(format)}, layer by layer</summary>"
    short = _without_common_start(layers)

    def deficit(figures: dict) -> tuple[float, str] | None:
        changed, law = figures.get("changed_share"), figures.get("predicted_flip_share")
        return None if changed is None or not law else (changed / law, f"{100 * changed / law:.0f}")

    def decibels(key: str) -> Callable[[dict], tuple[float, str] | None]:
        def found(figures: dict) -> tuple[float, str] | None:
            value = figures.get(key)
            return None if value is None else ((value - _WORST_DB) / (_BEST_DB - _WORST_DB), str(round(value)))

        return found

    maps = [
        ("Codes changed, in % of what the flip law expects", "0 %", "100 %", deficit),
        ("Signal to noise in the weights, dB", f"{_WORST_DB} dB", f"{_BEST_DB} dB", decibels("weight_snr_db")),
        ("Signal to noise in the outputs, dB", f"{_WORST_DB} dB", f"{_BEST_DB} dB", decibels("output_snr_db")),
    ]
    for name, low, high, cell in maps:
        found = [[cell(audit.layers.get(layer, {})) for layer in layers] for audit in audits]
        if not any(value for row in found for value in row):
            continue
        colors = ", ".join(color(i / 4) for i in range(5))
        yield (
            f'<p>{escape(name)}</p><div class="legend">{low} '
            f'<div class="bar" style="background: linear-gradient(90deg, {colors})"></div> {high}</div>'
        )
        yield '<div class="scroll"><table class="heat">'
        yield f"<tr><th>method</th>{''.join(f'<th>{escape(layer)}</th>' for layer in short)}</tr>"
        for audit, row in zip(audits, found, strict=True):
            cells = "".join(_heat(value) for value in row)
            yield f"<tr><td>{escape(_numbered(regime, audit))}</td>{cells}</tr>"
        yield "</table></div>"
    yield "</details>"


def _heat(value: tuple[float, str] | None) -> str:
    if value is None:
        return '<td class="none">-</td>'
    share, text = value
    ink = "#1f2328" if 0.15 < share < 0.85 else "#fff"
    return f'<td style="background: {color(share)}; color: {ink}">{escape(text)}</td>'


def _without_common_start(names: Sequence[str]) -> list[str]:
    """Layers of one model mostly differ in their number alone."""
    starts = {name.rpartition(".")[0] for name in names}
    return [name.rpartition(".")[2] for name in names] if len(starts) == 1 else list(names)


def _examples(run: Run, regime: Regime) -> Iterator[str]:
    if not regime.examples:
        return
    yield "<h3>Examples, before and after</h3>"
    yield (
        '<p class="note">The first, the middle and the last of the report half of the forget set, of one seed; '
        "not chosen by what became of them.</p>"
    )
    for example in regime.examples:
        right = "" if example.right is None else f", of class {example.right}"
        yield f"<details><summary>Example {example.place} of {example.of}{escape(right)}</summary>"
        rows = []
        for who, name in ((None, "start, nothing forgotten"), *((m.name, _label(m)) for m in regime.shown)):
            given = example.given.get(who, {})
            cells = "".join(_said(given.get(quantizer), example.right) for quantizer in run.quantizers)
            kind = ' class="start"' if who is None else ""
            rows.append(f"<tr{kind}><td>{escape(name)}</td>{cells}</tr>")
        yield from _table(("model", *(_bits(name) for name in run.quantizers)), rows)
        yield "</details>"


def _said(text: str | None, right: str | None) -> str:
    if text is None:
        return _missing()
    shown = text.strip() if len(text.strip()) <= _TEXT else text.strip()[: _TEXT - 1] + "\u2026"
    if right is None:
        return f'<td class="words">{escape(shown) or "<em>nothing</em>"}</td>'
    return f'<td class="{"back" if text == right else "kept"}">{escape(shown)}</td>'


def _foretold(run: Run) -> Iterator[str]:
    if not run.foretold:
        return
    yield "<h2>What foretold the recovery</h2>"
    names = dict.fromkeys(name for found in run.foretold for name in found.candidates)
    titles = {regime.name: regime.title for regime in run.regimes}
    header = ["more of it, more recovery"]
    for found in run.foretold:
        scope = titles.get(found.regime, "all regimes")
        header.append(f"{scope}: {found.cells} cells of {found.checkpoints} checkpoints")
    rows = []
    for name in names:
        cells = []
        for found in run.foretold:
            each = found.candidates.get(name)
            if each is None:
                cells.append(_missing())
            elif each.rho != each.rho:
                cells.append('<td class="unknown">constant</td>')
            else:
                cells.append(f"<td>{each.rho:+.2f} ({each.low:+.2f} to {each.high:+.2f})</td>")
        rows.append(f"<tr><td>{escape(_PREDICTORS.get(name, name))}</td>{''.join(cells)}</tr>")
    yield from _table(header, rows)
    left_out = max(found.left_out for found in run.foretold)
    without = f" {left_out} cells without an estimate are left out." if left_out else ""
    yield (
        '<p class="note lead">Spearman\'s rank correlation of each figure of the audit with the recovery that was '
        "measured at the same quantizer, and its 95 % interval, the quantizers of one checkpoint drawn together. +1: "
        f"it ranks the cells as recovery does.{without}</p>"
    )


def _what_was_run(run: Run) -> Iterator[str]:
    content = run.content
    yield "<h2>What was run</h2>"
    yield "<dl>"
    planned = f"; {', '.join(map(str, run.planned_seeds))} planned, not run" if run.planned_seeds else ""
    selected = ", and which method is chosen" if run.selection else "; none of its figures are here"
    facts = [
        ("recipe", run.recipe + (" (quick form)" if run.quick else "")),
        ("task", run.task),
        ("model", content.get("model") or "the task's own"),
        ("seeds", ", ".join(map(str, run.seeds)) + planned),
        ("cells", f"{run.cells} of {run.planned_cells} done"),
        ("seconds", f"{run.seconds:.0f} of computing, all cells together"),
        ("reported", f"the report half: {run.forget_examples} forget and {run.retain_examples} retain examples"),
        ("selection", f"on the validation half: when training stops{selected}"),
        ("stops at", _settings(content.get("stop"))),
        ("quantizers", ", ".join(run.quantizers)),
        ("4 bits", ", ".join(run.four_bits) or "none of them"),
        ("task settings", _settings(content.get("settings"))),
        ("learning", _settings(content.get("learn")) if content.get("learn") else "none, the model knew it"),
        ("unlearning", _settings(content.get("defaults"))),
    ]
    for made_by in run.made_by:
        facts.append(("machine", _settings(made_by.get("machine"))))
        facts.append(("versions", _settings(made_by.get("versions"))))
    for term, text in facts:
        yield f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>"
    yield "</dl>"
    yield "<h3>Methods</h3>"
    rows = []
    for number, (name, own) in enumerate(content["methods"].items(), 1):
        rows.append(f'<tr><td>{number} {escape(name)}</td><td class="words">{escape(_settings(own) or "-")}</td></tr>')
    yield from _table(("method", "differs from the recipe's defaults in"), rows)


def _settings(values: dict | None) -> str:
    """As in the recipe: ``key value`` after each other."""

    def text(value) -> str:
        if isinstance(value, list):
            return " ".join(map(str, value))
        return value if isinstance(value, str) else json.dumps(value)

    return ", ".join(f"{key} {text(value)}" for key, value in (values or {}).items())


def _table(header: Sequence[str], rows: Sequence[str]) -> Iterator[str]:
    """``rows`` are HTML, the header is text."""
    yield '<div class="scroll"><table>'
    yield f"<tr>{''.join(f'<th>{escape(text)}</th>' for text in header)}</tr>"
    yield from rows
    yield "</table></div>"


def _bits(quantizer: str) -> str:
    return "full precision" if quantizer == FULL else quantizer


def _label(method: Method | Candidate) -> str:
    return f"{method.number} {method.name}" + ("\u2020" if method.not_reached else "")


def _name(method: Method | Candidate) -> str:
    return escape(_label(method))


def _numbered(regime: Regime, audit: Audit) -> str:
    return next((_label(method) for method in regime.methods if method.name == audit.method), audit.method)


def _missing() -> str:
    return f'<td class="missing">{MISSING}</td>'


def _seeds_of(score: Score, run: Run) -> str:
    return "" if score.seeds == run.seeds else f" <small>(seed {', '.join(map(str, score.seeds))} only)</small>"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"


def _share(value: float) -> str:
    """In percent, with two digits that count however small it is."""
    return f"{100 * value:.2g}" if abs(value) < 0.1 else f"{100 * value:.0f}"


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)
