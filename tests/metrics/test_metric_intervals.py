"""Intervals against known variances and coverage, and recovery where it can and cannot be estimated."""

import numpy as np
import pytest
from interval_coverage import covered

from quail.metrics.intervals import mean_interval, recovery


def arms(rng, seeds, examples, recovered=0.3, noise=0.1):
    """Unlearned, quantized unlearned and quantized original, with seeds and examples that are harder than others."""
    hard = rng.normal(0, 0.1, examples) + rng.normal(0, 0.05, (seeds, 1))
    unlearned, original = 0.2 + hard, 0.9 + hard
    quantized = unlearned + recovered * (original - unlearned)
    return [a + rng.normal(0, noise, (seeds, examples)) for a in (quantized, unlearned, original)]


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error():
    values = np.random.default_rng(0).normal(2, 3, 400)
    interval = mean_interval(values)
    assert interval.value == values.mean()
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert mean_interval(values) == interval != mean_interval(values, seed=1)
    narrower = mean_interval(values, confidence=0.5)
    assert interval.low < narrower.low < narrower.high < interval.high


def test_examples_that_are_hard_under_every_seed_are_not_averaged_away():
    rng = np.random.default_rng(1)
    by_example, by_seed = rng.normal(0, 1, 60), rng.normal(0, 0.4, (20, 1))
    interval = mean_interval(by_example + by_seed, resamples=20_000)
    error = np.sqrt(by_example.var() / 60 + by_seed.var() / 20)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_recovery_is_the_quotient_of_means_and_pairs_what_it_resamples():
    quantized, unlearned, original = arms(np.random.default_rng(2), 3, 40)
    found = recovery(quantized, unlearned, original)
    expected = (quantized.mean() - unlearned.mean()) / (original.mean() - unlearned.mean())
    assert found.value == pytest.approx(expected, rel=1e-12) and found.reason is None
    assert found.low < found.value < found.high and found.unbounded == 0
    assert (found.seeds, found.examples) == (3, 40)
    assert found.came_back.value == pytest.approx(quantized.mean() - unlearned.mean(), rel=1e-12)
    for same, value in ((unlearned, 0.0), (original, 1.0)):
        exact = recovery(same, unlearned, original)
        assert (exact.value, exact.low, exact.high) == (value, value, value)


def test_unpaired_examples_give_a_wider_interval():
    rng = np.random.default_rng(3)
    quantized, unlearned, original = arms(rng, 1, 40, noise=0.01)
    paired = recovery(quantized, unlearned, original)
    mixed = recovery(rng.permuted(quantized, axis=1), unlearned, rng.permuted(original, axis=1))
    assert mixed.value == pytest.approx(paired.value, rel=1e-9)
    assert mixed.high - mixed.low > 3 * (paired.high - paired.low)


def test_recovery_does_not_depend_on_the_unit_or_on_which_way_is_up():
    quantized, unlearned, original = arms(np.random.default_rng(4), 2, 30)
    found = recovery(quantized, unlearned, original)
    nll = recovery(5 - 3 * quantized, 5 - 3 * unlearned, 5 - 3 * original, higher_is_remembered=False)
    np.testing.assert_allclose([nll.value, nll.low, nll.high], [found.value, found.low, found.high], rtol=1e-9)


def test_one_seed_may_be_a_vector():
    quantized, unlearned, original = arms(np.random.default_rng(5), 1, 30)
    assert recovery(quantized[0], unlearned[0], original[0]) == recovery(quantized, unlearned, original)


def test_intervals_cover_what_they_should():
    """Examples and seeds differ in how much comes back; the bounds are three standard errors of 200 studies."""
    assert abs(covered("both", seeds=5, studies=200) - 0.95) <= 3 * (0.95 * 0.05 / 200) ** 0.5


def test_nothing_forgotten_is_no_recovery():
    rng = np.random.default_rng(7)
    original = rng.uniform(0, 1, (2, 20))
    found = recovery(original + 0.2, original, original)
    assert (found.value, found.low, found.high) == (None, None, None)
    assert found.reason.startswith("less than 0.01 was forgotten")
    assert found.came_back.value == pytest.approx(0.2) and found.forgotten.value == 0 and found.unbounded == 1


def test_an_original_that_quantization_broke_is_no_full_recovery():
    """-0.3 / -0.3 is 1, and nothing came back."""
    unlearned = np.random.default_rng(8).uniform(0.4, 0.6, (2, 20))
    found = recovery(unlearned - 0.3, unlearned, unlearned - 0.3)
    assert found.value is None and "less than 0.01 was forgotten" in found.reason
    assert recovery(unlearned - 0.3, unlearned, unlearned - 0.3, higher_is_remembered=False).value == 1


def test_a_denominator_that_may_be_zero_leaves_no_interval():
    rng = np.random.default_rng(9)
    unlearned = rng.uniform(0, 1, (1, 20))
    change = rng.normal(0, 0.5, (1, 20))
    original = unlearned + change - change.mean() + 0.05
    found = recovery(unlearned + 0.1, unlearned, original)
    assert (found.value, found.low, found.high) == (None, None, None)
    assert "the interval has no end: nothing was forgotten in" in found.reason and 0.1 < found.unbounded < 0.5
    assert found.forgotten.low < 0 < found.forgotten.high
    # Where the same mean is steady the quotient is there.
    assert recovery(unlearned + 0.1, unlearned, unlearned + 0.05).value == pytest.approx(2)


def test_resamples_without_forgetting_count_beyond_both_ends():
    """Rarer than an end leaves outside, they widen the interval and do not turn it round."""
    rng = np.random.default_rng(10)
    unlearned = np.zeros((1, 20))
    gone = rng.normal(0, 1, (1, 20))
    gone += 2.15 * gone.std() / np.sqrt(20) - gone.mean()
    found = recovery(np.full((1, 20), 0.1), unlearned, gone)
    assert found.reason is None and 0 < found.unbounded < 0.025
    assert 0 < found.low < found.value < found.high
    assert found.high > 3 * found.value
    mirrored = recovery(np.full((1, 20), -0.1), unlearned, gone)
    assert (mirrored.low, mirrored.value, mirrored.high) == (-found.high, -found.value, -found.low)


@pytest.mark.parametrize("arm", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_broke_has_no_recovery(arm, value):
    values = arms(np.random.default_rng(11), 2, 10)
    values[arm][1, 3] = value
    found = recovery(*values)
    assert found.value is None and found.came_back is None and "1 of 20 values are not finite" in found.reason
    assert np.isnan(mean_interval(values[arm]).low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recovery([0.1], [0.2], [0.3]), r"quantized_unlearned: expected \[seeds, examples\]"),
        (lambda: recovery([0.1, 0.2], [0.2, 0.3], [0.3, 0.4, 0.5]), "expected one shape"),
        (lambda: recovery([0, 1], [0, 1], [0, 1], smallest=0), "smallest"),
        (lambda: mean_interval([[1, 2], [1]]), "values"),
        (lambda: mean_interval([1, 2], confidence=95), "confidence"),
        (lambda: mean_interval([1, 2], resamples=1), "resamples"),
    ],
)
def test_bad_input_is_said_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
