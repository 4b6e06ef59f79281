"""What the GPU compilers make of a kernel at the launch that its launcher really does; no GPU is needed.

A launcher is run on CPU tensors with a stand-in for the kernel that notes its arguments. For these the kernel is
compiled ahead of time as Triton's JIT would compile it, and the machine code is read.
"""

import functools
import importlib
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_OPTIONS = ("num_warps", "enable_fp_fusion", "maxnreg")
_OPTIONS_OF_NVIDIA = ("maxnreg",)
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Target:
    """A GPU and what one of its multiprocessors holds: 32-lane warps, programs, registers of 32 bits, bytes."""

    gpu: GPUTarget
    warps: int
    programs: int
    shared: int
    registers: int = 65536


TARGETS = {
    # CUDA C++ Programming Guide, technical specifications per compute capability.
    "sm_80": Target(GPUTarget("cuda", 80, 32), 64, 32, 164 << 10),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 48, 24, 100 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 64, 32, 228 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 64, 32, 228 << 10),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 48, 24, 100 << 10),
    # AMD CDNA3 ISA guide: four SIMDs of 512 registers x 64 lanes and at most 8 waves each. A wave counts as two warps.
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64, 32, 64 << 10, registers=4 * 512 * 64),
}


@dataclass(frozen=True)
class Launch:
    """What a launcher hands to its kernel: arguments by name, and the options of the launch."""

    kernel: triton.JITFunction
    arguments: dict
    options: dict


@dataclass(frozen=True)
class Code:
    """What was read in the machine code of one kernel for one target.

    Attributes:
        registers: a thread.
        spilled: bytes of local memory a thread.
        resident: warps that a multiprocessor holds at once, as its registers, shared memory and slots allow.
        loads, stores: by pointer argument, {bits of one access: bytes of them in the program's text, over all threads}.
        inexact: instructions for a division, root or exponential that is not correctly rounded.
        fused: (fewest, most) multiply-adds, which round once: of an instruction for two, one may be for nothing.
        flushed: whether arithmetic flushes subnormal numbers to zero.
        atomics: whether global memory is updated atomically.
        threads: in a program.
        text: the assembly: PTX, or amdgcn.
        cubin: what runs, for NVIDIA.
    """

    registers: int
    spilled: int
    resident: int
    loads: dict[str, dict[int, int]]
    stores: dict[str, dict[int, int]]
    inexact: list[str]
    fused: tuple[int, int]
    flushed: bool
    atomics: bool
    threads: int
    text: str
    cubin: bytes | None = None


def note_launch(module: str, kernel: str, call) -> Launch:
    """What ``call`` hands to the kernel of that name in ``quail_kernels.<module>``."""
    module = importlib.import_module(f"quail_kernels.{module}")
    jitted = getattr(module, kernel)
    noted = {}

    class Note:
        def __getitem__(self, grid):
            return lambda *args, **named: noted.update(zip(jitted.arg_names, args, strict=False), **named)

    setattr(module, kernel, Note())
    try:
        call()
    finally:
        setattr(module, kernel, jitted)
    options = {name: noted.pop(name) for name in _OPTIONS if name in noted}
    if sorted(noted) != sorted(jitted.arg_names):
        raise ValueError(f"{kernel}: expected a launch with {sorted(jitted.arg_names)}; got {sorted(noted)}")
    return Launch(jitted, noted, options)


def compile_launch(launch: Launch, target: str) -> Code:
    gpu = TARGETS[target].gpu
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        options = {
            name: value
            for name, value in launch.options.items()
            if gpu.backend == "cuda" or name not in _OPTIONS_OF_NVIDIA
        }
        compiled = triton.compile(_source(launch, gpu.backend), target=gpu, options=options)
    return (_read_amd if gpu.backend == "hip" else _read_nvidia)(compiled, launch, TARGETS[target])


def _source(launch: Launch, backend: str) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
            if backend == "hip":  # the JIT says so of a tensor below 2 GiB
                attributes[(i,)].append(["tt.pointer_range", 32])
        elif isinstance(value, int):
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _read_nvidia(compiled, launch: Launch, target: Target) -> Code:
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    usage = _cuda_tool("cuobjdump", cubin, "-res-usage")
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))
    warps = launch.options["num_warps"]
    threads = 32 * warps
    shared = compiled.metadata.shared + 1024  # of which the driver keeps 1 KiB for itself
    fits = min(
        target.registers // (_up(registers, 8) * threads),
        target.shared // shared,
        target.programs,
        target.warps // warps,
    )
    loads, stores = _accesses_in_ptx(ptx, _pointers(launch), threads)
    multiply_adds = len(re.findall(r"\bfma\.rn", ptx))
    return Code(
        registers=registers,
        spilled=stack + local,
        resident=fits * warps,
        loads=loads,
        stores=stores,
        inexact=sorted(set(re.findall(r"\b\w+\.(?:full|approx)[.\w]*", ptx))),
        fused=(multiply_adds, multiply_adds + len(re.findall(r"\bfma\.rn\S*\.f32x2", ptx))),
        # What floor flushes to 0 is a position in the lowest bucket either way.
        flushed=re.search(r"(?<!cvt\.rmi)\.ftz", ptx) is not None,
        atomics=re.search(r"\b(atom|red)\.", ptx) is not None,
        text=ptx,
        threads=threads,
        cubin=cubin,
    )


def _read_amd(compiled, launch: Launch, target: Target) -> Code:
    text = compiled.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"^\s*\.{name}:?\s+(\d+)", text, re.MULTILINE).group(1))

    def count(pattern):
        return len(re.findall(rf"^\s+(?:{pattern})(?!\w)", text, re.MULTILINE))

    warps = launch.options["num_warps"]
    threads = 64 * warps
    registers = number("amdhsa_next_free_vgpr")
    fits = min(
        target.registers // (_up(registers, 8) * threads),
        target.shared // max(number("group_segment_fixed_size"), 1),
        target.programs,
        target.warps // (2 * warps),
    )
    loads, stores = _accesses_in_llvm(compiled.asm["llir"], _pointers(launch), threads)
    # A correctly rounded division is one reciprocal, five multiply-adds and a fix-up between two scalings.
    divisions = count("v_div_fixup_f32")
    # With 0 as its third operand a mixed multiply-add is a product.
    multiply_adds = count(r"v_(?:pk_)?(?:fma|mad|mac)\w*_f(?:16|32)\w*") - count(r"v_fma_mix\w* .*, 0")
    multiply_adds -= 5 * divisions
    approximate = {name: count(rf"v_{name}_f\w*") for name in ("rcp", "rsq", "sqrt", "exp", "log")}
    approximate["rcp"] -= divisions
    return Code(
        registers=registers,
        # What overflows the scalar registers goes into lanes of vector registers, which are counted.
        spilled=number("private_segment_fixed_size") + 4 * number("vgpr_spill_count"),
        resident=fits * 2 * warps,
        loads=loads,
        stores=stores,
        inexact=sorted(f"v_{name}" for name, times in approximate.items() if times),
        fused=(multiply_adds, multiply_adds + count(r"v_pk_(?:fma|mad)\w*_f(?:16|32)\w*")),
        flushed=number("amdhsa_float_denorm_mode_32") != 3,
        atomics=re.search(r"^\s+\w*_atomic_", text, re.MULTILINE) is not None,
        text=text,
        threads=threads,
    )


def _pointers(launch: Launch) -> list[str | None]:
    """By position in the compiled kernel, the name of the argument where it is a pointer."""
    signature = _source(launch, "cuda").signature
    return [name if kind.startswith("*") else None for name, kind in signature.items() if kind != "constexpr"]


def _origin(name: str, sources: dict[str, set[str]], arguments: dict[str, str]) -> str:
    """The one pointer argument that the address in that register or value is reckoned from.

    Triton 3.6 takes the addresses of a table's entries through shared memory: those are ``"shared memory"``. An
    argument that has to be accessed in bulk is then missed where it is looked for, and so is no fault hidden.
    """
    seen, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += sources.get(name, ())
    found = {arguments[name] for name in seen if name in arguments}
    if not found:
        return "shared memory"
    if len(found) != 1:
        raise ValueError(f"address {name}: expected to find one pointer argument; got {sorted(found)}")
    return found.pop()


def _accesses_in_ptx(ptx: str, pointers: list[str | None], threads: int) -> tuple[dict, dict]:
    sources, arguments, found = {}, {}, []
    for line in ptx.splitlines():
        access = re.search(r"\b(ld|st)\.\S*global\S*?(?:\.v(\d))?\.\w(\d+)\s.*?\[\s*(%\w+)", line)
        if access:
            kind, vector, bits, address = access.groups()
            found.append((kind, int(vector or 1) * int(bits), address))
            continue
        param = re.search(r"ld\.param\S*\s+(%\w+), \[\w+_param_(\d+)\]", line)
        if param and int(param.group(2)) < len(pointers) and pointers[int(param.group(2))]:
            arguments[param.group(1)] = pointers[int(param.group(2))]
        elif result := re.match(r"\s+(add|sub|mov|cvta|mad|selp|and(?=\.b64))\.\S+\s+(%\w+),(.*);", line):
            # What only moves an address by a number, as a distance to the next boundary, is not its origin.
            operands = re.findall(r"%\w+", result.group(3))
            kept = operands[-1:] if result.group(1) == "mad" else operands
            sources.setdefault(result.group(2), set()).update(kept)
    return _by_pointer(((kind == "st", bits, _origin(a, sources, arguments)) for kind, bits, a in found), threads)


_LLVM_LABEL = r"([^\s:]+):"
_LLVM_BITS = {"i8": 8, "i16": 16, "bfloat": 16, "half": 16, "i32": 32, "float": 32, "i64": 64}


def _accesses_in_llvm(llvm: str, pointers: list[str | None], threads: int) -> tuple[dict, dict]:
    """For AMD: the assembler's registers are used over and over, LLVM's values are not.

    Of a pointer that a loop accesses, only what the loop does is told: the rest is the edges of a row.
    """
    sources, arguments, found = {}, {}, []
    body = llvm[llvm.index("define amdgpu_kernel") :]
    header, body = body.split("{", 1)
    names = re.findall(r"[(,] ?(?:ptr|i32|i64|float)[^,]*?(%\w+)(?=[,)])", header)
    arguments = {name: pointer for name, pointer in zip(names, pointers, strict=False) if pointer}
    repeated, block = _blocks_in_loops(body), ""
    for line in body.splitlines():
        if label := re.match(_LLVM_LABEL, line):
            block = label.group(1)
        buffer = re.search(r"buffer\.(load|store)\.(?:v(\d+))?[a-z]*\d+\((.*)", line)
        plain = re.search(r"\b(load|store) (<(\d+) x )?(\w+)\S* .*?ptr addrspace\(1\) (%\w+)", line)
        if buffer and "declare" not in line:
            kind, vector, operands = buffer.groups()
            element = int(re.search(r"buffer\.\w+\.(?:v\d+)?[a-z]*(\d+)\(", line).group(1))
            address = re.search(r"ptr addrspace\(8\) (%\w+)", operands).group(1)
            found.append((kind, int(vector or 1) * element, address, block in repeated))
        elif plain:
            kind, _, vector, element, address = plain.groups()
            found.append((kind, int(vector or 1) * _LLVM_BITS[element], address, block in repeated))
        elif result := re.match(r"\s+(%\w+) = (?:inttoptr|add|and)\b[a-z ]* i64 (%\w+)\b(?!, %)", line):
            # An address that is rounded up to a boundary.
            sources.setdefault(result.group(1), set()).add(result.group(2))
        elif result := re.match(r"\s+(%\w+) = .*?\bptr addrspace\(\d\) (.*)", line):
            is_phi = " phi " in line
            operands = re.findall(r"%\w+" if is_phi else r"^%\w+|(?<=\) )%\w+", result.group(2))
            sources.setdefault(result.group(1), set()).update(operands)
    accesses = [(kind == "store", bits, _origin(a, sources, arguments), looped) for kind, bits, a, looped in found]
    of_loops = {(is_store, pointer) for is_store, _, pointer, looped in accesses if looped}
    kept = [each[:3] for each in accesses if each[3] or (each[0], each[2]) not in of_loops]
    return _by_pointer(kept, threads)


def _blocks_in_loops(body: str) -> set[str]:
    """The labels of those basic blocks of LLVM's that can be reached from themselves; the first one has none."""
    successors, block = {}, ""
    for line in body.splitlines():
        if label := re.match(_LLVM_LABEL, line):
            block = label.group(1)
        elif re.match(r"\s+(?:br|switch) ", line):
            successors[block] = re.findall(r"label %([^\s,]+)", line)

    def reached_from(block: str) -> set[str]:
        reached, ahead = set(), list(successors.get(block, ()))
        while ahead:
            if (label := ahead.pop()) not in reached:
                reached.add(label)
                ahead += successors.get(label, ())
        return reached

    return {block for block in successors if block in reached_from(block)}


def _by_pointer(accesses, threads: int) -> tuple[dict[str, dict[int, int]], dict[str, dict[int, int]]]:
    loads, stores = {}, {}
    for is_store, bits, pointer in accesses:
        by_bits = (stores if is_store else loads).setdefault(pointer, Counter())
        by_bits[bits] += bits // 8 * threads
    return loads, stores


@functools.cache
def _cuda_folder() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _cuda_tool(name: str, cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuda_folder() / name, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Work:
    """Instructions that a thread issues on the longest path through a program, and those on the slower pipes.

    CUDA C++ Programming Guide, throughput of native arithmetic instructions, compute capability 9.0: a multiprocessor
    issues to 128 lanes a cycle; 64 of them compare, select, shift or do integer and logic, 32 shuffle or access memory,
    and 16 take roots, reciprocals, exponentials or convert integers.
    """

    issued: float
    integer: float
    memory: float
    special: float

    @property
    def slots(self) -> float:
        """The issue slots that pass while the busiest pipe is at work: with ``issued`` alone a kernel looks faster."""
        return max(self.issued, 2 * self.integer, 4 * self.memory, 8 * self.special)


_PIPES = (
    re.compile(
        r"[FDIH]SETP|[FI]?SEL$|V?I?F?MNMX|VIMNMX|FCHK|LOP3|SHF|PRMT|IADD|VIADD|PLOP3|LEA|SGXT|BMSK|F2FP|IABS|P2R|R2P"
    ),
    re.compile(r"LD|ST|SHFL|ATOM|RED"),
    re.compile(r"MUFU|I2F|F2I|F2F$|FRND|POPC|FLO|BREV"),
)


def count_work(cubin: bytes, pass_bytes: float, threads: int) -> Work:
    """Counts the instructions of the longest path that takes no slow path of a division (a call).

    A loop runs as often as its widest loads need to fetch ``pass_bytes``; narrower ones beside them are the other way
    over a ragged edge, or scalars.
    """
    blocks = _blocks(_cuda_tool("nvdisasm", cubin, "-c"))
    back, order = _depth_first(blocks)
    trips = dict.fromkeys(blocks, 1)
    for tail, head in back:
        body = _natural_loop(blocks, tail, head)
        loaded = [_load_bytes(line) for name in body for line in blocks[name].lines]
        fetched = sum(size for size in loaded if size == max(loaded)) * threads
        for name in body:
            trips[name] *= max(math.ceil(pass_bytes / fetched), 1) if fetched else 1
    longest = {}
    for name in order:  # successors first
        after = [longest[n] for n in blocks[name].successors if (name, n) not in back and n in longest]
        ops = [re.sub(r"@!?U?P\w+\s+", "", line).split()[0].split(".")[0] for line in blocks[name].lines]
        here = [len(ops), *(sum(bool(pipe.match(op)) for op in ops) for pipe in _PIPES)]
        longest[name] = tuple(a + b * trips[name] for a, b in zip(max(after, default=(0, 0, 0, 0)), here, strict=True))
    return Work(*longest["entry"])


@dataclass
class _Block:
    lines: list[str]
    successors: list[str]


def _blocks(listing: str) -> dict[str, _Block]:
    """Basic blocks by label, those that call something left out; the first is ``entry``."""
    blocks, name = {"entry": _Block([], [])}, "entry"
    started, n = False, 0

    def begin(label, falls_through):
        nonlocal name
        if falls_through:
            blocks[name].successors.append(label)
        blocks[label] = _Block([], [])
        name = label

    open_end = True
    for line in listing.splitlines():
        label = re.match(r"^([.$\w]+):", line)
        if label and started:
            begin(label.group(1), open_end)
            open_end = True
        instruction = re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
        if not instruction:
            continue
        started = True
        text = instruction.group(1)
        blocks[name].lines.append(text)
        plain = re.sub(r"@!?U?P\w+\s+", "", text)
        op = plain.split()[0]
        always = plain == text and not re.match(r"BRA\S*\s+(!?U?P\d|UR\d)", plain)
        if op.startswith(("BRA", "EXIT", "RET")):
            target = re.search(r"`\(([.$\w]+)\)", plain) if op.startswith("BRA") else None
            if target:
                blocks[name].successors.append(target.group(1))
            n += 1
            begin(f"after {n}", not always)
            open_end = True
    slow = {name for name, block in blocks.items() if any("CALL" in line for line in block.lines)}
    for block in blocks.values():
        block.successors = [name for name in block.successors if name in blocks and name not in slow]
    return {name: block for name, block in blocks.items() if name not in slow}


def _depth_first(blocks: dict[str, _Block]) -> tuple[set[tuple[str, str]], list[str]]:
    """(edges that close a loop, what is reachable from the entry, successors first)."""
    back, order, state = set(), [], {}
    stack = [("entry", iter(blocks["entry"].successors))]
    state["entry"] = "open"
    while stack:
        name, rest = stack[-1]
        for following in rest:
            if following not in state:
                state[following] = "open"
                stack.append((following, iter(blocks[following].successors)))
                break
            if state[following] == "open":
                back.add((name, following))
        else:
            state[name] = "done"
            order.append(name)
            stack.pop()
    return back, order


def _natural_loop(blocks: dict[str, _Block], tail: str, head: str) -> set[str]:
    body, todo = {head}, [tail]
    while todo:
        name = todo.pop()
        if name not in body:
            body.add(name)
            todo += [before for before, block in blocks.items() if name in block.successors]
    return body


def _load_bytes(line: str) -> int:
    load = re.search(r"\bLDG\S*", line)
    if not load:
        return 0
    bits = re.search(r"\.(?:U|S)?(8|16|32|64|128)\b", load.group())
    return int(bits.group(1)) // 8 if bits else 4
