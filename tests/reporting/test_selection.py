"""The choice on the validation half: its figures by hand, its order, who is not ranked, and what both reports say."""

import random
import re

import pytest

from quail.metrics.intervals import recovery
from quail.reporting import markdown, page, read_run
from quail.reporting.figures import Highest

NF4, GRID = "bnb-nf4", "grid:bnb-nf4"
TITLE = "Chosen on one half, reported on the other"


@pytest.fixture
def scored(make_results):
    """Makes a run: of each method its validation half, ``{quantizer: (forget, retain)}`` by regime or of the only one.

    On the report half nothing comes back and nothing is lost, unless ``reported`` has counts of 20 and 10 for a cell.
    """

    def make(methods, *, start=1.0, regimes=("16bit",), quantizers=("none", NF4), reported=None, **more):
        made = make_results(methods=methods, regimes=regimes, quantizers=quantizers, **more)
        for seed in made.content["seeds"]:
            for regime in regimes:
                for quantizer in quantizers:
                    made.row(None, quantizer, 20, seed=seed, regime=regime)
                    validate(made, None, quantizer, start, 1.0, seed=seed, regime=regime)
                    for name, figures in methods.items():
                        here = (reported or {}).get((name, regime, quantizer), (0, 10))
                        made.row(name, quantizer, *here, seed=seed, regime=regime)
                        of_regime = figures.get(regime, figures)
                        if quantizer in of_regime:
                            validate(made, name, quantizer, *of_regime[quantizer], seed=seed, regime=regime)
        return made

    return make


def validate(made, method, quantizer, forget, retain, **where):
    """A row as ``quail run`` writes it of this half: means, no examples."""
    row = made.row(method, quantizer, 0, half="validation", **where)
    del row["examples"]
    row["metrics"] = {"forget": {"exact": forget, "nll": 1.0}, "retain": {"exact": retain, "nll": 1.0}}
    return row


def drop(made, half, method, quantizer, regime="16bit"):
    place = half, method, quantizer, regime
    rows = made.results["rows"]
    made.results["rows"] = [
        row for row in rows if (row["half"], row["method"], row["quantizer"], row["regime"]) != place
    ]
    assert len(made.results["rows"]) < len(rows)


def order(run):
    return [each.name for each in run.selection]


def flat(text):
    """Without tags, line ends and repeated spaces, so that wrapped text is found."""
    return " ".join(re.sub(r"<[^>]*>", "", text).split())


def section(text):
    """The part of the choice, of the page or of the Markdown."""
    if "<html" in text:
        return text.partition(f"<h2>{TITLE}</h2>")[2].partition("<h2>")[0]
    return text.partition(f"## {TITLE}\n")[2].partition("\n## ")[0]


def table(text):
    lines = [line for line in section(text).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_validation_half_chooses_what_the_report_half_would_not(scored, tmp_path):
    made = scored(
        {
            "A": {"none": (0.1, 0.9), NF4: (0.38, 0.9)},  # (0.38 - 0.1) / (0.8 - 0.1) = 40 %
            "B": {"none": (0.1, 0.9), NF4: (0.121, 0.888)},  # 3 % and 1.2 points
        },
        start=0.8,
        reported={("B", "16bit", NF4): (10, 8)},  # 50 % and 20 points
    )
    run = read_run(made.write(tmp_path))
    b, a = run.selection
    assert run.chosen == b and (b.name, b.number, a.name, a.number) == ("B", 2, "A", 1)
    assert b.validation.recovery == Highest(0.03, NF4, "Shipped in 16 bits")
    assert b.validation.retain_loss == Highest(0.012, NF4, "Shipped in 16 bits")
    assert (b.validation.times_bar, b.validation.meets) == (0.6, True)
    assert a.validation.recovery.value == 0.4 and a.validation.retain_loss.value == 0.0
    assert (a.validation.times_bar, a.validation.meets) == (8.0, False)
    assert b.report.recovery.value == pytest.approx(0.5) and b.report.retain_loss.value == pytest.approx(0.2)
    assert (a.report.recovery.value, a.report.meets, b.report.meets) == (0.0, True, False)
    assert run.everywhere == ["A"]  # of the report half, as before
    sentence = (
        "Chosen on the validation half, as the first of 2 methods that meets the bar there: B. There its recovery is "
        "at most 3.0 % (at bnb-nf4, Shipped in 16 bits) and it loses 1.2 points of retain at most. On the report half "
        "its recovery is at most 50 % (at bnb-nf4, Shipped in 16 bits) and it loses 20.0 points of retain at most: the "
        "bar is not met there."
    )
    for text in (markdown(run), page(run)):
        assert sentence in flat(section(text))
    assert table(markdown(run)) == [
        ["method", "times the bar", "validation half", "report half"],
        ["B", "0.60, chosen", "3.0 % [1] / 1.2", "50 % [1] / 20.0"],
        ["A", "8.00", "40 % [1] / 0.0", "0.0 % [1] / 0.0"],
    ]
    assert "1. bnb-nf4, Shipped in 16 bits" in section(markdown(run)).splitlines()
    head, first, second = re.findall(r"<tr.*?</tr>", section(page(run)))
    assert 'class="chosen"' in first and "<tr>" in second
    where = "at bnb-nf4, <br>Shipped in 16 bits</td>"
    assert first.startswith(
        f'<tr class="chosen"><td>2 B</td><td class="interval">0.60, chosen</td><td class="kept">3.0 % {where}'
    )
    assert f'<td class="kept">1.2</td><td class="back">50 % {where}<td class="back">20.0</td>' in first
    assert flat(head) == (
        "methodtimes the barvalidation half: recoveryvalidation half: retain lostreport half: recoveryreport half: "
        "retain lost"
    )


def test_the_highest_is_over_4_bit_quantizers_and_regimes(scored, tmp_path):
    quantizers = ("none", NF4, "bnb-fp4", "bnb-int8")
    made = scored(
        {
            "A": {
                "16bit": {"none": (0, 0.9), NF4: (0.01, 0.9), "bnb-fp4": (0.02, 0.9), "bnb-int8": (0.9, 0.1)},
                GRID: {"none": (0, 0.9), NF4: (0.04, 0.91), "bnb-fp4": (0.03, 0.89), "bnb-int8": (0.9, 0.1)},
            }
        },
        regimes=("16bit", GRID),
        quantizers=quantizers,
        reported={("A", "16bit", "bnb-fp4"): (3, 10), ("A", GRID, NF4): (2, 9), ("A", GRID, "bnb-int8"): (20, 0)},
    )
    run = read_run(made.write(tmp_path))
    (a,) = run.selection
    assert a.validation.recovery == Highest(0.04, NF4, "Shipped in bnb-nf4")
    assert a.validation.retain_loss == Highest(0.01, "bnb-fp4", "Shipped in bnb-nf4")
    assert (a.validation.cells, a.validation.holes) == (4, ())
    assert (a.report.recovery.value, a.report.recovery.where) == (0.15, "bnb-fp4, Shipped in 16 bits")
    assert a.report.retain_loss.where == "bnb-nf4, Shipped in bnb-nf4"
    worst = max((m.worst for regime in run.regimes for m in regime.methods), key=lambda each: each.recovery.value)
    assert worst.recovery.value == a.report.recovery.value
    text = section(markdown(run))
    assert table(markdown(run))[1] == ["A", "0.80, chosen", "4.0 % [1] / 1.0", "15 % [2] / 10.0"]
    assert "1. bnb-nf4, Shipped in bnb-nf4\n2. bnb-fp4, Shipped in 16 bits" in text
    assert "as the first of one method that meets" in flat(text) and "over 4 cells a method" in flat(text)


def test_the_order_is_by_the_larger_share_of_the_bar_and_then_the_recipes(scored, tmp_path):
    made = scored(
        {
            "far": {"none": (0, 0.9), NF4: (0.3, 0.9)},
            "recovery": {"none": (0, 0.9), NF4: (0.03, 0.9)},
            "retain": {"none": (0, 0.9), NF4: (0.01, 0.888)},
            "below": {"none": (0.1, 0.9), NF4: (0.01, 0.95)},
            "nothing": {"none": (0, 0.9), NF4: (0, 0.9)},
            "near": {"none": (0, 0.9), NF4: (0, 0.8999)},
        }
    )
    random.Random(3).shuffle(made.results["rows"])
    run = read_run(made.write(tmp_path))
    # 0.03 / 0.05 is 0.012 / 0.02; what is below 0 is as good as 0, and so is a hundredth of a point.
    assert order(run) == ["below", "nothing", "near", "recovery", "retain", "far"] and run.chosen.name == "below"
    assert [each.validation.times_bar for each in run.selection] == [0.0, 0.0, 0.0, 0.6, 0.6, 6.0]
    assert run.selection[0].validation.recovery.value == pytest.approx(-0.1)
    row = table(markdown(run))[1]
    assert row == ["below", "0.00, chosen", "-10 % [1] / -5.0", "0.0 % [1] / 0.0"]


def test_the_report_half_has_no_part_in_the_order(scored, tmp_path):
    figures = {"A": {"none": (0, 0.9), NF4: (0.04, 0.9)}, "B": {"none": (0, 0.9), NF4: (0.02, 0.9)}}
    for reported in ({("A", "16bit", NF4): (20, 0)}, {("B", "16bit", NF4): (20, 0)}, {("B", "16bit", "none"): (20, 0)}):
        run = read_run(scored(figures, reported=reported).write(tmp_path))
        assert order(run) == ["B", "A"] and run.chosen.name == "B"


def test_at_the_bar(scored, tmp_path):
    """5 % of recovery is not under it, 2 points are at most 2: the first that meets it is not the first in order."""
    made = scored(
        {
            "A": {"none": (0, 0.9), NF4: (0.05, 0.9)},
            "B": {"none": (0, 0.98), NF4: (0, 0.96)},  # 0.98 - 0.96 is more than 0.02 in binary
        }
    )
    run = read_run(made.write(tmp_path))
    assert [(each.name, each.validation.times_bar) for each in run.selection] == [("A", 1.0), ("B", 1.0)]
    assert run.chosen.name == "B"
    assert [row[1] for row in table(markdown(run))[1:]] == ["1.00", "1.00, chosen"]


def test_what_four_digits_of_a_mean_hide_does_not_decide(scored, tmp_path):
    """150 retain examples, of which 1, 4 and 4 are lost: 2 points, and 0.02003 of the means in the file."""
    made = scored({"A": {"none": (0, 1.0), NF4: (0, 1.0)}}, seeds=(0, 1, 2))
    lost = iter((0.9933, 0.9733, 0.9733))
    for row in made.results["rows"]:
        if (row["half"], row["method"], row["quantizer"]) == ("validation", "A", NF4):
            row["metrics"]["retain"]["exact"] = next(lost)
    (a,) = read_run(made.write(tmp_path)).selection
    assert a.validation.retain_loss.value == 0.02 and a.validation.meets
    for row in made.results["rows"]:
        if (row["half"], row["method"], row["quantizer"], row["seed"]) == ("validation", "A", NF4, 0):
            row["metrics"]["retain"]["exact"] = 0.99  # half an example more
    (a,) = read_run(made.write(tmp_path)).selection
    assert a.validation.retain_loss.value == 0.021 and not a.validation.meets


def test_none_meets_the_bar(scored, tmp_path):
    made = scored(
        {"A": {"none": (0, 0.9), NF4: (0.2, 0.9)}, "B": {"none": (0, 0.9), NF4: (0.01, 0.87)}},
        reported={("B", "16bit", NF4): (0, 10)},
    )
    run = read_run(made.write(tmp_path))
    assert run.chosen.name == "B" and not run.chosen.validation.meets and order(run) == ["B", "A"]
    sentence = (
        "No method meets the bar on the validation half; chosen there, as the nearest of 2 methods: B. There its "
        "recovery is at most 1.0 % (at bnb-nf4, Shipped in 16 bits) and it loses 3.0 points of retain at most. On the "
        "report half its recovery is at most 0.0 % (at bnb-nf4, Shipped in 16 bits) and it loses 0.0 points of retain "
        "at most: the bar is met there."
    )
    for text in (markdown(run), page(run)):
        assert sentence in flat(section(text))
    assert table(markdown(run))[1][:2] == ["B", "1.50, chosen"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda made: drop(made, "validation", "A", "bnb-fp4"), "bnb-fp4, Shipped in 16 bits: missing"),
        (
            lambda made: drop(made, "validation", "A", "none"),
            "bnb-nf4, Shipped in 16 bits: the method in full precision is missing and 1 more",
        ),
        (
            lambda made: of_validation(made, "A", "none").update(forget={"exact": 0.995}),
            "bnb-nf4, Shipped in 16 bits: less than 0.01 was forgotten: quantized original 1, unlearned 0.995 and 1",
        ),
        (
            lambda made: of_validation(made, "A", "bnb-fp4").update(forget={"exact": None}),
            "bnb-fp4, Shipped in 16 bits: a mean is missing or not finite",
        ),
        (
            lambda made: of_validation(made, "A", "bnb-fp4").update(retain={"exact": None}),
            "bnb-fp4, Shipped in 16 bits: no retain loss",
        ),
    ],
)
def test_a_method_with_a_hole_on_the_validation_half_is_not_ranked(scored, tmp_path, spoil, reason):
    good = {"none": (0, 0.9), NF4: (0, 0.9), "bnb-fp4": (0.02, 0.89)}
    poor = {"none": (0, 0.9), NF4: (1.0, 0.9), "bnb-fp4": (1.0, 0.9)}
    made = scored({"A": good, "B": poor}, quantizers=("none", NF4, "bnb-fp4"))
    assert order(read_run(made.write(tmp_path))) == ["A", "B"]
    spoil(made)
    run = read_run(made.write(tmp_path))
    assert order(run) == ["B", "A"] and run.chosen.name == "B"
    b, a = run.selection
    assert a.validation.times_bar is None and not a.validation.meets and a.validation.cells == 2
    for text in (markdown(run), page(run)):
        assert f"A on the validation half, {reason}" in flat(section(text))
    assert table(markdown(run))[2][:2] == ["A", "not judged"]
    (note,) = (line for line in section(markdown(run)).splitlines() if ". A on the validation half" in line)
    number = f"[{note.partition('.')[0]}]"
    assert table(markdown(run))[2][2].endswith(number) and number not in table(markdown(run))[2][3]
    assert section(page(run)).count("<sup>1</sup>") == 1
    assert "chosen there, as the nearest of 2 methods: B." in flat(markdown(run))


def of_validation(made, method, quantizer):
    (row,) = (
        row
        for row in made.results["rows"]
        if (row["half"], row["method"], row["quantizer"]) == ("validation", method, quantizer)
    )
    return row["metrics"]


def test_the_smallest_forgotten_is_that_of_recovery(scored, tmp_path):
    """0.01 is enough and less is not, whatever the binary of 0.21 - 0.2 is: as of 100 examples of which one differs."""
    assert recovery([0] * 100, [0] * 100, [1] + [0] * 99).reason.startswith("the interval has no end")
    assert recovery([0] * 101, [0] * 101, [1] + [0] * 100).reason.startswith("less than 0.01 was forgotten")
    for original, estimated in ((0.21, True), (0.2098, False)):
        made = scored({"A": {"none": (0.2, 0.9), NF4: (0.2, 0.9)}}, start=original)
        (a,) = read_run(made.write(tmp_path)).selection
        assert (a.validation.recovery is not None) == estimated


def test_none_is_chosen_where_none_is_ranked(scored, tmp_path):
    made = scored({"A": {"none": (0, 0.9), NF4: (0, 0.9)}})
    drop(made, "validation", None, NF4)
    run = read_run(made.write(tmp_path))
    assert run.chosen is None and order(run) == ["A"]
    for text in (markdown(run), page(run)):
        assert "No method is chosen: on the validation half none has a recovery" in flat(section(text))
        assert "A on the validation half, bnb-nf4, Shipped in 16 bits: the start at bnb-nf4 is missing" in flat(text)
    assert table(markdown(run))[1] == ["A", "not judged", "no estimate / 0.0 [1]", "0.0 % [2] / 0.0"]
    assert 'class="chosen"' not in page(run)


def test_a_hole_on_the_report_half_is_told_and_does_not_unrank(scored, tmp_path):
    quantizers = ("none", NF4, "bnb-fp4")
    good, poor = ({"none": (0, 0.9), NF4: (at, 0.9), "bnb-fp4": (at, 0.9)} for at in (0, 0.5))
    made = scored({"A": good, "B": poor}, quantizers=quantizers, reported={("A", "16bit", NF4): (0, 9)})
    drop(made, "report", "A", "bnb-fp4")
    run = read_run(made.write(tmp_path))
    assert order(run) == ["A", "B"] and run.chosen.report.times_bar is None
    for text in (markdown(run), page(run)):
        text = flat(section(text))
        assert "and it loses 10.0 points of retain at most: the bar is not met there." in text
        assert (
            "A on the report half, bnb-fp4, Shipped in 16 bits: missing; shown is the highest of the rest of 2 cells"
        ) in text
    assert table(markdown(run))[1][2:] == ["0.0 % [1] / 0.0", "0.0 % [1] / 10.0 [2]"]
    for row in made.results["rows"]:
        if (row["half"], row["method"]) == ("report", "A"):
            row["examples"]["retain"]["exact"] = [1] * 10
    run = read_run(made.write(tmp_path))
    assert not run.chosen.report.fails and not run.chosen.report.meets
    for text in (markdown(run), page(run)):
        assert "points of retain at most: it is not judged there, without figures in 1 of 2 cells." in flat(text)


def test_means_are_over_the_seeds_that_all_arms_share(scored, tmp_path):
    """The start at bnb-nf4 lacks seed 1, so recovery is of seed 0 alone; retain loss is of both."""
    made = scored({"A": {"none": (0.2, 0.9), NF4: (0.2, 0.9)}}, seeds=(0, 1))
    made.results["rows"] = [
        row
        for row in made.results["rows"]
        if (row["half"], row["method"], row["quantizer"], row["seed"]) != ("validation", None, NF4, 1)
    ]
    for row in made.results["rows"]:
        if (row["half"], row["method"], row["quantizer"]) == ("validation", "A", NF4):
            row["metrics"] = {
                "forget": {"exact": (0.4, 1.0)[row["seed"]]},
                "retain": {"exact": (0.9, 0.8)[row["seed"]]},
            }
    (a,) = read_run(made.write(tmp_path)).selection
    assert (a.validation.recovery.value, a.validation.retain_loss.value) == (0.25, 0.05)


def test_means_of_seeds_are_divided_not_quotients_averaged(scored, tmp_path):
    made = scored({"A": {"none": (0.0, 0.9), NF4: (0.0, 0.9)}}, seeds=(0, 1))
    for row in made.results["rows"]:
        if row["half"] == "validation" and row["quantizer"] == NF4:
            by_seed = (1.0, 0.25) if row["method"] is None else (0.5, 0.0)
            row["metrics"]["forget"]["exact"] = by_seed[row["seed"]]
    (a,) = read_run(made.write(tmp_path)).selection
    assert a.validation.recovery.value == 0.4  # 0.25 / 0.625; the mean of 50 % and 0 % is 25 %


def test_a_method_that_did_not_run_everywhere_is_not_in_the_table(scored, tmp_path):
    made = scored({name: {"none": (0, 0.9), NF4: (0, 0.9)} for name in "ABC"}, regimes=("16bit", GRID))
    rows = made.results["rows"]
    made.results["rows"] = [row for row in rows if (row["method"], row["regime"]) != ("A", GRID)]
    run = read_run(made.write(tmp_path))
    assert order(run) == run.methods_run == ["B", "C"]


def test_a_stop_rule_that_was_not_met_is_marked_and_said(scored, tmp_path):
    made = scored({name: {"none": (0, 0.9), NF4: (0, 0.9)} for name in "AB"}, regimes=("16bit", GRID), seeds=(0, 1, 2))
    for row in made.results["rows"]:
        if (row["method"], row["regime"]) == ("A", GRID) and row["seed"] > 0:
            row["training"] = {"steps": 60, "reached": False}
    run = read_run(made.write(tmp_path))
    assert [each.not_reached for each in run.selection] == [(1, 2), ()]
    for text in (markdown(run), page(run)):
        text = section(text)
        assert "there: A\u2020, whose training ended before the stop rule was met in seeds 1, 2. There its" in flat(
            text
        )
        assert "\u2020 ended by steps before the stop rule was met" in flat(text)
    assert [row[0] for row in table(markdown(run))] == ["method", "A\u2020", "B"]
    assert "<td>1 A\u2020</td>" in section(page(run)) and "<td>2 B</td>" in section(page(run))


def test_without_a_validation_half_there_is_no_choice(scored, tmp_path):
    made = scored({"A": {"none": (0, 0.9), NF4: (0, 0.9)}})
    with_it = read_run(made.write(tmp_path))
    for text in (markdown(with_it), page(with_it)):
        assert TITLE in text and "nothing of it is shown" not in text and "none of its figures are here" not in text
        assert "Every figure but those that are said to be of the validation half is of the report half" in flat(text)
    assert "when training stops, and which method is chosen" in page(with_it)
    for row in [row for row in made.results["rows"] if row["half"] == "validation" and row["method"] is not None]:
        made.results["rows"].remove(row)
    run = read_run(made.write(tmp_path))  # the start's alone choose nothing
    assert run.selection == [] and run.chosen is None
    for text in (markdown(run), page(run)):
        assert TITLE not in text and "validation half decided when training stopped; nothing of it is" in flat(text)
    assert "when training stops; none of its figures are here" in page(run)
    assert "[1]" not in markdown(run)


def test_rows_of_the_validation_half_are_checked_too(scored, tmp_path):
    made = scored({"A": {"none": (0, 0.9), NF4: (0, 0.9)}})
    twice = next(row for row in made.results["rows"] if row["half"] == "validation" and row["method"] == "A")
    made.results["rows"].append(twice)
    with pytest.raises(ValueError, match="^run: expected one row a cell; got two of .*'A'"):
        read_run(made.write(tmp_path))
    made.results["rows"].pop()
    del twice["metrics"]
    with pytest.raises(ValueError, match="^run: expected .* in every row; got none of metrics"):
        read_run(made.write(tmp_path))


def test_the_choice_stands_before_the_regimes_and_fits(scored, tmp_path):
    name = "NPO+KLR hinge calibrated log_probs"
    figures = {"none": (0, 0.9), NF4: (1.0, 0.1), "rtn:gptq-int4-asym@128": (1.0, 0.9)}
    regimes = ("16bit", "grid:ct-int4-sym@64")
    made = scored({name: figures, "<b>|": figures}, regimes=regimes, quantizers=tuple(figures))
    run = read_run(made.write(tmp_path))
    lines = markdown(run).splitlines()
    assert max(map(len, lines)) <= 100
    places = [lines.index(f"## {title}") for title in (TITLE, "Shipped in 16 bits")]
    assert places[0] < places[1] and lines.index(next(x for x in lines if x.startswith("**Of 2"))) < places[0]
    text = page(run)
    assert text.index(f"<h2>{TITLE}</h2>") < text.index("<h2>Shipped in 16 bits</h2>") and "<b>|" not in text
    assert [row[0] for row in table(markdown(run))] == ["method", name, "&lt;b>/"]
