"""The same cases under pytest-benchmark, each phase-by-phase sum as one number: `pytest benchmarks/ --benchmark-only`.

Its rounds are not interleaved, so on a shared machine compare with care; run.py is what docs/performance.md quotes.
"""

from functools import lru_cache

import pytest
from case import Case, Data
from cases import BY_NAME, CASES
from run import check
from timing import run_once


@lru_cache(maxsize=1)  # the inputs of one case at a time
def _data(name: str) -> Data:
    return BY_NAME[name].data()


@pytest.mark.parametrize(
    ("case", "competitor"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in case.competitors],
)
def test_micro(benchmark, case: Case, competitor: str):
    try:
        function = case.competitors[competitor]()
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    data = _data(case.name)
    work = data.work(function)
    benchmark.group = f"{case.name}: {case.shape}"
    errors, wrong = check(case, data, {competitor: work})
    if wrong:
        pytest.skip(wrong[competitor])
    benchmark.extra_info |= {"op": case.op, "error": errors[competitor]}
    benchmark.pedantic(run_once, args=(work,), rounds=7, warmup_rounds=1)
