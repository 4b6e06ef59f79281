"""The kernels under Triton's interpreter, in a process of their own: it is chosen when a kernel is defined.

TRITON_INTERPRET=1 pytest tests/interpreter
"""

import os
import warnings

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreter needs TRITON_INTERPRET=1 in the environment of pytest")

import interpreter_repair

interpreter_repair.install()


@pytest.fixture(autouse=True)
def quiet_numpy():
    """Lanes that a mask switches off compute all the same, and may divide by zero; a GPU would not warn."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
