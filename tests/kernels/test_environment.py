"""What the suite and the package take for granted about the environment."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_uninitialized_memory_is_poisoned():
    x = torch.ones(3, 4)
    for empty in (torch.empty(5), torch.empty_like(x), x.new_empty(2), torch.empty(2, dtype=torch.bfloat16)):
        assert empty.isnan().all()
    assert (torch.empty(4, dtype=torch.uint8) == 255).all()
    assert (torch.empty(4, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.parametrize("without", ["triton", "quail"])
def test_package_works_without(without):
    """The CPU path needs no Triton, and the kernels nothing of the trainer."""
    program = f"""
import sys
sys.modules[{without!r}] = None
import torch, quail_kernels as qk
w = torch.randn(4, 64)
assert qk.fake_quant(w, "bnb-nf4").shape == w.shape
assert qk.bucket_compare(w, w, "bnb-fp4").to_dict()["code_overlap"] == 1
assert qk.logit_margin_hinge(w, w, margin=1.0) == 1
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
