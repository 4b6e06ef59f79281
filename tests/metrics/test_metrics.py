"""What the metrics do at their edges, and the classifier's figures against scikit-learn's."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score

from quail.metrics import memorization, muse, tofu
from quail.metrics.classification import classification
from quail.metrics.measurement import Measurement, placements


def probabilities(classes, examples=60, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), examples).round(2) + 0.01
    return p / p.sum(axis=1, keepdims=True), rng.integers(0, classes, examples)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_classifiers_figures_are_scikit_learns(classes):
    p, y = probabilities(classes)
    found = classification(p, y)
    assert found.accuracy.value == pytest.approx(accuracy_score(y, p.argmax(1)), rel=1e-12)
    assert found.macro_f1 == pytest.approx(f1_score(y, p.argmax(1), average="macro"), rel=1e-12)
    assert found.nll.value == pytest.approx(log_loss(y, p), rel=1e-12)
    reference = roc_auc_score(y, p[:, 1]) if classes == 2 else roc_auc_score(y, p, multi_class="ovr")
    assert found.auc.value == pytest.approx(reference, rel=1e-12)
    assert np.array_equal(found.predicted, p.argmax(1))
    for figure in (found.accuracy, found.auc, found.nll):
        assert figure.per_example.shape == y.shape
    assert found.accuracy.per_example.tolist() == (found.predicted == y).tolist()


def test_an_auc_needs_two_classes_and_takes_those_that_occur():
    p, y = probabilities(3)
    assert classification(p, np.zeros(60, int)).auc is None
    y = np.where(y == 2, 0, y)
    expected = np.mean([roc_auc_score(y == c, p[:, c]) for c in (0, 1)])
    assert classification(p, y).auc.value == pytest.approx(expected, rel=1e-12)


def test_a_classifier_that_broke_is_never_right():
    p, y = probabilities(2)
    p[0] = np.nan
    found = classification(p, y)
    assert found.accuracy.per_example[0] == 0 and found.predicted[0] == -1
    wrong = np.where(np.arange(60) == 0, 1 - y, p.argmax(1))  # of two classes, not right is the other
    recalls = [[np.mean(guess[y == c] == c) for c in (0, 1)] for guess in (wrong, found.predicted)]
    assert recalls[0] == recalls[1] and f1_score(y, wrong, average="macro") < found.macro_f1 < 1
    assert np.isnan(found.auc.value) and np.isnan(found.nll.value)
    assert found.nll.to_dict()["value"] is None and found.nll.to_dict()["per_example"][0] is None


def test_placements_are_the_mann_whitney_statistic_with_ties():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, 30), rng.integers(0, 6, 40)
    expected = [np.mean([(x > y) + 0.5 * (x == y) for y in b]) for x in a]
    np.testing.assert_allclose(placements(a, b), expected, rtol=1e-12)


def test_membership_auc_is_zero_where_every_forget_text_is_the_more_familiar():
    assert muse.membership_auc([0.1, 0.2], [1.0, 2.0]).value == 0
    assert muse.privleak([0.1, 0.2], [1.0, 2.0], 0.5).privleak.value == -1
    assert muse.privleak([3.0, 4.0], [1.0, 2.0], 0.5).privleak.value == 1


@pytest.mark.parametrize(
    ("hits", "strength", "memorized"),
    [
        ([1, 1, 1, 1], 1, 1),
        ([0, 1, 1, 1], 3 / 4, 3 / 4),
        ([1, 1, 0, 1], 1 / 4, 3 / 4),
        ([1, 1, 1, 0], 1 / 4, 3 / 4),
        ([0], 1, 0),
    ],
)
def test_extraction_strength_is_the_suffix_that_is_foreseen(hits, strength, memorized):
    """Open-unlearning's floor of one token over the answer's length is in the fourth and the fifth."""
    assert memorization.extraction_strength([hits]).value == strength
    assert memorization.exact_memorization([hits]).value == memorized


def test_exact_match_is_of_the_text_but_for_white_space_at_its_ends():
    found = memorization.exact_match([" A man.", "a", "b c"], ["A man. ", "A", "b  c"])
    assert found.per_example.tolist() == [1, 0, 0] and found.value == pytest.approx(1 / 3)


def test_truth_ratio_by_hand():
    """P(correct) = 1/2 and perturbed 1/4 and 1/16: means 1/8 and 5/32."""
    correct, wrong = [np.log(2)], [[np.log(4), np.log(16)]]
    np.testing.assert_allclose(tofu.truth_ratio(correct, wrong), [1 / 4], rtol=1e-12)
    np.testing.assert_allclose(tofu.truth_ratio(correct, wrong, "arithmetic"), [5 / 16], rtol=1e-12)
    assert tofu.forget_truth_ratio([0.25, 4.0, 1.0, 0.0]).per_example.tolist() == [0.25, 0.25, 1, 0]
    assert tofu.utility_truth_ratio([0.25, 4.0, 1.0]).per_example.tolist() == [0.75, 0, 0]
    assert tofu.probability_among(correct, wrong).value == pytest.approx((1 / 2) / (1 / 2 + 1 / 4 + 1 / 16))


def test_perturbed_answers_may_differ_in_number():
    found = tofu.truth_ratio([1.0, 1.0], [[2.0], [2.0, 4.0]])
    np.testing.assert_allclose(found, np.exp([-1, -2]), rtol=1e-12)


def test_a_measurement_is_plain_json():
    figure = Measurement.mean([True, False, 1.0])
    assert json.loads(json.dumps(figure.to_dict())) == {"value": pytest.approx(2 / 3), "per_example": [1, 0, 1]}


SETS = {kind: tofu.TofuScores(kind, *[Measurement.mean([0.5])] * 3, np.ones(1)) for kind in ("forget", "options")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Measurement.mean([]), "per_example: expected one number"),
        (lambda: Measurement.mean([[1.0]]), "per_example: expected one number"),
        (lambda: memorization.rouge_l(["a"], [], stem=True), "expected of 1, said of 0"),
        (lambda: memorization.rouge_l([], [], stem=True), "at least one"),
        (lambda: memorization.exact_memorization([[True], []]), "hits, example 2"),
        (lambda: muse.min_k([[-1.0], []]), "log_probs, text 2"),
        (lambda: muse.min_k([[-1.0]], 40), "share: expected a number in 0 to 1; got 40"),
        (lambda: muse.privleak([1.0], [1.0], 50), "retrained_auc"),
        (lambda: tofu.truth_ratio([1.0], [[]]), "perturbed_nll, example 1"),
        (lambda: tofu.truth_ratio([1.0], [[1.0]], "harmonic"), "mean: expected geometric or arithmetic"),
        (lambda: tofu.model_utility(SETS["forget"], SETS["options"], SETS["options"]), "got forget, options"),
        (lambda: classification(np.ones((2, 2)), [0]), "labels: expected one for each row"),
        (lambda: classification(np.ones((2, 2)), [0, 2]), "labels: expected integers in 0 to 1"),
        (lambda: classification(np.ones((2, 2)), [0.0, 1.0]), "labels: expected integers"),
    ],
)
def test_bad_input_is_said_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
