"""The numbers of a report against ones that were worked out by hand, and what becomes of cells that are not there."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from quail.metrics.intervals import recovery
from quail.reporting import markdown, page, read_run
from quail.reporting.figures import CAME_BACK, KEPT, NOT_JUDGED, NOT_REACHED, RETAIN_FELL, Failure, in_four_bits


def of(run, name, regime=0):
    return next(method for method in run.regimes[regime].methods if method.name == name)


def test_golden_numbers(small, tmp_path):
    run = read_run(small.write(tmp_path))
    a, b = of(run, "A"), of(run, "B")
    here = a.deployments["bnb-nf4"]
    assert here.recovery.value == pytest.approx((0.45 - 0.10) / (0.80 - 0.10))
    assert here.loss_recovery.value == pytest.approx((1.5 - 2.5) / (0.5 - 2.5))
    assert (here.score.forget, here.score.retain) == (0.45, 1.0)
    assert (here.retain_loss, here.start_retain_loss) == (0.0, 0.0)
    assert here.recovery.low < 0.5 < here.recovery.high and here.recovery.seeds == 1
    assert a.deployments["none"].recovery is None and a.deployments["none"].reason is None
    assert run.regimes[0].start["bnb-nf4"].forget == 0.8
    assert (a.verdict, b.verdict) == (CAME_BACK, KEPT)
    assert b.deployments["bnb-nf4"].recovery.value == 0.0
    assert run.everywhere == ["B"] and run.headline.endswith(": B.")
    assert run.headline.startswith("Of 2 methods run in the one regime (seed 0), 1 met the bar (recovery under 5 %")
    assert run.not_run is None and run.failed == ()
    assert (a.steps, a.seconds, a.number, b.number) == ({0: 7}, 30.0, 1, 2)
    assert (run.forget_examples, run.retain_examples, run.metric) == (20, 10, "exact")


def test_the_validation_half_decides_nothing_of_a_verdict(small, tmp_path):
    before = read_run(small.write(tmp_path))
    for row in list(small.results["rows"]):
        small.row(row["method"], row["quantizer"], 13, 1, half="validation", training={"steps": 99, "reached": False})
    after = read_run(small.write(tmp_path))
    assert before.selection == [] and after.selection != []
    # But for the choice, which is told apart, nothing is another.
    for regime in after.regimes:
        for method in regime.methods:
            for name, each in method.deployments.items():
                method.deployments[name] = replace(each, validated=None)
    assert after == before
    small.results["rows"] = [row for row in small.results["rows"] if row["half"] == "validation"]
    with pytest.raises(ValueError, match="expected rows of the report half; got none"):
        read_run(small.write(tmp_path))


def test_seeds_are_paired_whatever_the_order_of_rows(make_results, tmp_path):
    made = make_results(methods=("A",), seeds=(0, 1, 2))
    remembered = {"start": (16, 18, 20), "none": (1, 2, 3), "bnb-nf4": (5, 2, 9)}
    for seed in range(3):
        made.row(None, "none", 20, seed=seed)
        made.row(None, "bnb-nf4", remembered["start"][seed], seed=seed)
        made.row("A", "none", remembered["none"][seed], 10, seed=seed)
        made.row("A", "bnb-nf4", remembered["bnb-nf4"][seed], 10 - seed, seed=seed)
    random.Random(1).shuffle(made.results["rows"])
    run = read_run(made.write(tmp_path))
    here = of(run, "A").deployments["bnb-nf4"]
    arms = [np.arange(20) < np.array(remembered[arm])[:, None] for arm in ("bnb-nf4", "none", "start")]
    assert here.recovery == recovery(*arms)
    assert here.retain_loss == pytest.approx((0.0 + 0.1 + 0.2) / 3)
    assert run.seeds == (0, 1, 2) and run.planned_seeds == ()


def test_a_seed_that_lacks_an_arm_is_left_out_of_the_pairs(make_results, tmp_path):
    made = make_results(methods=("A",), seeds=(0, 1, 5))
    for seed in (0, 1):
        made.row(None, "none", 20, seed=seed)
        made.row("A", "none", 2, seed=seed)
        made.row("A", "bnb-nf4", 9 if seed == 0 else 20, seed=seed)
    made.row(None, "bnb-nf4", 16, seed=0)
    run = read_run(made.write(tmp_path))
    here = of(run, "A").deployments["bnb-nf4"]
    assert here.recovery.seeds == 1 and here.recovery.value == pytest.approx(0.5)
    assert run.regimes[0].start["bnb-nf4"].seeds == (0,) and here.score.seeds == (0, 1)
    assert run.planned_seeds == (5,)


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        (("A", "bnb-nf4"), "missing"),
        (("A", "none"), "the method in full precision is missing"),
        ((None, "bnb-nf4"), "the start at bnb-nf4 is missing"),
    ],
)
def test_what_is_missing_has_no_number(small, tmp_path, lacking, reason):
    rows = small.results["rows"]
    small.results["rows"] = [row for row in rows if (row["method"], row["quantizer"]) != lacking]
    method = of(read_run(small.write(tmp_path)), "A")
    here = method.deployments["bnb-nf4"]
    assert (here.recovery, here.reason) == (None, reason)
    assert (here.score is None) == (lacking == ("A", "bnb-nf4"))
    assert method.verdict == NOT_JUDGED and reason in method.why


def test_no_estimate_says_why(small, tmp_path):
    for row in small.results["rows"]:
        if (row["method"], row["quantizer"]) == ("A", "none"):
            row["examples"]["forget"]["exact"] = [1] * 16 + [0] * 4  # as much as the quantized original knows
            row["examples"]["forget"]["nll"][0] = None
    method = of(read_run(small.write(tmp_path)), "A")
    here = method.deployments["bnb-nf4"]
    assert here.recovery.value is None and "less than 0.01 was forgotten" in here.reason
    assert here.loss_recovery.value is None and "1 of 20 values are not finite" in here.loss_reason
    assert method.verdict == NOT_JUDGED and here.reason in method.why


def judged(make_results, tmp_path, *, full, quantized, more=None, reached=True, quantizer="bnb-nf4"):
    """The verdict on a method with these (remembered, retained) counts; all is remembered by the start."""
    made = make_results(methods=("A",), quantizers=("none", quantizer, *(("bnb-fp4",) if more else ())))
    trained = {"steps": 5, "reached": reached}
    for name in made.content["quantizers"]:
        made.row(None, name, 20)
    made.row("A", "none", *full, training=trained)
    made.row("A", quantizer, *quantized, training=trained)
    if more:
        made.row("A", "bnb-fp4", *more, training=trained)
    return of(read_run(made.write(tmp_path)), "A")


def test_five_percent_came_back_and_less_did_not(make_results, tmp_path):
    assert judged(make_results, tmp_path, full=(0, 10), quantized=(1, 10)).verdict == CAME_BACK
    assert judged(make_results, tmp_path, full=(1, 10), quantized=(1, 10)).verdict == KEPT
    # The worse of two counts.
    assert judged(make_results, tmp_path, full=(0, 10), quantized=(0, 10), more=(3, 10)).verdict == CAME_BACK


def test_two_points_of_retain_loss_are_allowed_and_more_are_not(make_results, tmp_path):
    fell = judged(make_results, tmp_path, full=(0, 10), quantized=(0, 9))
    assert fell.verdict == RETAIN_FELL and "10.0 points at bnb-nf4" in fell.why
    assert judged(make_results, tmp_path, full=(0, 9), quantized=(0, 10)).verdict == KEPT
    made = make_results(methods=("A",))
    for method, remembered in ((None, 20), ("A", 0)):
        for quantizer in ("none", "bnb-nf4"):
            row = made.row(method, quantizer, remembered)
            # 50 examples, one of which is lost: 0.98 - 0.96 is more than 0.02 in binary.
            kept = 48 if (method, quantizer) == ("A", "bnb-nf4") else 49
            row["examples"]["retain"]["exact"] = [1] * kept + [0] * (50 - kept)
    found = of(read_run(made.write(tmp_path)), "A")
    assert found.deployments["bnb-nf4"].retain_loss == pytest.approx(0.02) and found.verdict == KEPT


def test_a_method_that_did_not_reach_the_stop_rule_is_apart(make_results, tmp_path):
    found = judged(make_results, tmp_path, full=(4, 10), quantized=(4, 10), reached=False)
    assert (found.verdict, found.not_reached) == (NOT_REACHED, (0,)) and "in seed 0" in found.why
    found = judged(make_results, tmp_path, full=(4, 10), quantized=(20, 10), reached=False)
    assert (found.verdict, found.not_reached) == (CAME_BACK, (0,))


def test_eight_bits_are_shown_but_not_judged(make_results, tmp_path):
    found = judged(make_results, tmp_path, full=(0, 10), quantized=(20, 10), quantizer="bnb-int8", more=(0, 10))
    assert found.verdict == KEPT and found.deployments["bnb-int8"].recovery.value == 1.0
    assert [in_four_bits(name) for name in ("none", "torchao-int8", "rtn:ct-int4-sym@64")] == [False, False, True]


def test_a_headline_needs_every_regime(make_results, tmp_path):
    made = make_results(methods=("A", "B"), regimes=("16bit", "grid:bnb-nf4"))
    for regime in made.content["regimes"]:
        for quantizer in ("none", "bnb-nf4"):
            made.row(None, quantizer, 20, regime=regime)
            made.row("A", quantizer, 0, regime=regime)
            made.row("B", quantizer, 20 if (regime, quantizer) == ("grid:bnb-nf4", "bnb-nf4") else 0, regime=regime)
    run = read_run(made.write(tmp_path))
    assert run.everywhere == ["A"] and run.regimes[0].of(KEPT) == [of(run, "A"), of(run, "B")]
    assert run.headline.startswith("Of 2 methods run in both regimes (seed 0), 1 met the bar")
    assert [regime.title for regime in run.regimes] == ["Shipped in 16 bits", "Shipped in bnb-nf4"]


def test_the_headline_speaks_of_what_ran(make_results, tmp_path):
    """A and B ran in two of three regimes, B with one seed of two in the second; C only in the first; D nowhere."""
    regimes = ("16bit", "grid:bnb-nf4", "grid:bnb-fp4")
    made = make_results(methods=("A", "B", "C", "D"), regimes=regimes, seeds=(0, 1, 2))
    for regime in regimes[:2]:
        for seed in (0, 1):
            for quantizer in ("none", "bnb-nf4"):
                made.row(None, quantizer, 20, regime=regime, seed=seed)
                made.row("A", quantizer, 0, regime=regime, seed=seed)
                if regime == "16bit":
                    made.row("C", quantizer, 0, regime=regime, seed=seed)
                if regime == "16bit" or seed == 0:
                    made.row("B", quantizer, 20 if quantizer == "bnb-nf4" else 0, regime=regime, seed=seed)
    run = read_run(made.write(tmp_path))
    assert run.methods_run == ["A", "B"] and run.everywhere == ["A"]
    assert run.headline.startswith(
        "Of 2 methods run in 2 of 3 regimes (Shipped in 16 bits, Shipped in bnb-nf4) (seeds 0, 1), 1 met the bar ("
    )
    assert run.not_run == (
        "Not run: 1 of 3 regimes (Shipped in bnb-fp4); 1 of 4 methods (D); 1 of 3 seeds (2); of the rest "
        "C in Shipped in bnb-nf4; 2 of 4 scores of B in Shipped in bnb-nf4."
    )
    for row in made.results["rows"]:
        if row["method"] == "A" and row["quantizer"] == "bnb-nf4":
            row["examples"]["forget"]["exact"] = [1] * 20
    assert "none met the bar: recovery under 5 %" in read_run(made.write(tmp_path)).headline


def test_what_has_no_score_in_a_regime_is_named_however_much_it_is(make_results, tmp_path):
    """Nowhere else: it has no row below. Scores that only some seeds or quantizers lack are counted."""
    names = [f"M{i}" for i in range(9)]
    made = make_results(methods=names, regimes=("16bit", "grid:bnb-nf4"))
    for name in names:
        made.row(name, "none", 0)
    made.row("M0", "none", 0, regime="grid:bnb-nf4")
    some = "; ".join(f"1 of 2 scores of {name} in Shipped in 16 bits" for name in names[:6])
    assert read_run(made.write(tmp_path)).not_run == (
        f"Not run: of the rest {', '.join(names[1:])} in Shipped in bnb-nf4; {some} and 4 more."
    )


def test_no_headline_without_a_method_in_4_bits(make_results, tmp_path):
    made = make_results(methods=("A", "B"), regimes=("16bit", "grid:bnb-nf4"))
    made.row(None, "none", 20)
    made.row(None, "bnb-nf4", 20)
    made.row("A", "none", 0)
    run = read_run(made.write(tmp_path))
    assert run.headline == "No method was run at a 4-bit quantizer yet, so there is no verdict."
    assert run.not_run == (
        "Not run: 1 of 2 regimes (Shipped in bnb-nf4); 1 of 2 methods (B); "
        "of the rest 1 of 2 scores of A in Shipped in 16 bits."
    )
    made.row("A", "bnb-nf4", 0)
    made.row("B", "bnb-nf4", 0, regime="grid:bnb-nf4")
    assert read_run(made.write(tmp_path)).headline == (
        "No method was run in both regimes, so there is no verdict over them."
    )


def test_failed_cells_are_listed(small, tmp_path):
    small.results["failed"] = [
        {"stage": "unlearn", "seed": 0, "regime": "16bit", "method": "C", "reason": "model: expected 1; got <2>"},
        {"stage": "learn", "seed": 1, "reason": "none"},
    ]
    run = read_run(small.write(tmp_path))
    assert run.failed == (
        Failure("unlearn seed 0 16bit C", "model: expected 1; got <2>"),
        Failure("learn seed 1", "none"),
    )
    assert "- unlearn seed 0 16bit C: model: expected 1; got <2>" in markdown(run).splitlines()
    assert "<li>unlearn seed 0 16bit C: model: expected 1; got &lt;2&gt;</li>" in page(run)
    for text in (markdown(run), page(run)):
        assert "2 cells failed when last tried" in text


def test_a_figure_that_some_seeds_lack_is_left_out(make_results, tmp_path):
    """Scores made before a figure was added do not have it; a mean over the others would be of other seeds."""
    made = make_results(methods=("A",), seeds=(0, 1))
    for seed in (0, 1):
        for quantizer in ("none", "bnb-nf4"):
            made.row(None, quantizer, 20, seed=seed)["metrics"]["forget"]["auc"] = 0.75
            row = made.row("A", quantizer, 0, seed=seed)
            if seed == 0 or quantizer == "none":
                row["metrics"]["forget"]["auc"] = 0.25
    run = read_run(made.write(tmp_path))
    scores = {name: each.score.metrics["forget"] for name, each in of(run, "A").deployments.items()}
    assert scores["none"]["auc"] == 0.25 and "auc" not in scores["bnb-nf4"]
    text = page(run)
    (table,) = (part for part in text.split("<details>") if part.startswith("<summary>auc, forget</summary>"))
    assert "<td>0.25</td><td>-</td>" in table.split("</details>")[0]


@pytest.mark.parametrize("by", ["its own", "the default"])
def test_a_method_of_one_regime_is_not_missing_in_the_other(by, make_results, tmp_path):
    made = make_results(methods=("A", "B"), regimes=("16bit", "grid:bnb-nf4"))
    if by == "its own":
        made.content["methods"]["B"] = {"regimes": ["grid:bnb-nf4"]}
    else:
        made.content["defaults"]["regimes"] = ["grid:bnb-nf4"]
        made.content["methods"]["A"] = {"regimes": ["16bit", "grid:bnb-nf4"]}
    made.row(None, "none", 20)
    run = read_run(made.write(tmp_path))
    assert [[method.name for method in regime.methods] for regime in run.regimes] == [["A"], ["A", "B"]]


def test_audits_are_means_over_seeds(make_results, tmp_path):
    made = make_results(methods=("A",), seeds=(0, 1))
    for seed, overlap in ((0, 0.99), (1, 0.97)):
        made.row(None, "none", 20, seed=seed)
        made.audit("A", seed=seed, code_overlap=overlap, delivered_cosine=0.5, outputs={"output_snr_db": 3.0 + seed})
    (audit,) = read_run(made.write(tmp_path)).regimes[0].audits
    assert audit.figures["code_overlap"] == pytest.approx(0.98) and audit.seeds == (0, 1)
    assert audit.figures["weight_snr_db"] == pytest.approx(10 * math.log10(0.25 / 0.75))
    assert audit.figures["output_snr_db"] == pytest.approx(3.5)
    assert list(audit.layers) == ["model.layers.0", "model.layers.1"]
    assert audit.layers["model.layers.1"]["changed_share"] == pytest.approx(0.01)


def with_audits(make_results, count):
    """Methods whose recovery falls as their cosine rises, and does not depend on their code overlap."""
    made = make_results(methods=[f"M{i}" for i in range(count)])
    made.row(None, "none", 20)
    made.row(None, "bnb-nf4", 20)
    for i in range(count):
        made.row(f"M{i}", "none", 0)
        made.row(f"M{i}", "bnb-nf4", 20 - 2 * i)
        made.audit(f"M{i}", delivered_cosine=0.1 + 0.1 * i)
    return made


def test_what_foretold_the_recovery(make_results, tmp_path):
    made = with_audits(make_results, 6)
    made.row("M0", "bnb-fp4", 20)  # no audit in that format: not a cell
    (found,) = read_run(made.write(tmp_path)).foretold
    assert (found.regime, found.cells, found.checkpoints, found.left_out) == ("16bit", 6, 6, 0)
    assert found.candidates["delivered_cosine"].rho == pytest.approx(1.0)
    assert found.candidates["delivered_cosine"].low > 0.9
    assert math.isnan(found.candidates["code_overlap"].rho)


def test_candidates_of_the_file_go_before_ours(make_results, tmp_path):
    made = with_audits(make_results, 6)
    for i, audit in enumerate(made.results["audits"]):
        audit["formats"]["bnb-nf4"]["predictors"] = {"output_snr": float(i)}
    (found,) = read_run(made.write(tmp_path)).foretold
    assert list(found.candidates) == ["output_snr"] and found.candidates["output_snr"].rho == pytest.approx(-1.0)


@pytest.mark.parametrize("spoil", ["few", "no audits", "no fields"])
def test_nothing_foretold_where_there_is_too_little(make_results, tmp_path, spoil):
    made = with_audits(make_results, 4 if spoil == "few" else 6)
    if spoil == "no audits":
        del made.results["audits"]
    if spoil == "no fields":
        for audit in made.results["audits"]:
            del audit["formats"]["bnb-nf4"]["delivered_share"]
    assert read_run(made.write(tmp_path)).foretold == ()


def test_examples_of_a_folder_are_what_the_cells_say(small, tmp_path):
    (tmp_path / "cells").mkdir()
    for row in small.results["rows"]:
        who = f"{row['method']} {row['quantizer']}"
        said = [f"{who} {'validation' if i % 2 == 0 else 'report'} {i // 2}" for i in range(40)]
        cell = {"outputs": {"texts": {"forget": said, "retain": said}}}
        (tmp_path / "cells" / f"score-{row['cell']}.json").write_text(json.dumps(cell))
    file = small.write(tmp_path)
    first, middle, last = read_run(tmp_path).regimes[0].examples
    assert (first.place, last.place, first.of, first.right) == (1, 20, 20, None) and 1 < middle.place < 20
    assert last.given["A"]["bnb-nf4"] == "A bnb-nf4 report 19"
    assert first.given[None]["none"] == "None none report 0"
    alone = tmp_path / "alone"
    alone.mkdir()
    assert read_run(file).regimes[0].examples == (first, middle, last)
    assert read_run(small.write(alone)).regimes[0].examples == ()


def test_what_is_left_to_the_cells_is_read_from_them(small, tmp_path):
    small.audit("A")
    together, apart = tmp_path / "together", tmp_path / "apart"
    together.mkdir()
    (apart / "cells").mkdir(parents=True)
    expected = read_run(small.write(together))
    for row in small.results["rows"]:
        halves = [{"half": "validation"}, {"half": "report", "examples": row.pop("examples")}]
        (apart / "cells" / f"score-{row['cell']}.json").write_text(json.dumps({"outputs": {"rows": halves}}))
    (audit,) = small.results["audits"]
    audit_file = apart / "cells" / "audit-a1.json"
    audit_file.write_text(json.dumps({"outputs": audit.pop("formats")}))
    audit["cell"] = "a1"
    assert read_run(small.write(apart)) == expected
    assert read_run(apart / "RESULTS.json") == expected and expected.regimes[0].audits[0].layers
    score_file = next((apart / "cells").glob("score-*.json"))
    whole = score_file.read_text()
    score_file.write_text(whole.replace("report", "repo"))
    with pytest.raises(ValueError, match="expected what quail run writes; got KeyError 'report' in .*RESULTS.json"):
        read_run(apart)
    score_file.write_text(whole)
    audit_file.unlink()
    with pytest.raises(ValueError, match="expected the cells of RESULTS.json beside it; got no cells/audit-a1.json"):
        read_run(apart)


def test_examples_of_a_classifier_are_classes(small, tmp_path):
    small.content["settings"] = {"events": ["EN33", "EN34"]}
    for row in small.results["rows"]:
        right = row["examples"]["forget"].pop("exact")
        row["examples"]["forget"] |= {"accuracy": right, "predicted": [1 - r for r in right], "label": [0] * 20}
        row["examples"]["retain"]["accuracy"] = row["examples"]["retain"].pop("exact")
        for figures in row["metrics"].values():
            figures["accuracy"] = figures.pop("exact")
    run = read_run(small.write(tmp_path))
    assert run.metric == "accuracy" and of(run, "A").deployments["bnb-nf4"].recovery.value == pytest.approx(0.5)
    first, _, last = run.regimes[0].examples
    assert first.right == "EN33"
    assert (first.given["A"]["none"], last.given["A"]["none"]) == ("EN33", "EN34")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema=99), "expected RESULTS.json with schema 2; got 99"),
        (lambda r: r.update(rows=[]), "expected rows of the report half; got none"),
        (lambda r: r.pop("content"), "expected what quail run writes; got KeyError 'content'"),
        (lambda r: r["rows"].append(r["rows"][0]), "expected one row a cell; got two of"),
        (lambda r: r["rows"][0].pop("seed"), "in every row; got none of seed"),
        (lambda r: r["rows"][0].update(metrics={"forget": {"x": 1}}), "expected accuracy or exact of the forget set"),
    ],
)
def test_other_files_are_refused_in_one_line(small, tmp_path, change, message):
    change(small.results)
    with pytest.raises(ValueError, match="^run: expected .*got ") as caught:
        read_run(small.write(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_there_or_not_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a run's folder or RESULTS.json; got .*No such file"):
        read_run(tmp_path)
    (tmp_path / "RESULTS.json").write_text("{")
    with pytest.raises(ValueError, match="which is not JSON"):
        read_run(tmp_path)
