"""Compile every kernel for GPUs that are not there, and read from the binaries what they will cost.

    python -m vptm_kernels.aot                         # every case, every target
    python -m vptm_kernels.aot --ci                    # the cases that matter most, as the tests run it
    python -m vptm_kernels.aot --spills                # registers and spills alone, in a third of the time
    python -m vptm_kernels.aot --targets sm90 --cases forward --json
    python -m vptm_kernels.aot --ci --baseline FILE    # also what changed since FILE was written
    python -m vptm_kernels.aot --ci --write-baseline FILE

An op takes part with a module `aot_cases.py` whose `cases()` yields `Case`s: functions that call its launchers with
CPU tensors. Launches are intercepted after Triton has bound and specialised the arguments, so that what is compiled
is what a GPU would run; nothing is executed. Every target runs in a process of its own, without TRITON_INTERPRET, as
many at a time as there are cores, and a case of an AMD target in a fork with a time limit, because that compiler can
abort the process.

The exit status is 1 if a kernel spills registers, lacks tensor-core instructions though it multiplies matrices, draws a
ptxas warning about serialised tensor-core instructions (C75xx), does not compile, or, with a baseline, spills more than
there, has lost the tensor-core instructions it has there, or is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

TARGETS = ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950")
SECONDS_PER_CASE = 120


@dataclass(frozen=True)
class Case:
    """One call to compile. `run` gets the target's name, to pick the configuration of that architecture.

    precision: of float32 products, as `torch.set_float32_matmul_precision` takes it. candidate: a form that no table
    answers and only a card may choose; its spills are reported and are no fault.
    """

    name: str
    run: Callable[[str], None]
    ci: bool = False
    precision: str = "highest"
    candidate: bool = False


class Traffic(NamedTuple):
    """Bytes that one launch moves.

    cache: what all programs load and store, each of their accesses once: what passes the second-level cache if nothing
    stays in a first-level one. Rows that a block repeats past the end are not counted. memory: every byte that is read
    or written counted once: what passes DRAM if everything read again comes from the cache.
    """

    cache: int
    memory: int


@dataclass
class Report:
    """What one compiled kernel costs. Bytes for spills and shared memory; counts are static instructions per thread.

    On AMD GPUs blocks_per_sm counts programs per compute unit, and counts of instructions are those of a wave.
    programs, the bytes of `Traffic`, waves and tail_efficiency are those of the launch with the sizes of its case:
    waves = programs / (multiprocessors * blocks_per_sm), tail_efficiency = waves / the next whole number of them.
    """

    case: str
    kernel: str
    target: str
    num_warps: int = 0
    num_stages: int = 0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    blocks_per_sm: int = 0
    occupancy: float = 0.0
    limiter: str = ""
    programs: int = 0
    cache_bytes: int = 0
    memory_bytes: int = 0
    waves: float = 0.0
    tail_efficiency: float = 0.0
    dots: int = 0
    tensor_core: int = 0
    tensor_core_kind: str = ""
    loads: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    loops: list[dict[str, int]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    candidate: bool = False
    constants: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def problems(self) -> list[str]:
        if self.error:
            return [self.error]
        found = []
        if self.spills and not self.candidate:
            found.append(f"spills {self.spills} bytes")
        if self.dots and not self.tensor_core:
            found.append("no tensor-core instruction")
        return found + [f"ptxas {warning}" for warning in self.warnings]

    @property
    def main_loop(self) -> dict[str, int]:
        """The loop with the most instructions; empty if there is none."""
        return max(self.loops, key=lambda loop: loop["total"], default={})

    def row(self) -> str:
        if self.error:
            return f"{self.target:7s} {self.case:34s} {self.kernel:22s} FAILED {self.error}"
        loads = " ".join(f"{width}:{count}" for width, count in self.loads.items() if count)
        loop = self.main_loop
        return (
            f"{self.target:7s} {self.case:34s} {self.kernel:22s} w{self.num_warps} s{self.num_stages} "
            f"regs {self.registers:3d} spills {self.spills:3d} shared {self.shared:6d} "
            f"blocks/SM {self.blocks_per_sm:2d} ({self.occupancy:.0%}, {self.limiter}) "
            f"{self.tensor_core_kind or 'no tensor cores'} {self.tensor_core:3d} loads [{loads}] "
            f"instructions {self.instructions} loop {loop.get('total', 0)} "
            f"(mufu {loop.get('MUFU', 0)}, max {loop.get('FMNMX', 0)}) "
            f"programs {self.programs} waves {self.waves:.2f} tail {self.tail_efficiency:.2f} "
            f"MB cache {self.cache_bytes / 1e6:.1f} memory {self.memory_bytes / 1e6:.1f} {' '.join(self.problems)}"
        )


# ------------------------------------------------------------------ occupancy


@dataclass(frozen=True)
class _Multiprocessor:
    warps: int
    blocks: int
    shared: int
    shared_per_block: int


_MULTIPROCESSORS = {
    "sm80": _Multiprocessor(64, 32, 167936, 166912),
    "sm90": _Multiprocessor(64, 32, 233472, 232448),
    "sm100": _Multiprocessor(64, 32, 233472, 232448),
    "sm120": _Multiprocessor(48, 24, 102400, 101376),
}
# Of an A100, H100 SXM, B200, RTX PRO 6000, MI300X and MI355X.
_COUNTS = {"sm80": 108, "sm90": 132, "sm100": 148, "sm120": 188, "gfx942": 304, "gfx950": 256}


def waves(programs: int, blocks_per_sm: int, target: str) -> tuple[float, float]:
    """(how many times the programs fill the device, share of the last whole time that is used)."""
    if not programs or not blocks_per_sm:
        return 0.0, 0.0
    times = programs / (_COUNTS[target] * blocks_per_sm)
    return times, times / math.ceil(times)


def without_groups(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, those in groups (named tuples) beside the others."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        flat |= value._asdict() if hasattr(value, "_asdict") else {name: value}
    return flat


def traffic(kernel: Any, arguments: dict[str, Any]) -> Traffic:
    """By the formula that the op's `traffic.KERNELS` has for the kernel; else every tensor it takes once, which holds
    for kernels that read nothing twice."""
    package = kernel.__module__.rpartition(".")[0]
    known = package and importlib.util.find_spec(f"{package}.traffic") is not None
    arguments = without_groups(arguments)
    formulas = importlib.import_module(f"{package}.traffic").KERNELS if known else {}
    if kernel.__name__ in formulas:
        return Traffic(*formulas[kernel.__name__](arguments))
    tensors = {(t.data_ptr(), t.numel()): t for t in arguments.values() if hasattr(t, "element_size") and t.numel()}
    once = sum(t.numel() * t.element_size() for t in tensors.values())
    return Traffic(once, once)


def occupancy(
    registers: int, shared: int, num_warps: int, target: str, tensor_memory: int = 0
) -> tuple[int, float, str]:
    """(blocks per multiprocessor, share of its warps, what limits it) of an NVIDIA target, by the CUDA rules.

    Registers are given to a warp in units of 256 and to warps in groups of four; a block's shared memory is rounded up
    to 128 bytes and 1 KiB of it belongs to the system; sm100 has 512 columns of tensor memory.
    """
    limits = _MULTIPROCESSORS[target]
    per_warp = math.ceil(max(registers, 16) * 32 / 256) * 256
    rounded = math.ceil((shared + 1024) / 128) * 128
    by = {
        "warps": limits.warps // num_warps,
        "blocks": limits.blocks,
        "registers": 65536 // 4 // per_warp * 4 // num_warps,
        "shared memory": limits.shared // rounded if shared <= limits.shared_per_block else 0,
    }
    if tensor_memory:
        by["tensor memory"] = 512 // tensor_memory
    blocks = min(by.values())
    return blocks, blocks * num_warps / limits.warps, " and ".join(name for name, n in by.items() if n == blocks)


# Bytes of local memory of a compute unit, of which every program takes a multiple of 512.
_LOCAL_MEMORY = {"gfx942": 64 << 10, "gfx950": 160 << 10}


def amd_occupancy(waves_per_simd: int, shared: int, num_warps: int, target: str) -> tuple[int, float, str]:
    """(programs per compute unit, share of its waves, what limits it): four SIMDs hold up to eight waves each.

    waves_per_simd: what registers allow, as the compiler notes it.
    """
    by = {"registers" if waves_per_simd < 8 else "waves": 4 * waves_per_simd // num_warps}
    if shared:
        by["shared memory"] = _LOCAL_MEMORY[target] // (math.ceil(shared / 512) * 512)
    blocks = min(by.values())
    return blocks, blocks * num_warps / 32, " and ".join(name for name, n in by.items() if n == blocks)


# ------------------------------------------------------------------ reading binaries

_GROUPS = {
    "HGMMA": r"HGMMA|QGMMA|WGMMA",
    "UTCMMA": r"UTC\w*MMA",
    "HMMA": r"HMMA|QMMA|IMMA|DMMA",
    "MUFU": r"MUFU|v_(exp|log|rcp|rsq|sqrt)_",
    "FMNMX": r"FMNMX|v_(pk_)?(max|min)3?_",
    "FFMA": r"FFMA",
    "FMUL": r"FMUL",
    "FADD": r"FADD",
    "convert": r"F2F|F2FP|I2F|F2I|HADD2\.F32|PRMT",
    "integer": r"IMAD|IADD|LEA|VIADD|VIMNMX|IMNMX|LOP3|SHF|ISETP|SEL",
    "select": r"FSEL|FSETP",
    "shared": r"LDS|STS|LDSM|STSM",
    "barrier": r"BAR|WARPSYNC|BSYNC|SYNCS",
    "shuffle": r"SHFL",
}


def _load_width(opcode: str) -> str | None:
    if opcode.startswith("LDGSTS"):
        return "async"
    if opcode.startswith(("UTMALDG", "UBLKCP")):
        return "tma"
    if not opcode.startswith("LDG"):
        return None
    width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", opcode)
    return {"U16": "16", "S16": "16", "U8": "8", "S8": "8"}.get(width[1], width[1]) if width else "32"


@functools.cache
def _group(opcode: str) -> str | None:
    return next((group for group, pattern in _GROUPS.items() if re.match(pattern, opcode)), None)


def _count(opcodes: list[str]) -> dict[str, int]:
    counts = Counter(group for opcode in opcodes if (group := _group(opcode)) is not None)
    return {"total": len(opcodes), **counts}


def _disassemble(cubin: bytes) -> list[tuple[str | None, str, str]]:
    """(label, opcode, operands) of every instruction."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    lines, label = [], None
    for line in text.splitlines():
        if found := re.match(r"^\s*(\.L_x_\d+):", line):
            label = found[1]
        elif found := re.match(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            lines.append((label, found[1], found[2]))
            label = None
    return lines


def _innermost_loops(lines: list[tuple[str | None, str, str]]) -> list[tuple[int, int]]:
    """Spans of backward branches that hold no other backward branch's span."""
    at = {label: i for i, (label, _, _) in enumerate(lines) if label}
    spans = []
    for i, (_, opcode, operands) in enumerate(lines):
        branches = opcode.startswith(("BRA", "s_cbranch", "s_branch"))
        found = re.search(r"\.L(_x|BB\d+)_\d+", operands) if branches else None
        if found and at.get(found[0], i) < i:
            spans.append((at[found[0]], i))
    return [s for s in spans if not any(o != s and o[0] >= s[0] and o[1] <= s[1] for o in spans)]


def _read_nvidia_resources(report: Report, compiled: Any) -> None:
    """Registers and bytes of stack, which kernels have for spills alone, as the binary itself states them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump must print REG and STACK, got {text[:80]!r}")
    report.registers, report.spills = int(found[1]), int(found[2])
    report.dots, report.tensor_core_kind = 0, "not read"


def _ptxas_log(compiled: Any, target: str) -> str:
    """What ptxas says of a kernel that came from Triton's cache, compiled once more as Triton does it."""
    from triton.backends.nvidia import compiler

    capability = int(target[2:])
    ptxas = compiler.get_ptxas(capability)
    suffix = "a" if capability >= 90 else ""
    source = Path(compiler.__file__).read_text()
    flags = ["--regAllocOptLevel=2"] if "--regAllocOptLevel" in source else []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        Path(path).write_text(compiled.asm["ptx"])
        command = [ptxas.path, "-lineinfo", "-v", *flags, f"--gpu-name=sm_{capability}{suffix}", path]
        return subprocess.run([*command, "-o", path + ".cubin"], capture_output=True, text=True, check=True).stderr


def _read_nvidia(report: Report, compiled: Any, log: str) -> None:
    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    report.registers = number(r"Used (\d+) registers")
    report.spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    report.warnings = sorted(set(re.findall(r"C75\d\d", log)))
    lines = _disassemble(compiled.asm["cubin"])
    opcodes = [opcode for _, opcode, _ in lines]
    counts = _count(opcodes)
    for kind, name in (("UTCMMA", "tcgen05"), ("HGMMA", "wgmma"), ("HMMA", "mma")):
        if counts.get(kind):
            report.tensor_core_kind, report.tensor_core = name, counts[kind]
            break
    report.loads = dict(Counter(width for opcode in opcodes if (width := _load_width(opcode))))
    report.instructions = counts["total"]
    report.counts = counts
    report.loops = [_count(opcodes[first : last + 1]) for first, last in _innermost_loops(lines)]
    report.blocks_per_sm, report.occupancy, report.limiter = occupancy(
        report.registers, report.shared, report.num_warps, report.target, report.tensor_memory
    )


def _read_amd(report: Report, compiled: Any) -> None:
    asm = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", asm)
        return int(found[1]) if found else 0

    lines, label = [], None
    for line in asm.splitlines():
        if found := re.match(r"(\.LBB\d+_\d+):", line):
            label = found[1]
        elif found := re.match(r"\s+([a-z]+_\w+)\s*([^;]*)", line):
            lines.append((label, found[1], found[2]))
            label = None
    opcodes = [opcode for _, opcode, _ in lines]
    report.registers = number("vgpr_count")
    report.spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    report.tensor_core = sum(opcode.startswith(("v_mfma", "v_wmma")) for opcode in opcodes)
    report.tensor_core_kind = "mfma" if report.tensor_core else ""
    widths = {"128": r"dwordx4", "64": r"dwordx2", "32": r"dword$", "16": r"ushort|short"}
    report.loads = {
        width: sum(bool(re.match(rf"(global|buffer)_load_({end})", opcode)) for opcode in opcodes)
        for width, end in widths.items()
    }
    report.instructions = len(opcodes)
    report.counts = _count(opcodes)
    report.loops = [_count(opcodes[first : last + 1]) for first, last in _innermost_loops(lines)]
    waves = re.search(r"; Occupancy: (\d+)", asm)
    report.blocks_per_sm, report.occupancy, report.limiter = amd_occupancy(
        int(waves[1]) if waves else 0, report.shared, report.num_warps, report.target
    )


# ------------------------------------------------------------------ compiling


class IdleDriver:
    """Enough of a Triton driver to bind and specialise arguments; it never launches."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


CHOSEN_POINTER = re.compile(r"arith\.select .*!tt\.ptr")


def _gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(name[2:]), 32) if name.startswith("sm") else GPUTarget("hip", name, 64)


def _short_name(kernel: Any) -> str:
    """Without the name of its op, which the case has: kernels are named in full so that profiles tell them apart."""
    op = kernel.__module__.rpartition(".")[0].rpartition(".")[2]
    return str(kernel.__name__).removesuffix("_kernel").removeprefix(f"{op}_")


@contextlib.contextmanager
def intercept(target: str, case: str, spills_only: bool = False) -> Iterator[list[Report]]:
    """Inside, `kernel[grid](...)` compiles for `target` instead of launching, and the list fills with reports."""
    import triton
    from triton.runtime.jit import JITFunction

    from ._runtime.plans import forget_plans

    reports: list[Report] = []
    launch, touched = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        # Compiled kernels are cached by device number, and every target here is device 0.
        self.device_caches.clear()
        touched.append(self)
        with contextlib.redirect_stdout(io.StringIO()) as printed, triton.knobs.nvidia.scope():
            triton.knobs.nvidia.dump_ptxas_log = True
            compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        bound = without_groups(dict(zip(self.arg_names, args)) | kwargs)
        constants = {name: value for name, value in bound.items() if isinstance(value, (bool, int, float, str))}
        metadata = compiled.metadata
        report = Report(
            case=case,
            kernel=_short_name(self.fn),
            target=target,
            num_warps=metadata.num_warps,
            num_stages=metadata.num_stages,
            shared=metadata.shared,
            tensor_memory=getattr(metadata, "tmem_size", 0) or 0,
            # Products of float32 at full precision have no tensor-core instruction on NVIDIA GPUs.
            dots=len(re.findall(r"tt\.dot .*: tensor<\d+x\d+x(?:f16|bf16)>", compiled.asm.get("ttir", ""))),
            constants=constants,
        )
        if CHOSEN_POINTER.search(compiled.asm.get("ttir", "")):
            report.error = "chooses between pointers: for AMD, Triton 3.6 and 3.7 end the process where they compile it"
        if spills_only and target.startswith("sm"):
            _read_nvidia_resources(report, compiled)
            reports.append(report)
            return compiled
        if target.startswith("sm"):
            _read_nvidia(report, compiled, printed.getvalue() or _ptxas_log(compiled, target))
        else:
            _read_amd(report, compiled)
        report.programs = math.prod(grid)
        report.cache_bytes, report.memory_bytes = traffic(self.fn, bound)
        report.waves, report.tail_efficiency = waves(report.programs, report.blocks_per_sm, target)
        reports.append(report)
        return compiled

    forget_plans()
    driver = triton.runtime.driver
    driver.set_active(IdleDriver(_gpu_target(target)))
    JITFunction.run = compile_only
    try:
        yield reports
    finally:
        JITFunction.run = launch
        driver._active = None
        for kernel in touched:
            kernel.device_caches.clear()
        forget_plans()


def compile_case(case: Case, target: str, spills_only: bool = False) -> list[Report]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(case.precision)
    try:
        with intercept(target, case.name, spills_only) as reports:
            case.run(target)
        for report in reports:
            report.candidate = case.candidate
        return reports
    except Exception as error:  # every compiler failure is a result here, the next case still runs
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Report(case.name, "", target, error=first_line[:200])]
    finally:
        torch.set_float32_matmul_precision(before)


def _compile_in_fork(case: Case, target: str, spills_only: bool = False) -> list[Report]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send([asdict(r) for r in compile_case(case, target, spills_only)]))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS_PER_CASE):
            return [Report(**report) for report in receiver.recv()]
        error = f"no result within {SECONDS_PER_CASE} s"
    except EOFError:
        error = "the compiler ended the process"
    finally:
        process.kill()
        process.join()
    return [Report(case.name, "", target, error=error)]


def all_cases() -> list[Case]:
    """The cases of every op: `cases()` of the `aot_cases` module in each subpackage that has one."""
    import vptm_kernels

    found: list[Case] = []
    for module in pkgutil.iter_modules(vptm_kernels.__path__, "vptm_kernels."):
        name = f"{module.name}.aot_cases"
        if module.ispkg and importlib.util.find_spec(name) is not None:
            found += importlib.import_module(name).cases()
    return found


def _chosen(pattern: str, ci: bool) -> list[Case]:
    return [case for case in all_cases() if (case.ci or not ci) and re.search(pattern, case.name)]


def _work(target: str, pattern: str, ci: bool, spills_only: bool) -> None:
    """Print one json list of reports per case, as they come."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    compile_one = compile_case if target.startswith("sm") else _compile_in_fork
    for case in _chosen(pattern, ci):
        print(json.dumps([asdict(report) for report in compile_one(case, target, spills_only)]), flush=True)


def _run_target(target: str, pattern: str, ci: bool, spills_only: bool = False) -> Iterator[Report]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vptm_kernels.aot", "--worker", target, "--cases", pattern]
    command += ["--ci"] * ci + ["--spills"] * spills_only
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        for line in child.stdout:
            yield from (Report(**values) for values in json.loads(line))
        message = child.stderr.read().strip()
    if child.returncode:
        last = message.splitlines()[-1] if message else f"exit status {child.returncode}"
        yield Report("", "", target, error=f"the compiling process failed: {last}")


def run(
    targets: Sequence[str],
    pattern: str = "",
    ci: bool = False,
    on_report: Callable[[Report], None] | None = None,
    spills_only: bool = False,
) -> list[Report]:
    """Reports of all chosen cases, in the order of targets, from one child process per target.

    spills_only: registers and spills alone are read from NVIDIA's binaries, and spills are bytes of stack.
    """

    def reports_of(target: str) -> list[Report]:
        found = []
        for report in _run_target(target, pattern, ci, spills_only):
            found.append(report)
            if on_report is not None:
                on_report(report)
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [report for found in pool.map(reports_of, targets) for report in found]


# ------------------------------------------------------------------ baseline


def _entries(reports: list[Report]) -> dict[str, dict[str, Any]]:
    """What a baseline keeps, by "target case kernel"; launches of one kernel in one case are counted #2, #3."""
    found: dict[str, dict[str, Any]] = {}
    seen: Counter[str] = Counter()
    for report in reports:
        if report.error:
            continue
        key = f"{report.target} {report.case} {report.kernel}"
        seen[key] += 1
        loop = report.main_loop
        found[key if seen[key] == 1 else f"{key} #{seen[key]}"] = {
            "registers": report.registers,
            "spills": report.spills,
            "shared": report.shared,
            "blocks_per_sm": report.blocks_per_sm,
            "occupancy": round(report.occupancy, 3),
            "tensor_core": report.tensor_core_kind,
            "tensor_core_instructions": report.tensor_core,
            "wide_loads": sum(report.loads.get(width, 0) for width in ("128", "async", "tma")),
            "instructions": report.instructions,
            "loop": loop.get("total", 0),
            "loop_mufu": loop.get("MUFU", 0),
        }
    return found


def read_baseline(path: Path) -> dict[str, Any]:
    """{"versions": ..., "kernels": {"target case kernel": counts}} as `write_baseline` left it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"baseline must be a json file, {path.name} is not: {error}") from None
    if not isinstance(content, dict) or not {"versions", "kernels"} <= set(content):
        raise ValueError(f"baseline must hold versions and kernels, {path.name} does not")
    return content


def write_baseline(path: Path, reports: list[Report]) -> int:
    """Write what the compiled cases cost, keep the rest of the file, and return the number of kernels it now holds.

    Cases that no op has any more are dropped.
    """
    import triton

    compiled = {(report.target, report.case) for report in reports}
    cases = {case.name for case in all_cases()} | {report.case for report in reports}
    kept = read_baseline(path)["kernels"] if path.is_file() else {}
    kernels = {
        key: value for key, value in kept.items() if tuple(key.split()[:2]) not in compiled and key.split()[1] in cases
    }
    kernels |= _entries(reports)
    # one line per kernel, so that a change reads well as a difference of versions
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(kernels[key])}" for key in sorted(kernels))
    versions = json.dumps({"triton": triton.__version__})
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(f'{{"versions": {versions},\n "kernels": {{\n{lines}\n }}}}\n', encoding="utf-8")
    temporary.replace(path)
    return len(kernels)


def compare(reports: list[Report], baseline: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what a kernel has lost, everything else that differs), one line each, for the targets and cases in `reports`.

    Lost: more spills than in the baseline, other or no tensor-core instructions where the baseline has some, or the
    whole kernel.
    """
    lost, changed = [], []
    found, compiled = _entries(reports), {(report.target, report.case) for report in reports}
    known = {key: value for key, value in baseline["kernels"].items() if tuple(key.split()[:2]) in compiled}
    for key in sorted(found | known):
        if key not in found:
            lost.append(f"{key}: gone")
            continue
        if key not in known:
            changed.append(f"{key}: new")
            continue
        now, before = found[key], known[key]
        if now["spills"] > before["spills"]:
            lost.append(f"{key}: spills {before['spills']} -> {now['spills']} bytes")
        if before["tensor_core"] and now["tensor_core"] != before["tensor_core"]:
            lost.append(f"{key}: tensor cores {before['tensor_core']} -> {now['tensor_core'] or 'none'}")
        differences = [f"{n} {before.get(n)} -> {now[n]}" for n in now if now[n] != before.get(n)]
        if differences:
            changed.append(f"{key}: {', '.join(differences)}")
    return lost, changed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vptm_kernels.aot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--targets", help=f"comma separated, of {', '.join(TARGETS)}, or all (default: all)")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--ci", action="store_true", help="only cases that matter most")
    parser.add_argument("--spills", action="store_true", help="read registers and spills alone, and check no more")
    parser.add_argument("--json", action="store_true", help="print one json list instead of a table")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="print what changed since it was written")
    parser.add_argument("--write-baseline", type=Path, metavar="FILE", help="write what these cases and targets cost")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        parser.error("compiling kernels needs the triton package, which is not installed")
    if options.worker:
        _work(options.worker, options.cases, options.ci, options.spills)
        return 0
    targets = list(TARGETS) if options.targets in (None, "all") else options.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"--targets must be of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    if options.list:
        print(*(case.name for case in _chosen(options.cases, options.ci)), sep="\n")
        return 0
    baseline = None
    if options.baseline:
        try:
            baseline = read_baseline(options.baseline)
        except (ValueError, OSError) as error:
            parser.error(str(error))
    if not _chosen(options.cases, options.ci):
        parser.error(f"--cases must match a case, got {options.cases!r}")
    show = None if options.json else lambda report: print(report.row(), flush=True)
    if options.spills and (options.baseline or options.write_baseline):
        parser.error("--spills reads too little for --baseline or --write-baseline")
    reports = run(targets, options.cases, options.ci, show, options.spills)
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    if options.write_baseline:
        count = write_baseline(options.write_baseline, reports)
        print(f"wrote {options.write_baseline}, {count} kernels", file=sys.stderr)
    lost: list[str] = []
    if baseline is not None:
        lost, changed = compare(reports, baseline)
        print(*(f"LOST {line}" for line in lost), *changed, sep="\n", file=sys.stderr)
    return int(bool(lost) or any(report.problems for report in reports))


if __name__ == "__main__":
    sys.exit(main())
