"""Every launch whose machine code is checked: each kernel x format x dtype. A new op adds its cases to ``CASES``."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from quail_kernels.formats import FORMATS, get_format

# The package gives the ops' own names to their functions.
bucket_compare, fake_quant, margin_hinge, linear_margin_hinge = (
    importlib.import_module(f"quail_kernels.{name}")
    for name in ("bucket_compare", "fake_quant", "margin_hinge", "linear_margin_hinge")
)
_HALF_EVEN = ("symmetric", "zero_point", "zero_point_fp16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One launch, and what a program of it has to move.

    Attributes:
        name: kernel, format or norm, dtype.
        module, kernel: where the kernel stands.
        call: the launcher's call, on CPU tensors.
        elements: how many elements a program is for, by the arguments of the launch.
        loads, stores: {pointer: bytes an element}, of the tensors that are moved in bulk.
        lanes: how many elements its tile has room for; more than ``elements`` where a group is padded.
        passes: how often the loads are done.
        decides_codes: whether the arithmetic has to be PyTorch's to the bit.
        warps: how many have to be resident on a multiprocessor to hide its latencies.
        half_even: whether 1.5 * 2^23 is added, which the compiler must not fold.
        fused: how many multiply-adds an element has on purpose: each rounds once, as its source does.
        narrow: {pointer: why its accesses cannot be as wide as a thread's share}, where they cannot.
    """

    name: str
    module: str
    kernel: str
    call: Callable[[], object]
    elements: Callable[[dict], int]
    loads: dict[str, float]
    stores: dict[str, float]
    lanes: Callable[[dict], int]
    passes: int = 1
    decides_codes: bool = True
    warps: int = 16
    half_even: bool = False
    fused: int = 0
    narrow: dict[str, str] = field(default_factory=dict)


def _weights_of_program(arguments: dict) -> int:
    return arguments["BLOCK_GROUPS"] * arguments["GROUP_SIZE"] * arguments.get("n_steps", 1)


def _lanes_of_program(arguments: dict) -> int:
    return arguments["BLOCK_GROUPS"] * arguments["BLOCK_SIZE"]


def _fused(recipe, dtype: torch.dtype) -> int:
    """Where rounding once is what is wanted, or changes nothing: in the division by a group's scale, where it is exact
    in fp32 (``_quotient`` in formats/integer.py), the cell of a codebook's position, and ties that go to zero. In
    ``bucket_compare`` also the reciprocal of an E2M1 bucket's width, of which the sum is exact.
    """
    if recipe.kind in ("codebook", "mx_gguf"):
        return 1
    in_fp32 = (
        dtype == torch.float32 or recipe.kind in ("minmax", "zero_point_fp16") or getattr(recipe, "in_fp32", False)
    )
    return 2 if in_fp32 and recipe.kind in ("minmax", "symmetric", "zero_point", "zero_point_fp16") else 0


def _weights() -> Iterator[tuple[str, str, str, torch.Tensor, dict[str, str]]]:
    """(format, dtype's name, suffix of the case's name, weight, where accesses are narrow and why)."""
    for format in (*FORMATS, "bnb-nf4@4096", "ct-int4-sym@96", "minmax-int4@128"):
        size = get_format(format).group_size or 1
        for name, dtype in DTYPES.items():
            yield format, name, "", torch.zeros(96, 4096 + -4096 % size, dtype=dtype), {}
    nf4 = get_format("bnb-nf4").group_size
    bytewise = {"codes_ptr": "their number is no multiple of 16, so that each byte of codes has its own mask"}
    yield "bnb-nf4", "bf16", " short", torch.zeros(nf4 * 40 + 16, dtype=torch.bfloat16), bytewise
    alone = dict.fromkeys(("w_ptr", "w_q_ptr", "before_ptr", "after_ptr"), "each weight has its own mask")
    yield "bnb-nf4", "bf16", " odd", torch.zeros(nf4 * 40 + 7, dtype=torch.bfloat16), alone | bytewise


def weight_cases() -> Iterator[Case]:
    for format, dtype, suffix, w, narrow in _weights():
        recipe, size = get_format(format), w.element_size()
        common = {"elements": _weights_of_program, "lanes": _lanes_of_program, "narrow": narrow}
        half_even = recipe.kind in _HALF_EVEN
        fused = _fused(recipe, w.dtype)
        name = f"{format} {dtype}{suffix}"
        yield Case(
            f"fake_quant {name}",
            "fake_quant",
            "_fake_quant_fwd_kernel",
            lambda w=w, r=recipe: fake_quant._fake_quant_triton(w, r),
            loads={"w_ptr": size},
            stores={"w_q_ptr": size},
            half_even=half_even,
            fused=fused,
            **common,
        )
        yield Case(
            f"quantize {name}",
            "fake_quant",
            "_quantize_fwd_kernel",
            lambda w=w, r=recipe: fake_quant._quantize_triton(w, r),
            loads={"w_ptr": size},
            stores={"codes_ptr": 0.5},
            half_even=half_even,
            fused=fused,
            **common,
        )
        yield Case(
            f"dequantize {name}",
            "fake_quant",
            "_dequantize_fwd_kernel",
            lambda w=w, r=recipe: fake_quant._dequantize_triton(*fake_quant._quantize_torch(w, r), r, w.shape, w.dtype),
            loads={"codes_ptr": 0.5},
            stores={"w_q_ptr": size},
            **common,
        )
        # A program walks several tiles where the weights are many, as those of a model are.
        many = (4096, w.shape[-1]) if w.dim() == 2 else w.shape
        variants = [("own", False, False), ("before", True, False), ("own groups", False, True)]
        for variant, shared, per_group in variants if dtype == "bf16" else variants[:1]:
            yield Case(
                f"bucket_compare {name} {variant}",
                "bucket_compare",
                "_bucket_compare_fwd_kernel",
                lambda w=w, r=recipe, shape=many, shared=shared, per_group=per_group: (
                    bucket_compare._bucket_compare_triton(*2 * [w.new_zeros(shape)], r, shared, per_group)
                ),
                loads={"before_ptr": size, "after_ptr": size},
                stores={},
                # Two weights, two grids and the counters: it has more to keep, and hides latency in arithmetic.
                warps=8,
                half_even=half_even,
                fused=2 * fused + (recipe.kernel_constants(w.dtype)["THRESHOLDS"] is None),
                **common,
            )


def hinge_cases() -> Iterator[Case]:
    for vocab in (49152, 50257):
        for norm in margin_hinge.NORMS:
            for space in margin_hinge.SPACES:
                for dtype_name, dtype in DTYPES.items():
                    z, grad = torch.zeros(1, 4, vocab, dtype=dtype), torch.zeros(4)
                    labels, stats = torch.zeros(4, dtype=torch.int64), torch.zeros(4, margin_hinge._STATS)
                    options = (0.1, norm, space, -100)
                    name = f"{norm} {space} {vocab} {dtype_name}"
                    common = {
                        "lanes": lambda arguments: arguments["BLOCK_V"],
                        "decides_codes": False,
                    }
                    size = z.element_size()
                    both = {"z_ptr": size, "ref_ptr": size}
                    at_label = {"z_ptr": size} if space == "log_probs" else {}
                    yield Case(
                        f"hinge_fwd {name}",
                        "margin_hinge",
                        "_margin_hinge_fwd_kernel",
                        lambda z=z, labels=labels, o=options: margin_hinge._margin_hinge_fwd_triton(z, z, labels, *o),
                        elements=lambda arguments: arguments["n_vocab"],
                        # The hinge of the label alone reads one logit a row.
                        loads=both if norm != "label" or space == "log_probs" else {},
                        stores={},
                        # Whether a logit is inside the margin cannot be told before the normalizers are known.
                        passes=2 if space == "log_probs" and norm == "per_logit" else 1,
                        **common,
                    )
                    yield Case(
                        f"hinge_bwd {name}",
                        "margin_hinge",
                        "_margin_hinge_bwd_kernel",
                        lambda z=z, grad=grad, labels=labels, s=stats, o=options: margin_hinge._margin_hinge_bwd_triton(
                            z, grad, z, z, labels, s, *o
                        ),
                        elements=lambda arguments: arguments["BLOCK_V"],
                        # At the label alone, z is read for its softmax only, and the reference not at all.
                        loads=both if norm != "label" else at_label,
                        stores={"out_ptr": size},
                        **common,
                    )


def epilogue_cases() -> Iterator[Case]:
    """The logits of the hinge that takes hidden states, in the rows of a buffer padded to a multiple of 16."""
    tokens, vocab = 4, 50257
    labels, per_token = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens)
    for dtype_name, dtype in DTYPES.items():
        z = torch.zeros(tokens, vocab + -vocab % 16, dtype=dtype)[:, :vocab]
        common = {"lanes": lambda arguments: arguments["BLOCK_V"], "decides_codes": False}
        for name, scale, softcap in (("", 1.0, None), (" scale", 0.5, None), (" softcap", 1.0, 30.0)):
            yield Case(
                f"epilogue_fwd{name} {dtype_name}",
                "linear_margin_hinge",
                "_epilogue_fwd_kernel",
                lambda z=z, scale=scale, softcap=softcap: linear_margin_hinge._epilogue_fwd_triton(
                    per_token, z, labels, scale, softcap, -100
                ),
                elements=lambda arguments: arguments["n_vocab"],
                loads={"z_ptr": z.element_size()},
                stores={"z_ptr": z.element_size()} if name else {},
                **common,
            )
            yield Case(
                f"epilogue_bwd{name} {dtype_name}",
                "linear_margin_hinge",
                "_epilogue_bwd_kernel",
                lambda z=z, scale=scale, softcap=softcap: linear_margin_hinge._epilogue_bwd_triton(
                    z, z, per_token, per_token, labels, scale, softcap
                ),
                elements=lambda arguments: arguments["BLOCK_V"],
                loads={"z_ptr": z.element_size(), "grad_hinge_logits_ptr": z.element_size()},
                stores={"z_ptr": z.element_size()},
                **common,
            )


CASES: dict[str, Case] = {
    case.name: case for cases in (weight_cases(), hinge_cases(), epilogue_cases()) for case in cases
}
