"""What a run's page and its Markdown say in words, by the rules at the top of figures.py."""

from collections.abc import Iterator, Sequence

from .figures import (
    CAME_BACK,
    KEPT,
    LARGEST_RECOVERY,
    LARGEST_RETAIN_LOSS,
    MISSING,
    NOT_JUDGED,
    NOT_REACHED,
    RETAIN_FELL,
    Regime,
    Run,
)

_EXPLAINED = 6


def halves(run: Run) -> str:
    """Which half is reported, and what the other was for."""
    return (
        f"Every figure is of the report half: {run.forget_examples} examples to forget, {run.retain_examples} to "
        "retain. The validation half decided when training stopped; nothing of it is shown."
    )


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
