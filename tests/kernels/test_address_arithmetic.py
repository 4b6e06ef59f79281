"""No address of the weight kernels is reckoned in 32 bits, where a weight of more than 2^31 elements would wrap.

The kernels are compiled as their launchers call them, and every offset that is added to a pointer is traced back in
Triton's IR: what grows with the size of the weight comes from a program number or an argument, and no 32-bit
product, sum or shift of those may be on the way.
"""

import importlib
import os
import re

import pytest
import torch

from quail_kernels import get_format

triton = pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to compile")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

fake_quant = importlib.import_module("quail_kernels.fake_quant")
bucket_compare = importlib.import_module("quail_kernels.bucket_compare")

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int32: "*i32"}
WIDE = torch.zeros(64, 8192, dtype=torch.bfloat16)
VIEWS = {
    "contiguous": WIDE,
    "columns": WIDE[:, 64:4160],
    "odd rows": WIDE[:, :8190],
    "split": WIDE.view(64, 2, 4096)[:, :, 1024:3072],
    "every second": WIDE.view(-1)[::2],
}


def ttir(module, kernel_name, call):
    kernel, noted = getattr(module, kernel_name), {}

    class Note:
        def __getitem__(self, grid):
            return lambda *args, **named: noted.update(zip(kernel.arg_names, args, strict=False), **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, kernel_name, Note())
        call()
    options = {name: noted.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    signature, constants = {}, {}
    for param in kernel.params:
        value = noted[param.name]
        if isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
        elif param.is_constexpr or value is None or value == 1:
            signature[param.name], constants[param.name] = "constexpr", value
        else:
            signature[param.name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttir"]


def narrow_addresses(ir):
    """The 32-bit operations that what grows with the weight goes through before it is added to a pointer."""
    made_by = {}
    for line in ir.splitlines():
        match = re.match(r"\s*(%[\w:]+) = (.*)", line)
        if match:
            made_by[match.group(1).split(":")[0]] = match.group(2)

    def origins(value, seen):
        if value not in seen:
            seen.add(value)
            for operand in re.findall(r"%\w+", made_by.get(value, "")):
                origins(operand, seen)
        return seen

    def grows(value):
        return any(
            name not in made_by or "tt.get_program_id" in made_by[name] or "tt.load" in made_by[name]
            for name in origins(value, set())
        )

    narrow, found = [], 0
    for text in list(made_by.values()):
        if text.startswith("tt.addptr"):
            base, offset = re.findall(r"%\w+", text)[:2]
            if "%table_ptr" in origins(base, set()):
                continue  # a few words that stay where they are, however large the weight
            found += 1
            for name in origins(offset, set()):
                made = made_by.get(name, "")
                if re.match(r"arith\.(muli|addi|shli)\b.*[x ]i32>?\b", made.split(" loc(")[0]) and grows(name):
                    narrow.append(made)
    assert found, "addresses are reckoned"
    return narrow


def launches():
    for format in ("bnb-nf4", "minmax-int4"):
        recipe = get_format(format)
        for name, w in VIEWS.items():
            yield f"fake_quant-{format}-{name}", fake_quant, "_fake_quant_fwd_kernel", "_fake_quant_triton", (w, recipe)
        w = VIEWS["columns"]
        yield f"quantize-{format}", fake_quant, "_quantize_fwd_kernel", "_quantize_triton", (w, recipe)
        codes, scales = fake_quant._quantize_torch(w, recipe)
        arguments = (codes, scales, recipe, w.shape, w.dtype)
        yield f"dequantize-{format}", fake_quant, "_dequantize_fwd_kernel", "_dequantize_triton", arguments
        arguments = (w, WIDE[:, ::2], recipe, False, True)
        yield f"compare-{format}", bucket_compare, "_bucket_compare_fwd_kernel", "_bucket_compare_triton", arguments


LAUNCHES = [pytest.param(*case[1:], id=case[0]) for case in launches()]


@pytest.mark.parametrize(("module", "kernel", "launcher", "arguments"), LAUNCHES)
def test_addresses_are_64_bits_wide(module, kernel, launcher, arguments):
    assert narrow_addresses(ttir(module, kernel, lambda: getattr(module, launcher)(*arguments))) == []
