"""A run as Markdown of at most 100 columns, for a README or a terminal: verdict, choice, and two tables a regime."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from .charts import recovery_text
from .figures import FULL, HALF, MISSING, VALIDATION, Candidate, Deployment, Method, Reach, Regime, Run, Score, percent
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

_COLUMNS, _NAME = 100, 36


def markdown(run: Run) -> str:
    return "\n".join(_lines(run)) + "\n"


def _lines(run: Run) -> Iterator[str]:
    yield f"# {run.recipe}: does the forgetting survive 4 bits?"
    yield ""
    if run.about:
        yield from _wrap(f"{run.about}.")
        yield ""
    yield from _wrap(f"**{run.headline}**")
    yield ""
    if run.not_run:
        yield from _wrap(run.not_run)
        yield ""
    if run.failed:
        yield from _wrap(failures(run))
        yield ""
        for each in run.failed:
            yield from _wrap(f"- {each.cell}: {each.reason}", "  ")
        yield ""
    yield from _wrap(f"{halves(run)} {about_intervals(run)}{' Quick form of the recipe.' if run.quick else ''}")
    yield from _selection(run)
    for regime in run.regimes:
        yield from _regime(run, regime)
    yield ""
    yield from _wrap(_ran(run))


def _selection(run: Run) -> Iterator[str]:
    """Where the highest recoveries are is told below the table, so that names and figures have room in it."""
    if not run.selection:
        return
    yield ""
    yield "## Chosen on one half, reported on the other"
    yield ""
    yield from _wrap(choice(run))
    yield ""
    yield from _wrap(f"Highest recovery of {run.metric} / most points of retain lost, {about_bar(run)}")
    yield ""
    holes = hole_notes(run)
    notes: dict[str, int] = {}

    def cell(each: Candidate, half: str, reach: Reach) -> str:
        texts = []
        if reach.recovery is None:
            texts.append("no estimate")
        else:
            number = notes.setdefault(reach.recovery.where, len(notes) + 1)
            texts.append(f"{percent(reach.recovery.value)} % [{number}]")
        texts.append("?" if reach.retain_loss is None else points(reach.retain_loss.value))
        if reach.holes:
            texts[-1] += f" [{notes.setdefault(holes[each.number, half], len(notes) + 1)}]"
        return " / ".join(texts)

    rows = [
        (
            _name(each),
            times_bar(run, each),
            cell(each, VALIDATION, each.validation),
            cell(each, HALF, each.report),
        )
        for each in run.selection
    ]
    yield from _tables(("method", "times the bar", "validation half", "report half"), rows)
    yield from _stopped(run.selection)
    yield from _notes(notes)


def _regime(run: Run, regime: Regime) -> Iterator[str]:
    yield ""
    yield f"## {regime.title}"
    yield ""
    for sentence in verdict_sentences(run, regime):
        yield from _wrap(f"- {sentence}", "  ")
    if not regime.shown and not any(regime.start.values()):
        return
    yield ""
    yield f"{run.metric.capitalize()}, forget / retain:"
    yield ""
    header = ("method", *("full" if name == FULL else f"`{name}`" for name in run.quantizers))
    rows = [("start, nothing forgotten", *(_score(regime.start[name], run) for name in run.quantizers))]
    for method in regime.shown:
        scores = (method.deployments[name].score for name in run.quantizers)
        rows.append((_name(method), *(_score(score, run) for score in scores)))
    yield from _tables(header, rows)
    if not regime.shown:
        return
    quantizers = [name for name in run.quantizers if name != FULL]
    notes = footnotes(regime, quantizers)
    yield ""
    yield f"Recovery of {run.metric} with its interval:"
    yield ""
    rows = [
        (_name(method), *(_recovery(method, method.deployments[name], notes) for name in quantizers))
        for method in regime.shown
    ]
    yield from _tables(("method", *(f"`{name}`" for name in quantizers)), rows)
    yield from _stopped(regime.shown)
    yield from _notes(notes)


def _stopped(methods: Iterable[Method | Candidate]) -> Iterator[str]:
    if any(method.not_reached for method in methods):
        yield ""
        yield from _wrap("\u2020 ended by steps before the stop rule was met on the validation half.")


def _notes(notes: dict[str, int]) -> Iterator[str]:
    if notes:
        yield ""
        for text, number in notes.items():
            yield from _wrap(f"{number}. {text}", "   ")


def _ran(run: Run) -> str:
    machines = dict.fromkeys(str(made_by.get("machine", {}).get("device")) for made_by in run.made_by)
    versions = {name: text for made_by in run.made_by for name, text in made_by.get("versions", {}).items()}
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "bitsandbytes") if name in versions
    )
    return (
        f"Seeds {', '.join(map(str, run.seeds))}; {run.cells} of {run.planned_cells} cells, {run.seconds:.0f} s of "
        f"computing on {', '.join(machines)}; {named}."
    )


def _name(method: Method | Candidate) -> str:
    short = method.name if len(method.name) <= _NAME else f"{method.name[: _NAME - 3]}..."
    return short.replace("|", "/").replace("<", "&lt;") + ("\u2020" if method.not_reached else "")


def _score(score: Score | None, run: Run) -> str:
    if score is None:
        return MISSING
    sides = ("?" if value is None else f"{value:.2f}" for value in (score.forget, score.retain))
    seeds = "" if score.seeds == run.seeds else f" (seed {','.join(map(str, score.seeds))})"
    return " / ".join(sides) + seeds


def _recovery(method: Method, here: Deployment, notes: dict[str, int]) -> str:
    if here.score is None:
        return MISSING
    if here.recovery is None or here.recovery.value is None:
        return f"no estimate [{notes[f'{method.name} at {here.quantizer}: {here.reason}']}]"
    return recovery_text(here.recovery)


def _tables(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """One table, or several below each other with the first column again, none wider than the page."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    groups: list[list[int]] = []
    for i in range(1, len(header)):
        if not groups or _width([widths[0], *(widths[j] for j in groups[-1]), widths[i]]) > _COLUMNS:
            groups.append([])
        groups[-1].append(i)
    for number, group in enumerate(groups):
        if number:
            yield ""
        columns = [0, *group]
        for place, row in enumerate((header, *rows)):
            first, *others = (row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in columns)
            yield f"| {' | '.join([first, *others])} |"
            if place == 0:
                yield f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (widths[i] + 1)}:|" for i in group)


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + 3 * len(widths) + 1


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
