"""Runs a recipe: plans its cells, makes those that are not there, and gathers RESULTS.json after each.

The order is by seed, then by regime, then by method, each checkpoint followed by its scores: a run that is stopped
has whole comparisons for the first seed before it begins the second.
"""

import dataclasses
import fnmatch
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..machine import made_by
from ..models import save_checkpoint
from ..weights import deploy_weights_
from . import training
from .cells import STAGE_VERSIONS, WITH_CHECKPOINT, Cell, Store, dumps, rounded
from .recipe import REGIME_16BIT, REGIME_GRID, Recipe, calibrates
from .tasks import TASKS, Task

SCHEMA = 2
_DIGITS = 4  # of the figures in RESULTS.json; cells have six
_OF_A_LAYERS_OUTPUT = ("output_snr", "output_snr_db", "output_snr_flip_law", "output_cosine", "output_share")
_OF_A_LAYER = ("code_overlap", "value_overlap", "predicted_flip_share", "delivered_share", "delivered_cosine")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: cells that are there of those planned, and whether the budget ended it.

    ``failed`` are cells that were tried and gave an error, ``not_tried`` those that start from one of them.
    """

    done: int
    planned: int
    out_of_time: bool
    failed: int = 0
    not_tried: int = 0


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    only: str | None = None,
    data: str | Path | None = None,
    budget_minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Makes the cells of ``recipe`` that are not in the run folder ``out`` yet, and gathers ``RESULTS.json``.

    ``seeds`` replaces the recipe's. ``only`` is shell patterns, with commas between: of methods, or of
    ``REGIME/METHOD``; the starting points' scores are made in any case. ``budget_minutes`` ends the run before a cell
    that would outlast it, going by the longest earlier cell of its stage. A cell that raises ValueError has failed:
    its reason is recorded, what starts from it is left out, the rest goes on, and the next run tries it again. Raises
    ValueError where the data, the base model or the folder are not what a run needs, before anything is trained.
    """
    started = time.monotonic()
    task = TASKS[recipe.task](recipe.settings, recipe.data_folder(data), recipe.model)
    digests = task.digests()
    chosen = tuple(seeds) if seeds is not None else recipe.seeds
    cells = plan(recipe, digests, chosen, only)
    store = Store(out).open(public_cells=not task.cells_quote)
    try:
        earlier = _earlier_seeds(store, recipe)
        everything = plan(recipe, digests, dict.fromkeys((*recipe.seeds, *earlier, *chosen)), None)
        environment = made_by()
        described = {"recipe": recipe.name, "quick": recipe.quick, "content": recipe.raw, "digests": digests}
        described |= {"seeds": list(dict.fromkeys((*earlier, *chosen)))} | environment
        store.write_text("run.json", dumps(described, indent=1))
        runner = _Runner(recipe, task, store, cells, everything, environment, say)
        return runner.run(started, budget_minutes)
    finally:
        store.close()


def plan(recipe: Recipe, digests: dict, seeds: Sequence[int], only: str | None = None) -> list[Cell]:
    """Every cell of the recipe, each after the one that it starts from. Raises ValueError where ``only`` fits none."""
    kind = TASKS[recipe.task]
    settings = dataclasses.asdict(recipe.settings)
    trained = {key: value for key, value in settings.items() if key not in kind.score_settings}
    read = {name: digest for name, digest in digests.items() if name not in kind.score_files}
    shared = {"task": recipe.task, "settings": trained, "model": recipe.model, "digests": read}
    # Only where there is something to say, so that keys of scores that are there stay theirs.
    of_scores = {"settings": settings}
    if kind.score_version > 1:
        of_scores["version"] = kind.score_version
    if len(read) < len(digests):
        of_scores["digests"] = {name: digest for name, digest in digests.items() if name in kind.score_files}
    cells: list[Cell] = []
    fitted = False

    def add(stage, inputs, where, parent=None, payload=None) -> Cell:
        cells.append(Cell(stage, inputs, where, parent, payload))
        return cells[-1]

    def scored(cell: Cell, where: dict) -> None:
        for quantizer in recipe.quantizers:
            inputs = {"quantizer": quantizer} | of_scores
            if calibrates(quantizer):
                inputs["calibration"] = dataclasses.asdict(recipe.calibration)
            add("score", inputs, where | {"quantizer": quantizer}, cell)

    for seed in seeds:
        learned = None
        if recipe.learn is not None:
            inputs = shared | {"learn": dataclasses.asdict(recipe.learn), "seed": seed}
            learned = add("learn", inputs, {"seed": seed})
        for regime in recipe.regimes:
            methods = [m for m in recipe.methods if m.regimes is None or regime in m.regimes]
            if only is not None:
                methods = [m for m in methods if _fits(only, regime, m.name)]
                if not methods:
                    continue
            fitted = True
            where = {"seed": seed, "regime": regime}
            inputs = {"regime": regime} | ({} if learned else shared | {"seed": seed})
            start = add("start", inputs, where, learned)
            scored(start, where)
            for method in methods:
                inputs = {"method": method.inputs(), "stop": recipe.stop.inputs(), "settings": trained, "seed": seed}
                of_method = where | {"method": method.name}
                cell = add("unlearn", inputs, of_method, start, method)
                if recipe.audit:
                    add("audit", {"formats": list(recipe.audit)}, of_method, cell)
                scored(cell, of_method)
    if only is not None and not fitted:
        raise ValueError(f"only: expected a pattern of methods or REGIME/METHOD; got {only!r}, which fits none")
    return cells


def gather(store: Store, cells: Sequence[Cell], described: dict, *, whole: bool) -> dict:
    """The rows of every score that is there: what ``RESULTS.json`` holds.

    What is by example and by layer is left to the cells unless ``whole``.
    """
    rows, audits = [], []
    records = {cell.key: store.read(cell) for cell in cells}
    for cell in cells:
        record = records[cell.key]
        if record is None:
            continue
        if cell.stage == "audit":
            found = {"formats": rounded(record["outputs"], _DIGITS)} if whole else {}
            audits.append(cell.where | {"cell": cell.key} | found)
        if cell.stage != "score":
            continue
        made = records[cell.parent.key] or {}
        common = {k: cell.where.get(k) for k in ("regime", "method", "seed", "quantizer")}
        training_of = {k: v for k, v in (made.get("outputs") or {}).items() if k != "trace"}
        seconds = {"score": record["seconds"], cell.parent.stage: made.get("seconds")}
        for row in record["outputs"]["rows"]:
            if row["half"] == "validation" or not whole:
                row = {key: value for key, value in row.items() if key != "examples"}  # selection needs no intervals
            rows.append(
                common | rounded(row, _DIGITS) | {"training": training_of, "seconds": seconds, "cell": cell.key}
            )
    done = sum(record is not None for record in records.values())
    failed = [
        {"stage": cell.stage} | cell.where | {"reason": reason}
        for cell in cells
        if records[cell.key] is None and (reason := store.failure(cell)) is not None
    ]
    environments = [record["made_by"] for record in records.values() if record]
    return {
        "schema": SCHEMA,
        **described,
        "cells": {"planned": len(cells), "done": done, "failed": len(failed)},
        "made_by": [e for i, e in enumerate(environments) if e not in environments[:i]],
        "seconds": round(sum(record["seconds"] for record in records.values() if record), 1),
        "failed": failed,
        "audits": audits,
        "rows": rows,
    }


class _Runner:
    def __init__(self, recipe: Recipe, task: Task, store: Store, cells, everything, environment, say):
        self.recipe, self.task, self.store = recipe, task, store
        self.cells, self.everything = cells, everything
        self.environment, self.say = environment, say
        self.children: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.parent:
                self.children.setdefault(cell.parent.key, []).append(cell)

    def run(self, started: float, budget_minutes: float | None) -> Outcome:
        pending = [cell for cell in self.cells if self.store.read(cell) is None]
        total, done = len(self.cells), len(self.cells) - len(pending)
        self.say(f"{self.recipe.name}: {total} cells, {done} of them done, in {self.store.root}")
        self._gather()
        self._drop_checkpoints()
        failed, broken, not_tried = 0, set(), 0

        def ended(out_of_time: bool) -> Outcome:
            if failed:
                after = f", {not_tried} that start from them not tried" if not_tried else ""
                self.say(f"{failed} cells failed{after}; the next run tries them again")
            return Outcome(done, total, out_of_time, failed, not_tried)

        for cell in pending:
            if not broken.isdisjoint(_and_ancestors(cell)):
                not_tried += 1
                continue
            needed = self._missing_ancestors(cell) + [cell]
            if budget_minutes is not None:
                left = budget_minutes * 60 - (time.monotonic() - started)
                expected = sum(max(self.store.seconds(each.stage), default=0.0) for each in needed)
                if left <= 0 or expected > left:
                    self.say(f"Out of time before '{cell.label}': {done} of {total} cells done; run again to go on")
                    return ended(True)
            for each in needed:
                # A cell whose checkpoint was dropped is made again, though its figures are there.
                again = "" if each is cell else " (again, for its checkpoint)"
                began = time.monotonic()
                try:
                    outputs, seconds = self._make(each)
                except ValueError as error:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    failed += 1
                    broken.add(each.key)
                    self.say(f"[{done}/{total}] {each.label}{again}: failed: {reason}")
                    reason = reason if each is cell else f"{each.label}{again}: {reason}"
                    self.store.write_failure(cell, reason, time.monotonic() - began, self.environment)
                    break
                done += each is cell
                self.say(f"[{done}/{total}] {each.label}{again}: {seconds:.0f} s{_summary(each, outputs)}")
            gc.collect()  # of a cell that failed, too
            self._gather()
            self._drop_checkpoints(cell)
        return ended(False)

    def _missing_ancestors(self, cell: Cell) -> list[Cell]:
        """What has to be made again before ``cell`` can be: ancestors whose checkpoint is not there."""
        needed, above = [], cell.parent
        while above is not None and above.stage in WITH_CHECKPOINT and not self.store.checkpoint(above).is_dir():
            needed.insert(0, above)
            above = above.parent
        if cell.stage == "audit" and not needed and not self.store.checkpoint(cell.parent.parent).is_dir():
            needed = self._missing_ancestors(cell.parent)
        return needed

    def _make(self, cell: Cell) -> tuple[dict, float]:
        began = time.monotonic()
        if cell.stage in WITH_CHECKPOINT:
            # There without its cell's file: a process was killed between the two.
            self.store.drop_checkpoint(cell)
        outputs = rounded(getattr(self, f"_{cell.stage}")(cell), 6)
        seconds = time.monotonic() - began
        self.store.write(cell, outputs, seconds, self.environment)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return outputs, seconds

    def _learn(self, cell: Cell) -> dict:
        seed = cell.where["seed"]
        model, tokenizer = self.task.load_base(seed)
        self.task.prepare(tokenizer)
        outputs = training.learn(model, tokenizer, self.task, self.recipe.learn, seed)
        save_checkpoint(model.cpu(), tokenizer, self.store.checkpoint(cell), torch.float32)
        return outputs

    def _start(self, cell: Cell) -> dict:
        if cell.parent:
            model, tokenizer = self.task.load(self.store.checkpoint(cell.parent))
        else:
            model, tokenizer = self.task.load_base(cell.where["seed"])
        regime = cell.where["regime"]
        if regime != REGIME_16BIT:
            deploy_weights_(model, regime.removeprefix(REGIME_GRID))
        save_checkpoint(model, tokenizer, self.store.checkpoint(cell), torch.bfloat16)
        return {}

    def _unlearn(self, cell: Cell) -> dict:
        model, tokenizer = self.task.load(self.store.checkpoint(cell.parent))
        self.task.prepare(tokenizer)
        scratch = self.store.root / "scratch"
        try:
            model, outputs = training.unlearn(
                model, tokenizer, self.task, cell.payload, self.recipe.stop, cell.where["seed"], str(scratch)
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        save_checkpoint(model.cpu(), tokenizer, self.store.checkpoint(cell), torch.bfloat16)
        return outputs

    def _audit(self, cell: Cell) -> dict:
        from ..auditing import audit

        before, after = (str(self.store.checkpoint(each)) for each in (cell.parent.parent, cell.parent))
        tokenizer = self.task.load_tokenizer(after)
        self.task.prepare(tokenizer)
        # What is to be forgotten, of the half that nothing is reported of.
        ids = [row["input_ids"] for row in self.task.forget_rows[::2]]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return _audit_summary(audit(before, after, tuple(self.recipe.audit), calibration=texts, progress=False))

    def _score(self, cell: Cell) -> dict:
        from .. import quantizers

        folder = self.store.checkpoint(cell.parent)
        tokenizer = self.task.load_tokenizer(folder)
        self.task.prepare(tokenizer)
        quantizer, texts, used = cell.where["quantizer"], None, {}
        if calibrates(quantizer):
            texts = self.task.calibration_texts(self.recipe.calibration.texts)
            used = {"calibration_texts": len(texts)}
        model = quantizers.deploy(folder, quantizer, auto=self.task.auto, calibration=texts)
        measured = self.task.measure(model)
        return {"rows": self.task.rows(measured), "texts": measured.texts} | used

    def _gather(self) -> None:
        described = {"recipe": self.recipe.name, "quick": self.recipe.quick, "task": self.recipe.task}
        described |= {"stage_versions": STAGE_VERSIONS, "content": self.recipe.raw}
        results = gather(self.store, self.everything, described, whole=self.task.cells_quote)
        text = dumps(results, separators=(",", ":"))
        self.store.write_text("RESULTS.json", text.replace('{"regime"', '\n{"regime"') + "\n")  # a row a line

    def _drop_checkpoints(self, after: Cell | None = None) -> None:
        """Removes unlearned checkpoints that nothing planned reads any more, unless the recipe keeps them."""
        if self.recipe.keep_checkpoints == "all":
            return
        for cell in self.cells if after is None else [c for c in (after.parent,) if c is not None]:
            if cell.stage == "unlearn" and self.store.checkpoint(cell).is_dir():
                if all(self.store.read(child) is not None for child in self.children.get(cell.key, ())):
                    self.store.drop_checkpoint(cell)


def _and_ancestors(cell: Cell) -> Iterator[str]:
    """The keys of a cell and of those that it starts from."""
    above: Cell | None = cell
    while above is not None:
        yield above.key
        above = above.parent


def _fits(only: str, regime: str, method: str) -> bool:
    patterns = [pattern.strip() for pattern in only.split(",")]
    return any(fnmatch.fnmatchcase(text, pattern) for text in (method, f"{regime}/{method}") for pattern in patterns)


def _audit_summary(report) -> dict:
    """By format what the audit shows of the model, and of each layer what could foretell the recovery."""
    from ..auditing.predictors import predictors

    measured, found = report.calibration, {}
    for name, row in report.formats.items():
        figures = dataclasses.asdict(row.figures) if row.figures else {}
        layers = {
            each.layer: {"layer": each.layer} | {key: getattr(each.figures, key) for key in _OF_A_LAYER}
            for each in report.layers
            if each.format == name
        }
        for each in measured.layers:
            if each.format == name and each.layer in layers:
                of_outputs = dataclasses.asdict(each.figures)
                layers[each.layer]["outputs"] = {key: of_outputs[key] for key in _OF_A_LAYERS_OUTPUT}
        lost = {"lost_tensors": row.lost_tensors, "lost_layers": len(row.lost_layers)}
        found[name] = {"shipped_in": row.shipped_in} | lost | figures | {"layers": list(layers.values())}
        if measured.formats.get(name):
            found[name]["outputs"] = dataclasses.asdict(measured.formats[name])
        if row.figures and row.figures.delivered_share is not None:
            found[name]["predictors"] = predictors(report, name)
    return found


def _earlier_seeds(store: Store, recipe: Recipe) -> list[int]:
    """Seeds of earlier runs in this folder, whose rows stay in RESULTS.json."""
    try:
        earlier = json.loads((store.root / "run.json").read_text(encoding="utf-8"))
        return earlier["seeds"] if earlier["recipe"] == recipe.name else []
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return []


def _summary(cell: Cell, outputs: dict) -> str:
    if cell.stage == "learn":
        return f", NLL {_shown(outputs['nll'], 4)}"
    if cell.stage == "unlearn":
        way = "reached" if outputs["reached"] else "not reached"
        return f", {outputs['steps']} steps, validation {_shown(outputs['validation'], 3)} ({way})"
    if cell.stage == "score":
        figures = []
        for name, of_set in outputs["rows"][1]["metrics"].items():
            figures += [f"{name} {figure} {value:.3f}" for figure, value in of_set.items() if value is not None]
        return ", " + ", ".join(figures)
    return ""


def _shown(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
