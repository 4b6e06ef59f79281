"""What the kernels' docstrings say of their instructions is what budgets.json has: about N instructions (CASE)."""

import importlib
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to compile")

BUDGETS = json.loads(Path(__file__).with_name("budgets.json").read_text())["cases"]
KERNELS = {
    "bucket_compare": ["_bucket_compare_fwd_kernel"],
    "fake_quant": ["_fake_quant_fwd_kernel", "_quantize_fwd_kernel", "_dequantize_fwd_kernel"],
    "margin_hinge": ["_margin_hinge_fwd_kernel", "_margin_hinge_bwd_kernel"],
    "linear_margin_hinge": ["_epilogue_fwd_kernel", "_epilogue_bwd_kernel"],
}


@pytest.mark.parametrize(("module", "kernel"), [(module, name) for module, names in KERNELS.items() for name in names])
def test_instructions_are_those_of_the_budget(module, kernel):
    text = " ".join(getattr(importlib.import_module(f"quail_kernels.{module}"), kernel).fn.__doc__.split())
    said = re.findall(r"about (\d+) instructions \(([^)]*)\)", text)
    assert said, f"{kernel}: expected 'about N instructions (CASE)' in its docstring"
    for number, case in said:
        assert int(number) == round(BUDGETS[case]["instructions"]), case
