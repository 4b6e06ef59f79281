"""What the GPU compilers make of every kernel, at the launch that the launcher really does; no GPU is needed.

A launcher is run on CPU tensors with a stand-in for the kernel that notes its arguments. For these the kernel is
compiled ahead of time as Triton's JIT would compile it.
"""

import importlib
import os
import re
import subprocess
import tempfile
from types import SimpleNamespace

import pytest
import torch

from quail_kernels.formats import get_format

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

OPTIONS = ("num_warps", "enable_fp_fusion")
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
MODULES = {
    name: importlib.import_module(f"quail_kernels.{name}") for name in ("fake_quant", "bucket_compare", "margin_hinge")
}


def launch(module, kernel_name, call):
    """The ASTSource and the options of the launch that ``call`` does."""
    kernel = getattr(MODULES[module], kernel_name)
    noted = {}

    class Note:
        def __getitem__(self, grid):
            return lambda *args, **named: noted.update(zip(kernel.arg_names, args, strict=False), **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULES[module], kernel_name, Note())
        call()
    options = {name: noted.pop(name) for name in OPTIONS}
    assert sorted(noted) == sorted(kernel.arg_names), "the launcher gives every argument"
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = noted[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def compile_for(arch, source, options):
    """PTX, and what ptxas says of registers and spills."""
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return SimpleNamespace(
        ptx=ptx,
        registers=int(re.search(r"Used (\d+) registers", log).group(1)),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        inexact=sorted(set(re.findall(r"\b\w+\.(?:full|approx)[.\w]*", ptx))),
        fused=len(re.findall(r"\bfma\.rn", ptx)),
        wide_loads=len(re.findall(r"ld\.global[.\w]*\.v4\.b32", ptx)),
        wide_stores=len(re.findall(r"st\.global[.\w]*\.v4\.b32", ptx)),
    )


def resident_warps(code, options):
    """How many warps of the kernel a multiprocessor with 65,536 registers holds at once; 16 hide its latencies."""
    threads = 32 * options["num_warps"]
    return 65536 // (-(-code.registers // 8) * 8 * threads) * options["num_warps"]


def weight_launches():
    fake_quant, compare = MODULES["fake_quant"], MODULES["bucket_compare"]
    for format, dtype in (
        ("bnb-nf4", torch.bfloat16),
        ("bnb-nf4", torch.float32),
        ("bnb-nf4@4096", torch.bfloat16),
        ("bnb-fp4", torch.bfloat16),
        ("ct-int4-sym", torch.bfloat16),
        ("ct-int4-sym@96", torch.float16),
        ("minmax-int4", torch.bfloat16),
        ("minmax-int4@128", torch.float32),
    ):
        recipe = get_format(format)
        w = torch.zeros(96, 4096 + (-4096) % (recipe.group_size or 1), dtype=dtype)
        name = f"{format}-{str(dtype).removeprefix('torch.')}"
        yield (
            name,
            "fake_quant",
            "_fake_quant_fwd_kernel",
            lambda w=w, r=recipe: fake_quant._fake_quant_triton(w, r),
        )
        yield (
            f"{name}-compare",
            "bucket_compare",
            "_bucket_compare_fwd_kernel",
            lambda w=w, r=recipe: compare._bucket_compare_triton(w, w, r, False, True),
        )
        if dtype == torch.bfloat16:
            yield (
                name,
                "fake_quant",
                "_quantize_fwd_kernel",
                lambda w=w, r=recipe: fake_quant._quantize_triton(w, r),
            )
    short = torch.zeros(64 * 40 + 7, dtype=torch.bfloat16)
    nf4 = get_format("bnb-nf4")
    yield "short", "fake_quant", "_fake_quant_fwd_kernel", lambda: fake_quant._fake_quant_triton(short, nf4)
    for format in ("bnb-nf4", "ct-int4-sym", "minmax-int4"):
        recipe = get_format(format)
        w = torch.zeros(32, 4096, dtype=torch.bfloat16)
        codes, scales = fake_quant._quantize_torch(w, recipe)
        yield (
            format,
            "fake_quant",
            "_dequantize_fwd_kernel",
            lambda c=codes, s=scales, w=w, r=recipe: fake_quant._dequantize_triton(c, s, r, w.shape, w.dtype),
        )


def hinge_launches():
    hinge = MODULES["margin_hinge"]
    for norm, space, dtype in (
        ("per_logit", "logits", torch.bfloat16),
        ("per_logit", "logits", torch.float32),
        ("per_logit", "log_probs", torch.bfloat16),
        ("l2", "log_probs", torch.bfloat16),
        ("linf", "log_probs", torch.bfloat16),
        ("label", "log_probs", torch.bfloat16),
    ):
        z = torch.zeros(1, 4, 49152, dtype=dtype)
        labels, stats = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 5)
        options = (0.1, norm, space, -100)
        name = f"{norm}-{space}-{str(dtype).removeprefix('torch.')}"
        yield (
            name,
            "margin_hinge",
            "_margin_hinge_fwd_kernel",
            lambda z=z, labels=labels, o=options: hinge._margin_hinge_fwd_triton(z, z, labels, *o),
        )
        yield (
            name,
            "margin_hinge",
            "_margin_hinge_bwd_kernel",
            lambda z=z, labels=labels, s=stats, o=options: hinge._margin_hinge_bwd_triton(
                z, s[:, 0].contiguous(), z, z, labels, s, *o
            ),
        )


def cases(launches):
    return [pytest.param(*case, id=f"{case[2]}-{case[0]}") for case in launches]


@pytest.mark.parametrize(("name", "module", "kernel", "call"), cases(weight_launches()))
def test_kernels_that_decide_codes(name, module, kernel, call, record_property):
    source, options = launch(module, kernel, call)
    assert options["enable_fp_fusion"] is False
    for arch in (80, 90):
        code = compile_for(arch, source, options)
        record_property(f"sm_{arch}", f"{code.registers} registers")
        assert code.spilled == 0
        assert code.inexact == [] and code.fused == 0, "arithmetic that PyTorch does not do"
        # Subnormal scales are scales. What floor flushes to 0 is a position in the lowest bucket either way.
        assert not re.search(r"(?<!cvt\.rmi)\.ftz", code.ptx)
        if "ct-int4" in name and kernel != "_dequantize_fwd_kernel":
            assert "0f4B400000" in code.ptx and "0fCB400000" in code.ptx, "1.5 * 2^23 is added and subtracted"
        assert not re.search(r"\b(atom|red)\.global", code.ptx), "sums in a fixed order"
        # Two weights, two grids and the counters: comparing has more to keep, and hides latency in arithmetic.
        assert resident_warps(code, options) >= (8 if kernel == "_bucket_compare_fwd_kernel" else 16)
        # A short last group masks single weights: no access can be wide. Codes are loaded by 64 bits.
        if kernel in ("_fake_quant_fwd_kernel", "_dequantize_fwd_kernel") and name != "short":
            assert code.wide_stores, "128 bits a thread"
        if kernel != "_dequantize_fwd_kernel" and name != "short":
            assert code.wide_loads, "128 bits a thread"


@pytest.mark.parametrize(("name", "module", "kernel", "call"), cases(hinge_launches()))
def test_kernels_of_the_hinge(name, module, kernel, call, record_property):
    source, options = launch(module, kernel, call)
    for arch in (80, 90):
        code = compile_for(arch, source, options)
        record_property(f"sm_{arch}", f"{code.registers} registers")
        assert code.spilled == 0 and resident_warps(code, options) >= 16
        assert code.wide_loads, "128 bits a thread"
        assert not re.search(r"\b(atom|red)\.global", code.ptx), "sums in a fixed order"
