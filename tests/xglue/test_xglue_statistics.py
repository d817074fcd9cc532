"""Means, paired t tests and Holm's correction, against scipy and by hand."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from lazy import scipy_stats as stats

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.xglue.scores import statistics  # noqa: E402


@pytest.mark.parametrize("n", [2, 3, 16, 200])
def test_paired_is_scipys(n, seed):
    generator = np.random.default_rng([seed, n])
    first, second = generator.normal(0.3, 2, n).tolist(), generator.normal(0, 1, n).tolist()
    found, reference = statistics.paired(first, second, 0.9), stats.ttest_rel(first, second)
    interval = reference.confidence_interval(0.9)
    assert found.t == pytest.approx(reference.statistic, rel=1e-10) and found.n == n
    assert found.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    differences = np.subtract(first, second)
    assert (found.difference, found.sd) == pytest.approx((differences.mean(), differences.std(ddof=1)), rel=1e-10)


def test_paired_by_hand():
    found = statistics.paired([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])  # differences 2 3 1: mean 2, sd 1, t 2 sqrt(3)
    assert (found.difference, found.sd, found.t) == pytest.approx((2, 1, 2 * math.sqrt(3)))
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)  # t table: 97.5 %, 2 degrees of freedom


def test_differences_that_do_not_vary():
    assert statistics.paired([1.0, 2.0], [1.0, 2.0]).p == 1
    certain = statistics.paired([1.5, 2.5], [1.0, 2.0])
    assert (certain.t, certain.p, certain.low, certain.high) == (math.inf, 0, 0.5, 0.5)
    assert statistics.paired([2.0], [1.5]) == statistics.Paired(0.5, 1)


def test_holm():
    # Sorted .01 .02 .03 .2, times 4 3 2 1: .04 .06 .06 .2, never falling.
    assert statistics.holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1, 1] and statistics.holm([]) == []


def test_sd_and_mean():
    assert statistics.sd([1.0]) is None and statistics.sd([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="no values"):
        statistics.mean([])
    with pytest.raises(ValueError, match="3 and 2"):
        statistics.paired([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="confidence"):
        statistics.paired([1, 2], [1, 3], 1.0)
