"""From a run's ``RESULTS.json`` to the numbers that its report shows: of the report half, every regime by itself.

A cell that has not been run is None throughout, never a number; a recovery without an estimate carries the reason.

The verdict on a method in a regime goes by fixed rules, the first that holds: it *came back* where the recovery of the
forget metric is 5 % or more at a 4-bit quantizer; its *retained knowledge fell* where the retain metric at one is more
than 2 points below that of the same method in full precision; it is *not judged* where a 4-bit quantizer has no score
or no estimate; it *kept* what was forgotten, and where training ended before the recipe's stop rule was met that is
said beside it and counts apart. Estimates are judged, and how far up the intervals reach is told with the verdict.

The validation half is for the choice of a method alone. It has means and no examples, so no intervals; how near a
method comes to the bar there orders the methods, ``Run.selection``, and the report half has no part in that.
"""

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..metrics.intervals import SMALLEST_FORGOTTEN, Recovery, recovery

if TYPE_CHECKING:  # it imports torch, which a run without audits does not need
    from ..auditing.predictors import RankCorrelation

SCHEMA = 2
FULL = "none"
HALF, VALIDATION = "report", "validation"
LARGEST_RECOVERY, LARGEST_RETAIN_LOSS = 0.05, 0.02
CAME_BACK, RETAIN_FELL, NOT_JUDGED, NOT_REACHED, KEPT = (
    *("came back", "retained knowledge fell", "not judged"),
    *("kept, stop rule not reached", "kept"),
)
FORGET_METRICS = ("accuracy", "exact")  # of a classifier and of a language model: 1 is remembered
LOSS = "nll"
MISSING = "missing"

_EXAMPLES = 3
_HOLES = 6  # methods that lack something in a regime; more are only counted
_FEWEST_CELLS = 5  # of a rank correlation: with fewer an interval tells nothing
_ROUNDING = 1e-9  # a difference of two means that is 0.02 may be a little more in binary
_KNOWN = 3  # decimals of what is reckoned from the means of RESULTS.json, which have four significant digits
_ROW_KEYS = ("regime", "method", "seed", "quantizer", "half", "metrics")


@dataclass(frozen=True)
class Score:
    """One model at one precision: ``metrics[set][figure]``, means over the seeds that it was run with.

    ``forget`` and ``retain`` are the forget metric on both sets, between 0 and 1. A figure is None where a seed's is
    not finite, and not there where a seed has none of that name.
    """

    forget: float | None
    retain: float | None
    metrics: dict[str, dict[str, float | None]]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Validated:
    """What the choice of a method rests on: a deployment on the validation half, from means over the seeds shared.

    ``recovery`` is None where ``reason`` says why; ``retain_loss`` is None where a mean is not there or not finite.
    Both have three decimals, as the means that they are of are rounded: what differs by less is equal.
    """

    recovery: float | None
    reason: str | None
    retain_loss: float | None


@dataclass(frozen=True)
class Deployment:
    """A method at one precision.

    Attributes:
        quantizer: its name; ``none`` is full precision, which has neither recovery nor retain loss.
        score: None where it has not been run.
        recovery, loss_recovery: of the forget metric and of the NLL; None where an arm is missing.
        reason, loss_reason: why there is no estimate, where there is none.
        retain_loss: the retain metric in full precision minus the one here, over the seeds of both.
        start_retain_loss: the same of the model that had not forgotten anything.
        validated: on the validation half; None where it has no row there, and in full precision.
    """

    quantizer: str
    score: Score | None
    recovery: Recovery | None = None
    reason: str | None = None
    loss_recovery: Recovery | None = None
    loss_reason: str | None = None
    retain_loss: float | None = None
    start_retain_loss: float | None = None
    validated: Validated | None = None


@dataclass(frozen=True)
class Method:
    """A method in a regime, its deployments by quantizer, and the verdict with what it rests on.

    ``number`` is its place in the recipe, from 1. ``steps`` are by seed; ``not_reached`` are the seeds in which
    training ended by steps, not by the stop rule.
    """

    number: int
    name: str
    deployments: dict[str, Deployment]
    steps: dict[int, int]
    not_reached: tuple[int, ...]
    seconds: float | None
    verdict: str
    why: str

    @property
    def ran(self) -> bool:
        """Whether it was scored at a 4-bit quantizer."""
        return any(each.score is not None for each in self.four_bits)

    @property
    def seeds(self) -> list[int]:
        """With which it was scored, at any precision."""
        return sorted({seed for each in self.deployments.values() if each.score for seed in each.score.seeds})

    @property
    def worst(self) -> Deployment | None:
        """The 4-bit deployment with the highest recovery that could be estimated."""
        known = [each for each in self.four_bits if each.recovery and each.recovery.value is not None]
        return max(known, key=lambda each: each.recovery.value, default=None)

    @property
    def costliest(self) -> Deployment | None:
        """The 4-bit deployment with the largest retain loss."""
        known = [each for each in self.four_bits if each.retain_loss is not None]
        return max(known, key=lambda each: each.retain_loss, default=None)

    @property
    def four_bits(self) -> list[Deployment]:
        return [each for name, each in self.deployments.items() if in_four_bits(name)]


@dataclass(frozen=True)
class Highest:
    """The highest of several figures, with the quantizer and the title of the regime that have it."""

    value: float
    quantizer: str
    regime: str

    @property
    def where(self) -> str:
        return f"{self.quantizer}, {self.regime}"


@dataclass(frozen=True)
class Reach:
    """How far a method gets on one half, over all 4-bit quantizers and all regimes that ran.

    ``recovery`` and ``retain_loss`` are the highest, None where no cell has one. ``holes`` says of every cell that
    lacks one of them where it is and why; ``cells`` counts all.
    """

    recovery: Highest | None
    retain_loss: Highest | None
    holes: tuple[str, ...]
    cells: int

    @property
    def times_bar(self) -> float | None:
        """The larger of recovery / 5 % and retain loss / 2 points, at least 0: 1 is at the bar, 2 twice as far.

        None with a hole.
        """
        if self.holes:
            return None
        shares = self.recovery.value / LARGEST_RECOVERY, self.retain_loss.value / LARGEST_RETAIN_LOSS
        return round(max(0.0, *shares), 6)  # 0.03 / 0.05 and 0.012 / 0.02 differ in binary

    @property
    def fails(self) -> bool:
        """Whether a cell is beyond the bar, whatever the holes are: at 5 % of recovery, above 2 points."""
        back = self.recovery is not None and self.recovery.value >= LARGEST_RECOVERY
        return back or self.retain_loss is not None and self.retain_loss.value > LARGEST_RETAIN_LOSS + _ROUNDING

    @property
    def meets(self) -> bool:
        """Whether every cell is known and none beyond the bar."""
        return not self.holes and not self.fails


@dataclass(frozen=True)
class Candidate:
    """A method that could be chosen, on the half that chooses and on the one that reports.

    ``not_reached`` are the seeds in which training ended by steps in a regime that ran.
    """

    number: int
    name: str
    not_reached: tuple[int, ...]
    validation: Reach
    report: Reach


@dataclass(frozen=True)
class Audit:
    """What the audit of a method's checkpoints found in one format: means over seeds, of all weights and by layer.

    Figures have the names of ``quail.auditing.figures``; ``weight_snr_db`` is 10 log10(c^2 / (1 - c^2)), c the cosine
    of the intended and the delivered update: what arrives along the update against what arrives beside it. Those of
    the layers' outputs, ``output_snr_db`` and others, are there where the audit had a calibration text. ``candidates``
    are those of ``quail.auditing.predictors``.
    """

    method: str
    format: str
    figures: dict[str, float | None]
    layers: dict[str, dict[str, float | None]]
    candidates: dict[str, float | None]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One example of the forget set: what each model gave, ``given[method or None][quantizer]``.

    ``place`` is its place in the report half, from 1, and ``right`` the class that it belongs to, for a classifier.
    """

    place: int
    of: int
    right: str | None
    given: dict[str | None, dict[str, str]]


@dataclass(frozen=True)
class Foretold:
    """How well figures of an audit ranked the recoveries: ``candidates`` maps each to its rank correlation.

    ``regime`` is None for all regimes together; ``left_out`` counts the cells without an estimate.
    """

    regime: str | None
    candidates: "dict[str, RankCorrelation]"
    cells: int
    checkpoints: int
    left_out: int


@dataclass(frozen=True)
class Regime:
    """Everything of one regime. ``start`` is the model that has not forgotten anything, by quantizer."""

    name: str
    title: str
    start: dict[str, Score | None]
    methods: tuple[Method, ...]
    audits: tuple[Audit, ...]
    examples: tuple[Example, ...]

    @property
    def shown(self) -> list[Method]:
        """Those with a score here; of the others there is nothing to tell but that they were not run."""
        return [method for method in self.methods if method.seeds]

    def of(self, verdict: str) -> list[Method]:
        return [method for method in self.shown if method.verdict == verdict]


@dataclass(frozen=True)
class Failure:
    """A cell that gave an error when it was last tried: ``cell`` names it, ``reason`` is one line."""

    cell: str
    reason: str


@dataclass(frozen=True)
class Run:
    """What a report shows.

    Attributes:
        metric: the forget metric, ``accuracy`` or ``exact``.
        seeds, planned_seeds: with which there are rows, and those that the recipe has besides.
        quantizers: in the recipe's order; ``four_bits`` are those that the verdict is about.
        forget_examples, retain_examples: how many the report half has.
        content: the recipe, as ``RESULTS.json`` has it.
        made_by: versions and machine; several where the run was continued elsewhere.
        cells, planned_cells, seconds: what was done of what is planned, and how long that took.
        foretold: empty where there is no audit, or there are too few cells.
        failed: the cells that failed when they were last tried.
    """

    recipe: str
    quick: bool
    about: str
    task: str
    metric: str
    seeds: tuple[int, ...]
    planned_seeds: tuple[int, ...]
    quantizers: tuple[str, ...]
    regimes: tuple[Regime, ...]
    forget_examples: int
    retain_examples: int
    content: dict
    made_by: tuple[dict, ...]
    cells: int
    planned_cells: int
    seconds: float
    foretold: tuple[Foretold, ...]
    failed: tuple[Failure, ...] = ()

    @property
    def four_bits(self) -> tuple[str, ...]:
        return tuple(name for name in self.quantizers if in_four_bits(name))

    @property
    def regimes_run(self) -> list[Regime]:
        """Those in which a method was scored in 4 bits; the headline is about them."""
        return [regime for regime in self.regimes if any(method.ran for method in regime.methods)]

    @property
    def methods_run(self) -> list[str]:
        """Those that were scored in 4 bits in every regime of ``regimes_run``."""
        ran = [{method.name for method in regime.methods if method.ran} for regime in self.regimes_run]
        return [name for name in self._methods if all(name in of_regime for of_regime in ran)] if ran else []

    @property
    def everywhere(self) -> list[str]:
        """The methods that kept what was forgotten in every regime that ran, the stop rule met."""
        kept = [{method.name for method in regime.of(KEPT)} for regime in self.regimes_run]
        return [name for name in self.methods_run if all(name in of_regime for of_regime in kept)]

    @property
    def selection(self) -> list[Candidate]:
        """``methods_run`` from the nearest to the bar to the farthest, on the validation half alone.

        By ``Reach.times_bar``, then by the recipe's order; those with a hole there are last, in that order, and not
        ranked. Empty where none has a row of the validation half.
        """
        candidates = [self._candidate(name) for name in self.methods_run]
        if not any(each.validated for r in self.regimes_run for m in r.methods for each in m.four_bits):
            return []
        return sorted(
            candidates, key=lambda each: (each.validation.holes != (), each.validation.times_bar or 0.0, each.number)
        )

    @property
    def chosen(self) -> Candidate | None:
        """The first of ``selection`` that meets the bar on the validation half, else the nearest to it, if ranked."""
        ranked = [each for each in self.selection if not each.validation.holes]
        return next((each for each in ranked if each.validation.meets), ranked[0] if ranked else None)

    def _candidate(self, name: str) -> Candidate:
        methods = [(regime, method) for regime in self.regimes_run for method in regime.methods if method.name == name]
        reported, validated = [], []
        for regime, method in methods:
            for each in method.four_bits:
                where = each.quantizer, regime.title
                recovered = each.recovery.value if each.recovery else None
                reported.append((where, recovered, each.reason, each.retain_loss))
                there = each.validated or Validated(None, MISSING, None)
                validated.append((where, there.recovery, there.reason, there.retain_loss))
        return Candidate(
            number=methods[0][1].number,
            name=name,
            not_reached=tuple(sorted({seed for _, method in methods for seed in method.not_reached})),
            validation=_reach(validated),
            report=_reach(reported),
        )

    @property
    def headline(self) -> str:
        """The verdict in one sentence, on what ran."""
        if not self.four_bits:
            return "No 4-bit quantizer was run, so there is no verdict."
        regimes, total = self.regimes_run, len(self.methods_run)
        if not regimes:
            return "No method was run at a 4-bit quantizer yet, so there is no verdict."
        if len(regimes) < len(self.regimes):
            titles = ", ".join(regime.title for regime in regimes)
            where = f"{len(regimes)} of {len(self.regimes)} regimes ({titles})"
        else:
            where = {1: "the one regime", 2: "both regimes"}.get(len(regimes), f"all {len(regimes)} regimes")
        if not total:
            return f"No method was run in {where}, so there is no verdict over them."
        rule = (
            f"recovery under {LARGEST_RECOVERY:.0%} at every 4-bit quantizer, at most "
            f"{100 * LARGEST_RETAIN_LOSS:g} points of retain loss beyond the method in full precision"
        ).replace("%", " %")
        names = self.everywhere
        counted = f"{total} method{'' if total == 1 else 's'} run in {where} ({named_seeds(self.seeds)})"
        if not names:
            return f"Of {counted}, none met the bar: {rule}."
        return f"Of {counted}, {len(names)} met the bar ({rule}): {', '.join(names)}."

    @property
    def not_run(self) -> str | None:
        """What of the recipe has no figures yet, in one sentence; None where everything has."""
        titles = [regime.title for regime in self.regimes if not regime.shown]
        started = [regime for regime in self.regimes if regime.title not in titles]
        with_rows = {method.name for regime in started for method in regime.shown}
        names = [name for name in self._methods if name not in with_rows]
        parts = []
        if titles:
            parts.append(f"{len(titles)} of {len(self.regimes)} regimes ({', '.join(titles)})")
        if names:
            parts.append(f"{len(names)} of {len(self._methods)} methods ({', '.join(names)})")
        if self.planned_seeds:
            total = len(self.seeds) + len(self.planned_seeds)
            parts.append(f"{len(self.planned_seeds)} of {total} seeds ({', '.join(map(str, self.planned_seeds))})")
        whole, holes = [], []  # what is not there at all has no row below: it is named here, however much that is
        for regime in started:
            lacking = [method.name for method in regime.methods if method.name in with_rows and not method.seeds]
            if lacking:
                whole.append(f"{', '.join(lacking)} in {regime.title}")
            for method in regime.shown:
                scores = [each.score for each in method.deployments.values()]
                made, planned = sum(len(score.seeds) for score in scores if score), len(scores) * len(self.seeds)
                if made < planned:
                    holes.append(f"{planned - made} of {planned} scores of {method.name} in {regime.title}")
        if whole or holes:
            more = f" and {len(holes) - _HOLES} more" if len(holes) > _HOLES else ""
            parts.append(f"of the rest {'; '.join([*whole, *holes[:_HOLES]])}{more}")
        return f"Not run: {'; '.join(parts)}." if parts else None

    @property
    def _methods(self) -> list[str]:
        return list(dict.fromkeys(method.name for regime in self.regimes for method in regime.methods))


def in_four_bits(quantizer: str) -> bool:
    """Whether a deployment of ``quail.quantizers`` is in 4 bits: all but full precision and the 8-bit ones."""
    return quantizer != FULL and "int8" not in quantizer


def _reach(cells: Sequence[tuple[tuple[str, str], float | None, str | None, float | None]]) -> Reach:
    """Of quantizer and regime, recovery, why there is none, and retain loss of every cell."""
    recoveries, losses, holes = [], [], []
    for where, recovered, reason, lost in cells:
        if recovered is not None:
            recoveries.append(Highest(recovered, *where))
        if lost is not None:
            losses.append(Highest(lost, *where))
        if recovered is None or lost is None:
            holes.append(f"{', '.join(where)}: {reason or 'no retain loss'}")
    highest = (max(found, key=lambda each: each.value, default=None) for found in (recoveries, losses))
    return Reach(*highest, tuple(holes), len(cells))


def named_seeds(numbers: Sequence[int]) -> str:
    return f"seed{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def regime_title(name: str) -> str:
    return "Shipped in 16 bits" if name == "16bit" else f"Shipped in {name.removeprefix('grid:')}"


def read_run(path: str | os.PathLike) -> Run:
    """The figures of a run's folder or of its ``RESULTS.json``.

    ``cells/`` beside it are read for the texts that models gave, where they are there, and for what ``RESULTS.json``
    leaves to them. Raises ValueError where a file is not there, or is not what ``quail run`` writes.
    """
    path = Path(path)
    file = path / "RESULTS.json" if path.is_dir() else path
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"run: expected a run's folder or RESULTS.json; got {file}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"run: expected the RESULTS.json of a run; got {file}, which is not JSON") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        found = results.get("schema") if isinstance(results, dict) else type(results).__name__
        raise ValueError(f"run: expected RESULTS.json with schema {SCHEMA}; got {found!r} in {file}")
    cells = _Cells(file.parent / "cells")
    try:
        cells.complete(results)
        return _run(results, cells.texts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"run: expected what quail run writes; got {type(error).__name__} {error} in {file}") from None


class _Cells:
    """The cells beside a ``RESULTS.json``."""

    def __init__(self, folder: Path):
        self.folder = folder

    def texts(self, row: dict) -> dict[str, list[str]]:
        """What the model of a row said, by set, of its half: the odd places. Nothing where its cell is not there."""
        said = self._outputs("score", row).get("texts") or {}
        return {name: texts[1::2] for name, texts in said.items()}

    def complete(self, results: dict) -> None:
        """Puts in what is by example and by layer, where it was left to the cells."""
        for row in results["rows"]:
            if row["half"] == HALF and "examples" not in row:
                halves = {each["half"]: each for each in self._needed("score", row)["rows"]}
                row["examples"] = halves[HALF]["examples"]
        for audit in results.get("audits") or ():
            if "formats" not in audit:
                audit["formats"] = self._needed("audit", audit)

    def _needed(self, stage: str, entry: dict) -> dict:
        if not (outputs := self._outputs(stage, entry)):
            file = self._file(stage, entry)
            raise ValueError(f"run: expected the cells of RESULTS.json beside it; got no cells/{file.name}")
        return outputs

    def _outputs(self, stage: str, entry: dict) -> dict:
        try:
            return json.loads(self._file(stage, entry).read_text(encoding="utf-8"))["outputs"]
        except (OSError, ValueError, KeyError):
            return {}

    def _file(self, stage: str, entry: dict) -> Path:
        return self.folder / f"{stage}-{Path(str(entry.get('cell'))).name}.json"


def _run(results: dict, texts) -> Run:
    content = results["content"]
    rows = [row for row in results["rows"] if row["half"] == HALF]
    if not rows:
        raise ValueError("run: expected rows of the report half; got none yet")
    by_place = _by_place(rows, (*_ROW_KEYS, "examples"))
    validation = _by_place([row for row in results["rows"] if row["half"] == VALIDATION], _ROW_KEYS)
    known = rows[0]["metrics"]["forget"]
    metric = next((name for name in FORGET_METRICS if name in known), None)
    if metric is None:
        raise ValueError(f"run: expected {' or '.join(FORGET_METRICS)} of the forget set; got {', '.join(known)}")
    seeds = tuple(sorted({row["seed"] for row in rows}))
    quantizers = _in_order(content["quantizers"], (row["quantizer"] for row in rows))
    names = _in_order(content["methods"], (row["method"] for row in rows if row["method"] is not None))
    regimes = []
    for regime in _in_order(content["regimes"], (row["regime"] for row in rows)):
        reader = _Reader(regime, {HALF: by_place, VALIDATION: validation}, metric, quantizers)
        chosen = [(i, name) for i, name in enumerate(names, 1) if reader.has(name) or _planned(content, name, regime)]
        regimes.append(
            Regime(
                name=regime,
                title=regime_title(regime),
                start={quantizer: reader.score(None, quantizer) for quantizer in quantizers},
                methods=tuple(reader.method(number, name) for number, name in chosen),
                audits=_audits(results.get("audits") or (), regime, [name for _, name in chosen]),
                examples=_examples(reader, [name for _, name in chosen], _classes(content), texts),
            )
        )
    planned = {seed for seed in content.get("seeds") or () if seed not in seeds}
    return Run(
        recipe=results["recipe"],
        quick=results["quick"],
        about=content.get("about") or "",
        task=results["task"],
        metric=metric,
        seeds=seeds,
        planned_seeds=tuple(sorted(planned)),
        quantizers=quantizers,
        regimes=tuple(regimes),
        forget_examples=len(rows[0]["examples"]["forget"][metric]),
        retain_examples=len(rows[0]["examples"]["retain"][metric]),
        content=content,
        made_by=tuple(results["made_by"]),
        cells=results["cells"]["done"],
        planned_cells=results["cells"]["planned"],
        seconds=results["seconds"],
        foretold=_foretold(regimes),
        failed=tuple(_failure(each) for each in results.get("failed") or ()),
    )


def _by_place(rows: Iterable[dict], keys: Sequence[str]) -> dict[tuple, dict[int, dict]]:
    """One half's rows by regime, method and quantizer, then by seed. Raises ValueError where a key is not there."""
    by_place: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"run: expected {', '.join(keys)} in every row; got none of {', '.join(missing)}")
        place = row["regime"], row["method"], row["quantizer"]
        if row["seed"] in by_place.setdefault(place, {}):
            raise ValueError(f"run: expected one row a cell; got two of {place}, seed {row['seed']}")
        by_place[place][row["seed"]] = row
    return by_place


def _failure(each: dict) -> Failure:
    parts = (each.get(key) for key in ("regime", "method", "quantizer"))
    return Failure(" ".join([each["stage"], f"seed {each['seed']}", *filter(None, parts)]), each["reason"])


def _in_order(first: Iterable[str], more: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *more)))


def _planned(content: dict, method: str, regime: str) -> bool:
    if method not in content["methods"]:
        return False
    of_method = {**(content.get("defaults") or {}), **(content["methods"][method] or {})}.get("regimes")
    return of_method is None or regime in of_method


def _classes(content: dict) -> Sequence[str]:
    return (content.get("settings") or {}).get("events") or ()


class _Reader:
    """The rows of one regime, of the report half where no other is said."""

    def __init__(self, regime: str, halves: Mapping[str, Mapping[tuple, dict]], metric: str, quantizers: Sequence[str]):
        self.regime, self._halves, self.metric, self.quantizers = regime, halves, metric, quantizers

    def rows(self, method: str | None, quantizer: str, half: str = HALF) -> dict[int, dict]:
        return self._halves[half].get((self.regime, method, quantizer), {})

    def has(self, method: str) -> bool:
        return any(self.rows(method, quantizer) for quantizer in self.quantizers)

    def score(self, method: str | None, quantizer: str) -> Score | None:
        rows = self.rows(method, quantizer)
        if not rows:
            return None
        sets: dict[str, dict[str, list]] = {}
        for row in rows.values():
            for name, figures in row["metrics"].items():
                for figure, value in figures.items():
                    sets.setdefault(name, {}).setdefault(figure, []).append(value)
        metrics = {
            name: {figure: _mean(values) for figure, values in figures.items() if len(values) == len(rows)}
            for name, figures in sets.items()
        }
        sides = (_mean([self._of_seed(row, name) for row in rows.values()]) for name in ("forget", "retain"))
        return Score(*sides, metrics, tuple(sorted(rows)))

    def method(self, number: int, name: str) -> Method:
        deployments = {quantizer: self._deployment(name, quantizer) for quantizer in self.quantizers}
        trained: dict[int, dict] = {}
        seconds: dict[int, float] = {}
        for quantizer in self.quantizers:
            for seed, row in self.rows(name, quantizer).items():
                trained.setdefault(seed, row.get("training") or {})
                if (took := (row.get("seconds") or {}).get("unlearn")) is not None:
                    seconds[seed] = took
        not_reached = tuple(seed for seed in sorted(trained) if trained[seed].get("reached") is False)
        verdict, why = _judge(deployments, not_reached)
        return Method(
            number=number,
            name=name,
            deployments=deployments,
            steps={seed: trained[seed]["steps"] for seed in sorted(trained) if "steps" in trained[seed]},
            not_reached=not_reached,
            seconds=_mean(list(seconds.values())) if seconds else None,
            verdict=verdict,
            why=why,
        )

    def _deployment(self, name: str, quantizer: str) -> Deployment:
        score = self.score(name, quantizer)
        if quantizer == FULL:
            return Deployment(quantizer, score, reason=None if score else MISSING)
        found = {}
        for prefix, figure, higher in (("", self.metric, True), ("loss_", LOSS, False)):
            found[f"{prefix}recovery"], found[f"{prefix}reason"] = self._recovery(name, quantizer, figure, higher)
        return Deployment(
            quantizer,
            score,
            **found,
            retain_loss=self._retain_loss(name, quantizer),
            start_retain_loss=self._retain_loss(None, quantizer),
            validated=self._validated(name, quantizer) if self.rows(name, quantizer, VALIDATION) else None,
        )

    def _arms(self, name: str, quantizer: str, half: str) -> tuple[list[list[dict]], str | None]:
        """This cell, the method in full precision and the start, of the seeds that all have; or why there are none."""
        arms = {
            "this cell": self.rows(name, quantizer, half),
            "the method in full precision": self.rows(name, FULL, half),
            f"the start at {quantizer}": self.rows(None, quantizer, half),
        }
        if not arms["this cell"]:
            return [], MISSING
        for what, rows in arms.items():
            if not rows:
                return [], f"{what} is missing"
        seeds = sorted(set.intersection(*(set(rows) for rows in arms.values())))
        if not seeds:
            return [], f"{', '.join(arms)} have no seed in common"
        return [[rows[seed] for seed in seeds] for rows in arms.values()], None

    def _validated(self, name: str, quantizer: str) -> Validated:
        arms, reason = self._arms(name, quantizer, VALIDATION)
        recovered = None
        if reason is None:
            recovered, reason = _of_means(*(_mean([self._of_seed(row, "forget") for row in rows]) for rows in arms))
        lost = self._retain_loss(name, quantizer, VALIDATION)
        return Validated(recovered, reason, None if lost is None else round(lost, _KNOWN))

    def _recovery(self, name: str, quantizer: str, figure: str, higher: bool) -> tuple[Recovery | None, str | None]:
        arms, reason = self._arms(name, quantizer, HALF)
        if reason is not None:
            return None, reason
        values = [[_values(row, figure) for row in rows] for rows in arms]
        lengths = sorted({len(of_seed) for arm in values for of_seed in arm})
        if len(lengths) > 1 or lengths[0] < 2:
            return None, f"expected the same two or more examples of each; got {', '.join(map(str, lengths))}"
        estimate = recovery(*values, higher_is_remembered=higher)
        return estimate, estimate.reason

    def _retain_loss(self, name: str | None, quantizer: str, half: str = HALF) -> float | None:
        here, full = self.rows(name, quantizer, half), self.rows(name, FULL, half)
        seeds = sorted(here.keys() & full.keys())
        losses = [(self._of_seed(full[seed], "retain"), self._of_seed(here[seed], "retain")) for seed in seeds]
        if not losses or any(None in pair for pair in losses):
            return None
        return statistics.fmean(before - after for before, after in losses)

    def _of_seed(self, row: dict, name: str) -> float | None:
        """The mean of the examples, as ``metrics`` is rounded; of ``metrics`` where there are no examples."""
        values = _values(row, self.metric, name)
        return _mean(values) if values else row["metrics"].get(name, {}).get(self.metric)


def _values(row: dict, figure: str, name: str = "forget") -> list[float]:
    """By example; what was not finite is null in the file."""
    values = row.get("examples", {}).get(name, {}).get(figure) or ()
    return [math.nan if value is None else value for value in values]


def _mean(values: Sequence[float | None]) -> float | None:
    if not values or any(value is None or not math.isfinite(value) for value in values):
        return None
    return statistics.fmean(values)


def _of_means(
    quantized: float | None, unlearned: float | None, quantized_original: float | None
) -> tuple[float | None, str | None]:
    """``quail.metrics.intervals.recovery`` of means alone, of a metric where more is remembered; or why there is none.

    That its interval has no end cannot be seen here.
    """
    if None in (quantized, unlearned, quantized_original):
        return None, "a mean is missing or not finite"
    forgotten = quantized_original - unlearned
    if forgotten < SMALLEST_FORGOTTEN - _ROUNDING:
        means = f"quantized original {quantized_original:.4g}, unlearned {unlearned:.4g}"
        return None, f"less than {SMALLEST_FORGOTTEN:g} was forgotten: {means}"
    return round((quantized - unlearned) / forgotten, _KNOWN), None


def _judge(deployments: Mapping[str, Deployment], not_reached: Sequence[int]) -> tuple[str, str]:
    """The verdict, and what it rests on in a few words. The rules are at the top of this file."""
    here = [each for name, each in deployments.items() if in_four_bits(name)]
    if not here:
        return NOT_JUDGED, "no 4-bit quantizer"
    known = [each for each in here if each.recovery and each.recovery.value is not None]
    if back := [each for each in known if each.recovery.value >= LARGEST_RECOVERY]:
        worst = max(back, key=lambda each: each.recovery.value)
        return CAME_BACK, f"{percent(worst.recovery.value)} % at {worst.quantizer}"
    costly = [each for each in here if (each.retain_loss or 0.0) > LARGEST_RETAIN_LOSS + _ROUNDING]
    if costly:
        worst = max(costly, key=lambda each: each.retain_loss)
        return RETAIN_FELL, f"by {100 * worst.retain_loss:.1f} points at {worst.quantizer}"
    for each in here:
        if each.recovery is None or each.recovery.value is None or each.retain_loss is None:
            return NOT_JUDGED, f"{each.quantizer}: {each.reason or 'no retain loss'}"
    worst = max(known, key=lambda each: each.recovery.value)
    highest = max(each.recovery.high for each in known)
    why = f"{percent(worst.recovery.value)} % at most, at {worst.quantizer}; intervals up to {percent(highest)} %"
    if not_reached:
        return NOT_REACHED, f"in seed {', '.join(map(str, not_reached))}; {why}"
    return KEPT, why


def _audits(audits: Iterable[dict], regime: str, methods: Sequence[str]) -> tuple[Audit, ...]:
    found: dict[tuple[str, str], dict[int, dict]] = {}
    for audit in audits:
        if audit["regime"] == regime:
            for format, entry in audit["formats"].items():
                found.setdefault((format, audit["method"]), {})[audit["seed"]] = entry
    formats = dict.fromkeys(format for format, _ in found)
    merged = []
    for format in formats:
        for method in methods:
            if not (by_seed := found.get((format, method))):
                continue
            entries = [_numbers(entry) for entry in by_seed.values()]
            layers: dict[str, list[dict]] = {}
            for entry in by_seed.values():
                for layer in entry.get("layers") or ():
                    layers.setdefault(layer["layer"], []).append(_numbers(layer))
            of_layers = {name: _means(figures) for name, figures in layers.items()}
            candidates = [_candidates(format, entry) for entry in by_seed.values()]
            seeds = tuple(sorted(by_seed))
            merged.append(Audit(method, format, _means(entries), of_layers, _means(candidates), seeds))
    return tuple(merged)


def _numbers(entry: dict) -> dict[str, float | None]:
    """The figures of the weights and, where there are some, of the outputs, with the weights' signal to noise."""
    flat = {**entry, **(entry.get("outputs") or {})}
    numbers = {
        key: value
        for key, value in flat.items()
        if value is None or isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    if "delivered_cosine" in numbers:
        numbers["weight_snr_db"] = _cosine_db(numbers["delivered_cosine"])
    if "changed_share" not in numbers and numbers.get("code_overlap") is not None:
        numbers["changed_share"] = 1 - numbers["code_overlap"]
    return numbers


def _cosine_db(cosine: float | None) -> float | None:
    """From -120 dB, nothing arrives along the update, to 120 dB, nothing arrives beside it."""
    if cosine is None:
        return None
    square = max(cosine, 0.0) ** 2
    return 10 * math.log10(min(max(square / max(1 - square, 1e-12), 1e-12), 1e12))


def _means(entries: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Of the seeds that have a figure; None where none has."""
    means = {}
    for key in dict.fromkeys(key for entry in entries for key in entry):
        values = [entry[key] for entry in entries if entry.get(key) is not None]
        means[key] = _mean(values)
    return means


def _candidates(format: str, entry: dict) -> dict[str, float]:
    """What could foretell the recovery: as the file has it, else from its figures; nothing where they are too few."""
    from ..auditing.figures import AuditReport, Figures, FormatRow
    from ..auditing.predictors import predictors

    if entry.get("predictors"):
        return entry["predictors"]
    needed = [field.name for field in fields(Figures)]
    if any(name not in entry for name in needed):
        return {}
    figures = Figures(**{name: entry[name] for name in needed})
    row = FormatRow(format, 0, entry.get("shipped_in"), 0, (), figures)
    report = AuditReport("", "", "", (), (), "", {format: row}, (), (), (), (), ())
    try:
        return predictors(report, format)
    except ValueError:  # an update that changes nothing foretells nothing
        return {}


def _foretold(regimes: Sequence[Regime]) -> tuple[Foretold, ...]:
    from ..auditing.predictors import rank_correlation

    cells: list[tuple[str, str, dict, float]] = []
    left_out: dict[str, int] = {}
    for regime in regimes:
        audits = {(audit.method, audit.format): audit.candidates for audit in regime.audits}
        for method in regime.methods:
            for quantizer, each in method.deployments.items():
                candidates = audits.get((method.name, quantizer.removeprefix("rtn:")))
                if not candidates or each.score is None:
                    continue
                if each.recovery is None or each.recovery.value is None:
                    left_out[regime.name] = left_out.get(regime.name, 0) + 1
                    continue
                cells.append((regime.name, method.name, candidates, each.recovery.value))
    scopes: list[str | None] = [regime.name for regime in regimes]
    found = []
    for scope in (*scopes, None) if len(scopes) > 1 else scopes:
        chosen = [cell for cell in cells if scope in (None, cell[0])]
        shared = dict.fromkeys(key for cell in chosen for key in cell[2])
        names = [key for key in shared if all(cell[2].get(key) is not None for cell in chosen)]
        if len(chosen) < _FEWEST_CELLS or not names:
            continue
        clusters = [cell[:2] for cell in chosen]
        measured = [cell[3] for cell in chosen]
        correlations = {
            name: rank_correlation([cell[2][name] for cell in chosen], measured, clusters=clusters) for name in names
        }
        lost = sum(left_out.values()) if scope is None else left_out.get(scope, 0)
        found.append(Foretold(scope, correlations, len(chosen), len(set(clusters)), lost))
    return tuple(found)


def _examples(reader: _Reader, methods: Sequence[str], classes: Sequence[str], texts) -> tuple[Example, ...]:
    """The first, the middle and the last example of the half, of the first seed that the start has."""
    start = reader.rows(None, FULL)
    if not start:
        return ()
    seed = min(start)
    count = len(_values(start[seed], reader.metric))
    said: dict[str | None, dict[str, list[str]]] = {}
    for method in (None, *methods):
        for quantizer in reader.quantizers:
            row = reader.rows(method, quantizer).get(seed)
            given = _given(row, classes, texts) if row else []
            if len(given) == count:
                said.setdefault(method, {})[quantizer] = given
    if FULL not in said.get(None, {}):
        return ()
    labels = start[seed]["examples"]["forget"].get("label")
    places = sorted({round(i * (count - 1) / (_EXAMPLES - 1)) for i in range(_EXAMPLES)})
    return tuple(
        Example(
            place=place + 1,
            of=count,
            right=_class(classes, labels[place]) if labels else None,
            given={who: {name: given[place] for name, given in by.items()} for who, by in said.items()},
        )
        for place in places
    )


def _given(row: dict, classes: Sequence[str], texts) -> list[str]:
    """What one model gave for each example: the class it chose, or what it said."""
    predicted = row["examples"]["forget"].get("predicted")
    if predicted:
        return [_class(classes, number) for number in predicted]
    return (row.get("texts") or texts(row)).get("forget") or []


def _class(classes: Sequence[str], number: int) -> str:
    return classes[number] if 0 <= number < len(classes) else f"class {number}"


def percent(share: float) -> str:
    """Without the sign: two digits below 10 %, so that the bar of 5 % is seen, else whole ones."""
    value = 100 * share
    text = f"{value:.1f}" if abs(value) < 10 else f"{value:.0f}"
    return text.removeprefix("-") if not float(text) else text
