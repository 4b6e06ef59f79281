"""``pytest bench/``: the cases of bench/cases at small sizes, under pytest-benchmark; ``python -m bench.gpu`` has the
sizes of real models and the machine's own roof.

An answer is checked before it is timed. On a machine with a CUDA device the kernels run, synchronised; elsewhere the
PyTorch path of the CPU does.
"""

import pytest
import torch

from .case import Absent
from .cases import all_cases
from .measure import Meter

CASES = all_cases(size=0)


@pytest.fixture(scope="module")
def meter():
    return Meter(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        pytest.param(case, peer, id=f"{case.name}-{peer}", marks=pytest.mark.benchmark(group=case.name))
        for case in CASES
        for peer in case.peers
    ],
)
def test_op(benchmark, meter, case, peer):
    try:
        inputs = case.inputs(meter.device)
        call = case.peers[peer](inputs, meter.compile_backend)
    except Absent as absent:
        pytest.skip(str(absent))
    check = case.check(inputs, case.expected(inputs), call(), peer)
    assert check.passed, f"largest error {check.max_error}, {check.differ_per_million} of a million differ"

    def synchronised():
        call()
        meter.synchronize()

    benchmark.extra_info |= {"device": str(meter.device), "useful_bytes": case.useful_bytes}
    benchmark.pedantic(synchronised, rounds=20, warmup_rounds=3)
    torch.compiler.reset()
