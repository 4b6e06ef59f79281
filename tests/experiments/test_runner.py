"""A run goes on where it stopped, makes again only what changed, and gathers one file that everything is in."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score
from transformers import TrainerControl, TrainerState

from quail import quantizers
from quail.cli import main
from quail.experiments import cells, runner, training
from quail.experiments.recipe import Stop, find_recipe, load_recipe
from quail.experiments.runner import plan, run
from quail.experiments.tasks import TASKS, Mide22Classification, MuseNewsKnowMem, Tofu
from quail.reporting import read_run


def made(out):
    """When each cell of a run was written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}


def results(out):
    return json.loads((out / "RESULTS.json").read_text(encoding="utf-8"))


def without_times(out):
    found = results(out)
    del found["seconds"]
    for row in found["rows"]:
        del row["seconds"]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_checkpoint):
    """A whole run of the small recipe, made once; tests work on copies."""
    return {}


@pytest.fixture
def small(recipe_file, tmp_path_factory, tiny_checkpoint, finished):
    """(write the recipe, a finished run of it that the test may change)."""
    path = recipe_file()
    out = path.parent / "run"
    if "run" not in finished:
        run(load_recipe(path), out, say=lambda line: None)
        finished["run"] = tmp_path_factory.mktemp("finished") / "run"
        shutil.copytree(out, finished["run"])
    else:
        shutil.copytree(finished["run"], out)
    return recipe_file, out


def test_the_results_hold_every_row(small):
    _, out = small
    found = results(out)
    assert found["cells"] == {"planned": 16, "done": 16, "failed": 0} and found["failed"] == []
    rows = found["rows"]
    # 2 starts and 3 unlearned checkpoints, each under 2 quantizers, in 2 halves
    assert len(rows) == 20
    coordinates = {(r["regime"], r["method"], r["quantizer"], r["half"]) for r in rows}
    assert len(coordinates) == 20
    assert {(r["regime"], r["method"]) for r in rows} == {
        ("16bit", None),
        ("16bit", "GA+GDR"),
        ("16bit", "NPO"),
        ("grid:bnb-nf4", None),
        ("grid:bnb-nf4", "GA+GDR"),
    }
    for row in rows:
        assert row["seed"] == 0
        assert ("examples" in row) == (row["half"] == "report")
        for name, figures in row.get("examples", {}).items():
            plain = {"exact", "rouge_l", "nll", "extraction_strength", "exact_memorization"}
            assert set(figures) == plain | {"truth_ratio"}
            assert {len(values) for values in figures.values()} == {2}
            for figure in plain:
                assert row["metrics"][name][figure] == pytest.approx(sum(figures[figure]) / 2, rel=1e-3)
        assert row["metrics"]["model"]["perplexity"] > 1
        assert row["seconds"]["score"] > 0
    assert found["made_by"][0]["versions"]["torch"] == torch.__version__
    assert found["content"]["methods"]["NPO"]["forget_loss"] == "npo"


def test_git_leaves_out_what_quotes_the_data(small):
    _, out = small
    assert (out / ".gitignore").read_text().split() == ["*", "!RESULTS.json", "!run.json"]


def test_learning_and_unlearning_did_what_they_are_for(small):
    _, out = small
    nll = {
        (row["regime"], row["method"], row["quantizer"]): row["metrics"]["forget"]["nll"]
        for row in results(out)["rows"]
        if row["half"] == "report"
    }
    assert nll["16bit", None, "none"] < 1.0  # ln 64 = 4.2 where nothing is known
    assert nll["16bit", "GA+GDR", "none"] > 1.5 * nll["16bit", None, "none"]
    # On the grid of nf4 quantizing again to it changes nothing.
    assert nll["grid:bnb-nf4", None, "none"] == nll["grid:bnb-nf4", None, "rtn:bnb-nf4"]
    assert nll["16bit", None, "none"] != nll["16bit", None, "rtn:bnb-nf4"]


def test_a_stop_rule_is_obeyed_and_recorded(small):
    _, out = small
    training = {(r["regime"], r["method"]): r["training"] for r in results(out)["rows"] if r["method"]}
    for outcome in training.values():
        assert 1 <= outcome["steps"] <= 3
        assert outcome["reached"] is (outcome["validation"] <= 0)
        assert outcome["reached"] or outcome["steps"] == 3


@pytest.mark.parametrize(("weights", "value"), [("trained", 1.001), ("saved", 1.0)])
def test_a_stop_rule_looks_at_the_weights_it_is_told_to(weights, value):
    """1.001 is no number of bf16: as saved, it is 1."""

    class Task:
        def validate(self, model):
            return {"exact": model.weight.item()}

    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.001)
    watch = training._StopOnValidation(Task(), Stop("exact", 1.0, weights=weights), 1.0, max_steps=8)
    control = TrainerControl()
    watch.on_step_end(None, TrainerState(global_step=3, max_steps=8), control, model=model)
    assert watch.trace == [(3, pytest.approx(value, abs=1e-7))]
    assert watch.reached is control.should_training_stop is (weights == "saved")
    assert model.weight.item() == pytest.approx(1.001, abs=1e-7)


def test_a_stop_rule_on_trained_weights_keeps_the_keys_of_older_cells(recipe_file):
    def keys(**stop):
        recipe = load_recipe(recipe_file(stop={"metric": "exact", "at": 0.0} | stop))
        return [cell.key for cell in plan(recipe, {"data": {}, "model": {}}, [0]) if cell.stage == "unlearn"]

    assert keys() == keys(weights="trained")
    assert not set(keys()) & set(keys(weights="saved"))
    assert load_recipe(recipe_file()).stop.inputs() == {"metric": "exact", "at": 0.0, "every": 1}


def test_a_finished_run_is_left_as_it_is(small):
    write, out = small
    before, rows = made(out), results(out)
    assert len(before) == 16
    outcome = run(load_recipe(write()), out, say=lambda line: None)
    assert (outcome.done, outcome.planned, outcome.out_of_time) == (16, 16, False)
    assert made(out) == before and results(out) == rows


def test_only_starting_checkpoints_are_kept_unless_asked(small):
    write, out = small
    kinds = Counter(name.partition("-")[0] for name in made(out))
    assert kinds == {"learn": 1, "start": 2, "unlearn": 3, "score": 10}
    assert len(list((out / "checkpoints").iterdir())) == 3
    run(load_recipe(write("kept.yaml", keep_checkpoints="all", methods={"x": {"max_steps": 2}})), out, say=print)
    assert len(list((out / "checkpoints").iterdir())) == 5


def test_a_changed_method_is_made_again_and_nothing_else(small):
    write, out = small
    before = made(out)
    methods = write.content["methods"] | {"GA+GDR": {"learning_rate": 2e-3}}
    run(load_recipe(write(methods=methods)), out, say=lambda line: None)
    after = made(out)
    assert {name: after[name] for name in before} == before
    new = Counter(name.partition("-")[0] for name in after.keys() - before.keys())
    assert new == {"unlearn": 2, "score": 4}
    assert len(results(out)["rows"]) == 20  # those of the changed method in place of the old ones


def test_a_method_by_another_name_is_not_made_again(small):
    write, out = small
    before = made(out)
    methods = {"Gradient difference": {}, "NPO": write.content["methods"]["NPO"]}
    run(load_recipe(write(methods=methods)), out, say=lambda line: None)
    assert made(out) == before
    assert {row["method"] for row in results(out)["rows"]} == {None, "Gradient difference", "NPO"}


def test_changed_data_make_everything_again(small):
    write, out = small
    before = made(out)
    path = write.data / "forget01_perturbed.json"
    path.write_text(path.read_text().replace("a b ?", "a c ?", 1))
    run(load_recipe(write()), out, only="NPO", say=lambda line: None)
    new = Counter(name.partition("-")[0] for name in made(out).keys() - before.keys())
    assert new == {"learn": 1, "start": 1, "unlearn": 1, "score": 4}


def test_a_new_version_of_scoring_scores_again(small, monkeypatch):
    write, out = small
    before = made(out)
    monkeypatch.setitem(cells.STAGE_VERSIONS, "score", 99)
    run(load_recipe(write()), out, only="16bit/GA*, nothing", say=lambda line: None)
    new = Counter(name.partition("-")[0] for name in made(out).keys() - before.keys())
    assert new == {"score": 4}


def test_a_new_version_of_a_tasks_figures_scores_again_and_of_no_other(small, monkeypatch):
    write, out = small
    before = made(out)
    monkeypatch.setattr(TASKS["mide22-classification"], "score_version", 99)
    run(load_recipe(write()), out, say=lambda line: None)
    assert made(out) == before
    monkeypatch.setattr(TASKS["tofu"], "score_version", 99)
    run(load_recipe(write()), out, only="16bit/GA*", say=lambda line: None)
    new = Counter(name.partition("-")[0] for name in made(out).keys() - before.keys())
    assert new == {"score": 4}


COMMITTED = Path(__file__).parents[2] / "runs" / "mide22-classification"


def test_the_committed_run_is_found_as_it_was():
    """Keys that change would make hours of work again."""
    described = json.loads((COMMITTED / "run.json").read_text(encoding="utf-8"))
    recipe = load_recipe(find_recipe("mide22-classification"))
    planned = plan(recipe, described["digests"], described["seeds"])
    there = {path.stem for path in (COMMITTED / "cells").iterdir()}
    found = there & {f"{cell.stage}-{cell.key}" for cell in planned}
    assert found == there and len(found) >= 160


def test_what_only_scoring_reads_is_no_input_of_training(recipe_file):
    """The files of the model utility, and a quantizer's calibration, change scores and nothing before them."""
    digests = {"forget01_perturbed.json": "a", "retain_perturbed.json": "b", "model": "m"}
    options = {"real_authors_perturbed.json": "c", "world_facts_perturbed.json": "d"}
    quantizers = ["none", "bnb-nf4", "gptq:ct-int4-sym@64"]
    settings = recipe_file.content["settings"] | {"utility": 4}

    def keys(digests, **changes):
        recipe = load_recipe(recipe_file(quantizers=quantizers, **{"calibration": {"texts": 8}} | changes))
        return {(cell.stage, *cell.where.values()): cell.key for cell in plan(recipe, digests, [0])}

    def changed(before, after):
        assert before.keys() == after.keys()
        return Counter(
            place[0] if place[0] != "score" else place[-1] for place in before if before[place] != after[place]
        )

    plain, with_utility = keys(digests), keys(digests | options, settings=settings)
    checkpoints = 5
    assert changed(plain, with_utility) == dict.fromkeys(quantizers, checkpoints)
    assert changed(with_utility, keys(digests | options | {"real_authors_perturbed.json": "e"}, settings=settings)) == (
        dict.fromkeys(quantizers, checkpoints)
    )
    assert changed(plain, keys(digests, calibration={"texts": 9})) == {"gptq:ct-int4-sym@64": checkpoints}


def test_a_calibrated_quantizer_is_given_texts_of_nothing_that_is_forgotten_or_reported(small, monkeypatch):
    write, out = small
    given, deploy = [], quantizers.deploy

    def spy(checkpoint, quantizer, *, auto, calibration=None):
        given.append((quantizer, calibration))
        return deploy(checkpoint, quantizer if calibration is None else "rtn:ct-int4-sym@64", auto=auto)

    monkeypatch.setattr(quantizers, "deploy", spy)
    names = ["none", "gptq:ct-int4-sym@64", "rtn:bnb-fp4"]
    recipe = load_recipe(write(quantizers=names, calibration={"texts": 5}, regimes=["16bit"], methods={"GA": {}}))
    run(recipe, out, say=lambda line: None)
    assert {name for name, texts in given if texts is None} == {"rtn:bnb-fp4"}  # of "none" the scores are there
    texts = [texts for _, texts in given if texts is not None]
    assert len(texts) == 2 and texts[0] == texts[1] and len(set(texts[0])) == 5
    rows = json.loads((write.data / "retain_perturbed.json").read_text())
    every = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    # retain_scored 4 of 8 takes 0, 2, 4 and 6; of these 2 and 6 are the report half.
    assert set(texts[0]) <= set(every[i] for i in (0, 1, 3, 4, 5, 7))
    cell = next(row["cell"] for row in results(out)["rows"] if row["quantizer"].startswith("gptq"))
    assert json.loads((out / "cells" / f"score-{cell}.json").read_text())["outputs"]["calibration_texts"] == 5


def test_articles_that_are_trained_on_are_what_calibrates(tmp_path):
    texts = [f"article {number}" for number in range(6)]
    (tmp_path / "retain.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    task = MuseNewsKnowMem(MuseNewsKnowMem.Settings(retain_texts="retain.jsonl"), tmp_path, None)
    assert task.calibration_texts(3) == texts[::2] and task.calibration_texts(9) == texts


def test_a_part_of_the_forget_set_is_taken_evenly(recipe_file, tiny_checkpoint):
    task = Tofu(Tofu.Settings(forget=2, retain=4, max_length=32), recipe_file.data, str(tiny_checkpoint))
    task.prepare(task.load_tokenizer(tiny_checkpoint))
    questions = [row["question"] for row in json.loads((recipe_file.data / "forget01_perturbed.json").read_text())]
    assert [example.prompt for example in task.forget] == [f"Question: {questions[i]}\nAnswer:" for i in (0, 2)]
    assert (len(task.forget_rows), len(task.retain_rows), len(task.learn_rows)) == (2, 4, 6)


def broken_deploy(checkpoint, quantizer, deploy=quantizers.deploy, **options):
    if quantizer == "rtn:bnb-nf4":
        raise ValueError(f"{quantizer}: expected\n  out_features; got 3")
    return deploy(checkpoint, quantizer, **options)


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(small, monkeypatch, capsys):
    write, whole = small
    out, path = whole.parent / "failing", str(write(audit=["bnb-nf4"]))
    monkeypatch.setattr(quantizers, "deploy", broken_deploy)
    assert main(["run", path, "--out", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    # 2 starts and 3 unlearned checkpoints could not be deployed; their other scores, and the audits, are there.
    assert lines[-1] == f"14 of 19 cells done, 5 failed; results: {out}/RESULTS.json"
    assert lines[-2] == "5 cells failed; the next run tries them again"
    assert sum(line.endswith("failed: rtn:bnb-nf4: expected out_features; got 3") for line in lines) == 5
    found = results(out)
    assert found["cells"] == {"planned": 19, "done": 14, "failed": 5} and len(found["audits"]) == 3
    assert found["failed"][0] == {
        **{"stage": "score", "seed": 0, "regime": "16bit", "quantizer": "rtn:bnb-nf4"},
        "reason": "rtn:bnb-nf4: expected out_features; got 3",
    }
    kept, before = {path.name for path in (out / "checkpoints").iterdir()}, made(out)
    assert kept >= {path.stem.partition("-")[2] for path in (out / "cells").glob("unlearn-*")}
    # Mended, only these are made, from the checkpoints that were kept for them.
    monkeypatch.undo()
    assert main(["run", path, "--out", str(out)]) == 0
    after = made(out)
    assert {name: after[name] for name in before} == before
    assert Counter(name.partition("-")[0] for name in after.keys() - before.keys()) == {"score": 5}
    assert results(out)["failed"] == [] and results(out)["cells"] == {"planned": 19, "done": 19, "failed": 0}
    assert not list((out / "failed").iterdir())


def test_what_starts_from_a_failed_cell_is_not_tried(small, monkeypatch):
    write, whole = small
    out, recipe, said = whole.parent / "failing", load_recipe(write()), []
    unlearn = training.unlearn

    def failing(model, tokenizer, task, method, *rest):
        if method.name == "NPO":
            raise ValueError("model: expected a finite loss; got nan")
        return unlearn(model, tokenizer, task, method, *rest)

    monkeypatch.setattr(training, "unlearn", failing)
    outcome = run(recipe, out, say=said.append)
    assert outcome == runner.Outcome(13, 16, False, failed=1, not_tried=2)
    assert said[-1] == "1 cells failed, 2 that start from them not tried; the next run tries them again"
    (failure,) = results(out)["failed"]
    assert failure == {
        **{"stage": "unlearn", "seed": 0, "regime": "16bit", "method": "NPO"},
        "reason": "model: expected a finite loss; got nan",
    }
    assert read_run(out).failed[0].cell == "unlearn seed 0 16bit NPO"
    # What fails again is tried again, and what goes well by then is no longer listed.
    assert run(recipe, out, say=said.append) == outcome
    monkeypatch.undo()
    assert run(recipe, out, say=said.append) == runner.Outcome(16, 16, False)
    assert without_times(out) == without_times(whole)


def test_a_checkpoint_that_cannot_be_made_again_fails_what_needs_it(small, monkeypatch):
    write, out = small

    def failing(*args):
        raise ValueError("peft: expected it installed; got none")

    monkeypatch.setattr(training, "unlearn", failing)
    recipe = load_recipe(write(quantizers=["none", "rtn:bnb-nf4", "rtn:bnb-fp4"], regimes=["16bit"]))
    outcome = run(recipe, out, say=lambda line: None)
    assert (outcome.done, outcome.planned, outcome.failed) == (11, 13, 2)
    (reason, _) = (failure["reason"] for failure in results(out)["failed"])
    assert reason == "unlearn seed 0 16bit GA+GDR (again, for its checkpoint): peft: expected it installed; got none"
    assert len(results(out)["rows"]) == 14  # those of the checkpoint that was dropped stay


def test_other_errors_end_a_run(small, monkeypatch):
    """Only what is said as bad input is a cell's own failure; a fault of the program is not hidden."""
    write, whole = small

    def failing(*args, **options):
        raise RuntimeError("a fault")

    monkeypatch.setattr(quantizers, "deploy", failing)
    with pytest.raises(RuntimeError, match="a fault"):
        run(load_recipe(write()), whole.parent / "failing", say=lambda line: None)


def test_model_utility_is_that_of_the_metric(small):
    write, out = small
    recipe = load_recipe(write(settings=write.content["settings"] | {"utility": 4}, regimes=["16bit"]))
    before = made(out)
    run(recipe, out, only="GA*", say=lambda line: None)
    assert Counter(name.partition("-")[0] for name in made(out).keys() - before.keys()) == {"score": 4}
    rows = [row for row in results(out)["rows"] if row["half"] == "report" and row["method"] in (None, "GA+GDR")]
    assert len(rows) == 4
    for row in rows:
        sets, means = row["examples"], []
        for name in ("retain", "real_authors", "world_facts"):
            assert {len(values) for values in sets[name].values()} == {2}
            probability = (
                [math.exp(-nll) for nll in sets[name]["nll"]] if name == "retain" else sets[name]["probability"]
            )
            truth = [max(0.0, 1 - ratio) for ratio in sets[name]["truth_ratio"]]
            means += [sum(values) / 2 for values in (probability, sets[name]["rouge_l"], truth)]
        expected = 0.0 if min(means) == 0 else len(means) / sum(1 / mean for mean in means)
        assert row["metrics"]["model"]["utility"] == pytest.approx(expected, rel=2e-3)


def test_a_new_quantizer_brings_back_the_checkpoints_that_were_dropped(small):
    write, out = small
    before, said = made(out), []
    recipe = load_recipe(write(quantizers=["none", "rtn:bnb-nf4", "rtn:bnb-fp4"], regimes=["16bit"]))
    old = {(row["cell"], row["half"]): row["metrics"] for row in results(out)["rows"]}
    run(recipe, out, say=said.append)
    new = Counter(name.partition("-")[0] for name in made(out).keys() - before.keys())
    assert new == {"score": 3}
    assert sum("again, for its checkpoint" in line for line in said) == 2
    found = {(row["cell"], row["half"]): row["metrics"] for row in results(out)["rows"]}
    kept = found.keys() & old.keys()
    assert len(kept) == 12 and len(found) == 18
    assert {place: found[place] for place in kept} == {place: old[place] for place in kept}


def test_more_seeds_are_added_to_those_that_are_there(small):
    write, out = small
    run(load_recipe(write()), out, seeds=[1], only="NPO", say=lambda line: None)
    rows = results(out)["rows"]
    assert Counter(row["seed"] for row in rows) == {0: 20, 1: 8}
    run(load_recipe(write()), out, say=lambda line: None)
    assert results(out)["rows"] == rows


def test_a_pattern_that_fits_nothing_is_bad_input(small, capsys):
    write, out = small
    assert main(["run", str(write()), "--out", str(out), "--only", "DPO*"]) == 2
    assert capsys.readouterr().err.startswith("quail: only: expected a pattern of methods or REGIME/METHOD; got 'DPO*'")


def test_missing_data_and_models_are_one_line(recipe_file, capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["run", str(recipe_file(data="nowhere")), "--out", str(out)]) == 2
    (recipe_file.data / "retain_perturbed.json").unlink()
    assert main(["run", str(recipe_file()), "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and not out.exists()
    assert lines[1] == f"quail: data: expected the file retain_perturbed.json in {recipe_file.data}; got none"


def test_a_budget_ends_a_run_before_a_cell_that_would_outlast_it(small):
    write, out = small
    for path in (out / "cells").glob("unlearn-*"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"seconds": 7200}))
    methods = write.content["methods"] | {"late": {"learning_rate": 3e-3}}
    recipe, said = load_recipe(write(methods=methods)), []
    before = made(out)
    outcome = run(recipe, out, budget_minutes=60, say=said.append)
    assert outcome.out_of_time and (outcome.done, outcome.planned) == (16, 22)
    assert made(out) == before
    assert said[-1].startswith("Out of time before 'unlearn seed 0 16bit late'")
    outcome = run(recipe, out, budget_minutes=121, say=said.append)
    assert not outcome.out_of_time and outcome.done == 22


def test_an_interrupted_run_goes_on_to_the_same_results(small):
    """Interrupted as Ctrl-C does, after every third cell."""
    write, whole = small
    out, recipe, runs = whole.parent / "pieces", load_recipe(write()), 0
    while True:
        lines = []

        def say(line, lines=lines):
            lines.append(line)
            if len(lines) == 4:
                raise KeyboardInterrupt

        runs += 1
        try:
            run(recipe, out, say=say)
            break
        except KeyboardInterrupt:
            continue
    assert runs > 4
    assert without_times(out) == without_times(whole)


def test_a_killed_run_goes_on_to_the_same_results(small):
    """Killed inside a cell, and left with a checkpoint whose figures were never written."""
    write, whole = small
    path, out = write(), whole.parent / "killed"
    command = [sys.executable, "-m", "quail", "run", str(path), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (out / "scratch").exists() and process.poll() is None:  # there while a cell unlearns
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert list((out / "cells").glob("score-*")) and not list((out / "cells").glob("unlearn-*"))
    key = next((whole / "cells").glob("unlearn-*")).stem.partition("-")[2]
    (out / "checkpoints" / key).mkdir()
    (out / "checkpoints" / key / "model.safetensors").write_text("half of one")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert without_times(out) == without_times(whole)
    assert not list(out.rglob("*.partial")) and not (out / "scratch").exists()


def test_two_processes_do_not_share_a_run(small, capsys):
    write, out = small
    store = cells.Store(out).open()
    try:
        assert main(["run", str(write()), "--out", str(out)]) == 2
        assert f"held by process {os.getpid()}" in capsys.readouterr().err
    finally:
        store.close()


def test_an_audit_stands_beside_the_rows(small):
    write, out = small
    run(
        load_recipe(write(audit=["bnb-nf4"], regimes=["grid:bnb-nf4"], methods={"GA+GDR": {}})),
        out,
        say=lambda line: None,
    )
    (audit,) = results(out)["audits"]
    assert (audit["regime"], audit["method"], audit["seed"]) == ("grid:bnb-nf4", "GA+GDR", 0)
    figures = audit["formats"]["bnb-nf4"]
    assert figures["shipped_in"] == "this recipe" and 0 < figures["code_overlap"] <= 1
    assert len(figures["layers"]) == 2


def test_a_target_that_knows_is_not_taught(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(learn=None, regimes=["16bit"], methods={"GA": {"retain_loss": "none"}}))
    out = tmp_path / "run"
    run(recipe, out, say=lambda line: None)
    assert Counter(name.partition("-")[0] for name in made(out)) == {"start": 1, "unlearn": 1, "score": 4}


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_rank": 2},
        {"fake_quant": "bnb-nf4"},
        {"fake_quant": "mixed"},
        {"forget_loss": "idk"},
        {"forget_loss": "dpo"},
        {"forget_loss": "rmu", "retain_loss": "embed_diff"},
        {"gamma": 1.0, "margin_mode": "calibrated", "hinge_space": "log_probs", "hinge_norm": "label"},
        {"saliency": "neuron"},
        {"floor_format": "bnb-nf4"},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_every_kind_of_method_runs(small, fields):
    write, out = small
    recipe = load_recipe(write(methods={"it": fields | {"max_steps": 2}}, regimes=["16bit"], quantizers=["none"]))
    run(recipe, out, say=lambda line: None)
    rows = [row for row in results(out)["rows"] if row["method"] == "it"]
    start = [row for row in results(out)["rows"] if row["method"] is None]
    assert len(rows) == 2
    assert rows[1]["metrics"]["forget"]["nll"] != start[1]["metrics"]["forget"]["nll"]


TWEETS = ["{} is a b c", "d {} e f", "g h {} i", "{} j k", "l m {}", "{} {} n o"]


@pytest.fixture
def tiny_encoder(tmp_path, tiny_checkpoint):
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=1,
    )
    folder = tmp_path / "encoder"
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    return folder


def test_a_classifier_goes_through_all_stages(recipe_file, tiny_encoder, tmp_path):
    lines = ["topic\tevent_id\tlabel\ttweet_id\ttext"]
    for event, word in (("EN01", "x"), ("EN02", "y"), ("EN03", "z")):
        for label in ("False", "True"):
            for number, text in enumerate(TWEETS):
                lines.append(f"T\t{event}\t{label}\t{number}\t{text.format(word, word)} {number}")
    (recipe_file.data / "mide22_en_misinfo_tweets.tsv").write_text("\n".join(lines), encoding="utf-8")
    path = recipe_file(
        task="mide22-classification",
        model=str(tiny_encoder),
        settings={"events": ["EN01", "EN02", "EN03"], "forget_event": "EN02", "tweets": 8, "max_length": 16},
        learn={"learning_rate": 3e-3, "epochs": 20, "batch_size": 8},
        stop={"metric": "accuracy", "at": 0.4},
        quantizers=["none", "rtn:bnb-nf4", "bnb-nf4"],
        methods={"GA+GDR": {"max_steps": 40, "learning_rate": 3e-4}},
    )
    out = tmp_path / "run"
    run(load_recipe(path), out, say=lambda line: None)
    rows = {(r["half"], r["method"], r["quantizer"]): r for r in results(out)["rows"]}
    start, after = rows["validation", None, "none"], rows["validation", "GA+GDR", "none"]
    assert start["metrics"]["forget"]["accuracy"] == start["metrics"]["retain"]["accuracy"] == 1.0
    assert start["metrics"]["retain"]["macro_f1"] == 1.0
    assert after["training"]["reached"] and after["metrics"]["forget"]["accuracy"] <= 0.4
    # 6 false tweets of EN02, 8 of each other event; the odd half of the one, the even half of the other
    assert not any("examples" in row for row in rows.values())  # they are in the cells, which quote nothing
    assert "!cells/*.json" in (out / ".gitignore").read_text().split()
    cell = json.loads((out / "cells" / f"score-{rows['report', None, 'none']['cell']}.json").read_text())
    examples = next(row["examples"] for row in cell["outputs"]["rows"] if row["half"] == "report")
    shown = read_run(out)
    assert (shown.forget_examples, shown.retain_examples) == (3, 8)
    assert start["metrics"]["forget"]["auc"] == start["metrics"]["retain"]["auc"] == 1.0
    assert len(examples["forget"]["nll"]) == 3 and len(examples["retain"]["nll"]) == 8
    assert set(examples["forget"]["label"]) == {1} and set(examples["retain"]["label"]) == {0, 2}


def test_auc_is_one_event_against_all_others_of_both_sets(monkeypatch):
    settings = Mide22Classification.Settings(("a", "b", "c"), "b", retain_scored=40)
    task = Mide22Classification(settings, None, None)
    numbers = np.random.default_rng(0)
    labels = np.array([1] * 20 + [0, 2] * 20)
    logits = numbers.normal(size=(60, 3)) + 1.5 * np.eye(3)[labels]
    task.forget_rows, task.retain_rows = list(range(20)), list(range(20, 60))
    monkeypatch.setattr(
        task, "_logits", lambda model, rows: (torch.tensor(logits[rows]).float(), torch.tensor(labels[rows]))
    )
    measured = task.measure(None)
    p = torch.tensor(logits).float().double().softmax(-1).numpy()
    expected = [roc_auc_score(labels == c, p[:, c]) for c in range(3)]
    forget, retain = (task.summarize(name, measured.examples[name])["auc"] for name in ("forget", "retain"))
    assert forget == pytest.approx(expected[1]) and retain == pytest.approx((expected[0] + expected[2]) / 2)
    assert 0.6 < forget < 0.99 and len(measured.examples["retain"]["auc"]) == 40


def test_the_command_prints_where_the_results_are(small, capsys):
    write, out = small
    assert main(["run", str(write()), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"16 of 16 cells done; results: {out}/RESULTS.json"


def test_the_quick_form_has_a_folder_of_its_own(recipe_file, monkeypatch, tmp_path):
    asked = {}

    def fake_run(recipe, out, **options):
        asked.update(out=out, quick=recipe.quick, **options)
        return runner.Outcome(1, 2, True)

    monkeypatch.setattr(runner, "run", fake_run)
    path = recipe_file(quick={"seeds": [2]})
    assert main(["run", str(path), "--quick", "--seeds", "3,4", "--budget-minutes", "1.5", "--data", "d"]) == 0
    assert asked["out"] == "runs/small-quick" and asked["quick"] is True
    assert (asked["seeds"], asked["budget_minutes"], asked["data"]) == ((3, 4), 1.5, "d")


def test_recipes_are_plain_yaml(recipe_file):
    assert yaml.safe_load(recipe_file().read_text()) == recipe_file.content
