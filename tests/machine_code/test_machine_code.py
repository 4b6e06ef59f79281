"""Every kernel's machine code keeps the rules and its budget; budgets.py says which, and how to write them anew.

By default in bf16 for sm_90, about a minute; with QUAIL_ALL_TARGETS=1 in every dtype for every target, as CI does it.
Under another triton than the one that the budgets were written with, sm_90 is compiled and held to the rules only: no
spills, wide accesses, exact arithmetic, enough resident warps. Such a triton needs no environment of its own:

    pip install --no-deps --target .venv/triton-3.6.0 triton==3.6.0
    PYTHONPATH=.venv/triton-3.6.0 python -m pytest tests/machine_code
"""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to compile")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from budgets import measure_all, new_faults, over_budget, pinned, stale  # noqa: E402
from cases import CASES  # noqa: E402
from compile_kernel import (
    TARGETS,  # noqa: E402
    _blocks_in_loops,
)

pytestmark = pytest.mark.xdist_group("machine_code")  # which compiles in processes of its own

EVERYTHING = os.environ.get("QUAIL_ALL_TARGETS") == "1"
NAMES = [name for name in CASES if EVERYTHING or "bf16" in name.split()]
MEASURED_TARGETS = tuple(TARGETS) if EVERYTHING and pinned() else ("sm_90",)


@pytest.fixture(scope="module")
def measured(request):
    wanted = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    return measure_all([name for name in NAMES if name in wanted], MEASURED_TARGETS, count=pinned())


@pytest.mark.parametrize("name", NAMES)
def test_machine_code(name, measured):
    lines = new_faults(measured[name])
    if pinned():
        lines += over_budget(name, measured[name], MEASURED_TARGETS)
    assert not lines, "\n".join(lines)


def test_budgets_are_of_cases_that_there_are():
    assert stale() == []


def test_a_jump_back_in_the_text_is_a_loop_only_where_it_comes_round():
    body = """
  br i1 %1, label %early, label %head
early:                                            ; preds = %last, %0
  br label %end
head:                                             ; preds = %tail, %0
  br i1 %2, label %tail, label %last
tail:                                             ; preds = %head
  br i1 %3, label %head, label %last
last:                                             ; preds = %head, %tail
  br label %early
end:                                              ; preds = %early
  ret void
"""
    assert _blocks_in_loops(body) == {"head", "tail"}
