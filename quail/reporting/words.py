"""What a run's page and its Markdown say in words, by the rules at the top of figures.py."""

from collections.abc import Iterator, Sequence

from .figures import (
    CAME_BACK,
    HALF,
    KEPT,
    LARGEST_RECOVERY,
    LARGEST_RETAIN_LOSS,
    MISSING,
    NOT_JUDGED,
    NOT_REACHED,
    RETAIN_FELL,
    VALIDATION,
    Candidate,
    Reach,
    Regime,
    Run,
    named_seeds,
    percent,
)

_EXPLAINED = 6


def halves(run: Run) -> str:
    """Which half is reported, and what the other was for."""
    every = "Every figure but those that are said to be of the validation half" if run.selection else "Every figure"
    other = "it is shown where a method is chosen, and nowhere else" if run.selection else "nothing of it is shown"
    return (
        f"{every} is of the report half: {run.forget_examples} examples to forget, {run.retain_examples} to retain. "
        f"The validation half decided when training stopped; {other}."
    )


def choice(run: Run) -> str:
    """Which method the validation half chooses, and what the report half says of it."""
    chosen = run.chosen
    if chosen is None:
        return (
            "No method is chosen: on the validation half none has a recovery and a retain loss at every 4-bit "
            "quantizer in every regime that ran."
        )
    name = chosen.name + ("\u2020" if chosen.not_reached else "")
    of = f"{len(run.selection)} methods" if len(run.selection) > 1 else "one method"
    if chosen.validation.meets:
        opening = f"Chosen on the validation half, as the first of {of} that meets the bar there: {name}"
    else:
        opening = f"No method meets the bar on the validation half; chosen there, as the nearest of {of}: {name}"
    if chosen.not_reached:
        opening += f", whose training ended before the stop rule was met in {named_seeds(chosen.not_reached)}"
    return (
        f"{opening}. There {_reached(chosen.validation)}. On the report half {_reached(chosen.report)}: "
        f"{_judged(chosen.report)}."
    )


def _reached(reach: Reach) -> str:
    if reach.recovery is None:
        text = "its recovery has no estimate"
    else:
        text = f"its recovery is at most {percent(reach.recovery.value)} % (at {reach.recovery.where})"
    if reach.retain_loss is not None:
        text += f" and it loses {points(reach.retain_loss.value)} points of retain at most"
    return text


def _judged(reach: Reach) -> str:
    if reach.fails:
        return "the bar is not met there"
    if reach.holes:
        return f"it is not judged there, without figures in {len(reach.holes)} of {reach.cells} cells"
    return "the bar is met there"


def about_bar(run: Run) -> str:
    """What the table of the choice has, and what its order goes by."""
    cells = len(run.four_bits) * len(run.regimes_run)
    return (
        f"over {cells} cells a method: every 4-bit quantizer in every regime that ran. Lost is what the method has "
        "less than in full precision. Times the bar: on the "
        f"validation half, the larger of recovery / {100 * LARGEST_RECOVERY:g} % and points / "
        f"{100 * LARGEST_RETAIN_LOSS:g}, at least 0; that is the order, and of equals the recipe's. "
        "Estimates, without intervals."
    )


def times_bar(run: Run, candidate: Candidate) -> str:
    """The figure of the order, and whether it is the one that was chosen."""
    if candidate.validation.holes:
        return "not judged"
    return f"{candidate.validation.times_bar:.2f}" + (", chosen" if candidate == run.chosen else "")


def hole_notes(run: Run) -> dict[tuple[int, str], str]:
    """By number of a method and half, what is missing of the highest figures that the choice shows."""
    notes = {}
    for each in run.selection:
        for half, reach in ((VALIDATION, each.validation), (HALF, each.report)):
            if reach.holes:
                more = f" and {len(reach.holes) - 1} more" if len(reach.holes) > 1 else ""
                rest = f"; shown is the highest of the rest of {reach.cells} cells" if reach.recovery else ""
                notes[each.number, half] = f"{each.name} on the {half} half, {reach.holes[0]}{more}{rest}"
    return notes


def about_intervals(run: Run) -> str:
    """What the intervals are over, and what they do not tell."""
    over = "95 % bootstrap intervals, paired over the three models, are over examples"
    if len(run.seeds) == 1:
        text = f"{over} only: one seed, {run.seeds[0]}, so they say nothing about other seeds."
    else:
        text = f"{over} and seeds: {', '.join(map(str, run.seeds))}."
    found = [each.recovery for regime in run.regimes for m in regime.methods for each in m.deployments.values()]
    if any(each is not None and each.value is not None and each.low == each.high for each in found):
        # Hanley and Lippman-Hand 1983, "If nothing goes wrong, is everything all right?": the rule of three.
        text += (
            " One without width means that no resample differs; even where none of "
            f"{run.forget_examples} examples changed, up to {300 / run.forget_examples:.2g} % of others might (3 / n)."
        )
    return text


def failures(run: Run) -> str:
    """How many cells failed, and what that means for the tables."""
    count = "1 cell" if len(run.failed) == 1 else f"{len(run.failed)} cells"
    return f"{count} failed when last tried, and what starts from them is missing below:"


def verdict_sentences(run: Run, regime: Regime) -> Iterator[str]:
    """One sentence for each verdict that a method of the regime has, of the methods with a score."""
    if not regime.shown:
        yield "No method was run in this regime yet."
        return
    at = ", ".join(run.four_bits)
    bar, points = f"{100 * LARGEST_RECOVERY:g} %", f"{100 * LARGEST_RETAIN_LOSS:g} points"
    openings = {
        KEPT: f"Kept, recovery under {bar} at {at} and at most {points} of retain lost",
        NOT_REACHED: "Kept by the same measure, but training ended before the stop rule was met",
        RETAIN_FELL: f"Recovery under {bar} wherever known, but more than {points} of retain lost",
        CAME_BACK: f"Came back, recovery of {bar} or more somewhere",
        NOT_JUDGED: "Not judged, as a 4-bit cell is missing or has no estimate",
    }
    for verdict, opening in openings.items():
        methods = regime.of(verdict)
        if methods:
            # A long list is read in the table; here the names are enough.
            parts = (f" ({method.why})" if len(methods) <= _EXPLAINED else "" for method in methods)
            marks = ("\u2020" if method.not_reached else "" for method in methods)
            named = zip((method.name for method in methods), marks, parts, strict=True)
            yield f"{opening}: {'; '.join(map(''.join, named))}."
        elif verdict == KEPT:
            yield f"No method kept recovery under {bar} at {at} with at most {points} of retain lost."


def points(share: float) -> str:
    return f"{100 * share:.1f}".replace("-0.0", "0.0")


def footnotes(regime: Regime, quantizers: Sequence[str], of_loss: bool = False) -> dict[str, int]:
    """``METHOD at QUANTIZER: reason`` of every cell without an estimate that has a score, numbered from 1."""
    notes: dict[str, int] = {}
    for method in regime.shown:
        for quantizer in quantizers:
            here = method.deployments[quantizer]
            found, reason = (here.loss_recovery, here.loss_reason) if of_loss else (here.recovery, here.reason)
            if reason not in (None, MISSING) and (found is None or found.value is None):
                notes[f"{method.name} at {quantizer}: {reason}"] = len(notes) + 1
    return notes
