"""Builds kernels: Python sources to LLVM IR with Numba, IR to object files with llvmlite.

Runs in processes of its own (`python -m edgeinfer.kernels.cpu.build`), so that a program that
only runs models never imports Numba. Knows nothing of models.

Numba compiles without optimising; every machine instruction in its output is still a call of a
placeholder `ei.*`, so any host can build any family. Then the placeholders become LLVM
intrinsics, everything but the kernel becomes internal, and one O3 pass inlines it all.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from pathlib import Path
from typing import Any

from edgeinfer import platform
from edgeinfer.kernels.cpu.kept_objects import symbol, write_object
from edgeinfer.kernels.cpu.object_files import undefined_symbols
from edgeinfer.kernels.cpu.soft_float import without_fma
from edgeinfer.kernels.cpu.targets import FAMILIES, Target

# What a placeholder stands for. The family is in the name, so one table serves all.
_PLACEHOLDERS = {
    "ei.x86.pmaddubsw": "llvm.x86.avx2.pmadd.ub.sw",
    "ei.x86.pmaddwd": "llvm.x86.avx2.pmadd.wd",
    "ei.x86.psignb": "llvm.x86.avx2.psign.b",
    "ei.x86.pshufb": "llvm.x86.avx2.pshuf.b",
    "ei.x86.vpdpbusd.256": "llvm.x86.avx512.vpdpbusd.256",
    "ei.x86.vpdpbusd.512": "llvm.x86.avx512.vpdpbusd.512",
    "ei.x86.vpdpwssd.256": "llvm.x86.avx512.vpdpwssd.256",
    "ei.x86.vpdpwssd.512": "llvm.x86.avx512.vpdpwssd.512",
    "ei.x86.pause": "llvm.x86.sse2.pause",
    "ei.x86.ldmxcsr": "llvm.x86.sse.ldmxcsr",
    "ei.aarch64.sdot": "llvm.aarch64.neon.sdot.v4i32.v16i8",
    "ei.aarch64.smull": "llvm.aarch64.neon.smull.v4i32",
    "ei.aarch64.addp": "llvm.aarch64.neon.addp.v4i32",
    "ei.aarch64.tbl": "llvm.aarch64.neon.tbl1.v16i8",
    "ei.aarch64.hint": "llvm.aarch64.hint",
    "ei.aarch64.set_fpcr": "llvm.aarch64.set.fpcr",
}

_ALLOWED = re.compile(
    r"llvm\.(fma|sqrt|roundeven|fabs|s?u?max|s?u?min|abs|ctlz|cttz|ctpop|bswap|fshl|fshr"
    r"|umul|smul|uadd|sadd|usub|ssub|prefetch|assume|lifetime|memcpy|memset|memmove|experimental"
    r"|vector\.reduce\.(add|s?u?max|s?u?min|or|and|xor)|x86|aarch64)\b.*"
)
_FAST_MATH = re.compile(r"^.*\b(fast|reassoc|contract|nnan|ninf|nsz|arcp|afn)\b .*$", re.MULTILINE)

_COLLECTED = 4  # kernels between two collections of garbage, 25 MB each
# Bytes that a builder holds at most when it takes another kernel: Numba forgets nothing.
_MOST_HELD = 256 << 20


class KernelBuildError(Exception):
    """A kernel's code calls something that no object may call."""


def kernel_ir(name: str, family: str) -> tuple[str, str]:
    """LLVM IR of one kernel and the name of its function, unoptimised."""
    os.environ["NUMBA_OPT"] = "0"  # read when Numba is first imported
    from numba import cfunc, types

    from edgeinfer.kernels.cpu.native import registry

    _make_no_host_code()
    kernel = registry.make(name, family)
    signature = types.void(*[types.intp] * kernel.__code__.co_argcount)
    compiled = cfunc(signature, error_model="numpy")(kernel)
    return compiled.inspect_llvm(), compiled.native_name


def _make_no_host_code() -> None:
    """Stop Numba from optimising and emitting every function for this host, and wrapping it.

    That is a third of the time, and nobody runs what comes out.
    """
    import llvmlite.binding as llvm
    from numba.core import codegen, lowering

    for placeholder in _PLACEHOLDERS:
        llvm.add_symbol(placeholder, 1)  # where Numba still links its own copy

    def set_layout(self: Any, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def link(self: Any, name: str) -> int:
        self._ensure_finalized()
        return 0

    library: Any = codegen.JITCodeLibrary
    unit: Any = codegen.JITCPUCodegen
    lower: Any = lowering.Lower
    wrap = getattr(lower, "_wrap", lower.create_cfunc_wrapper)

    def wrap_kernel(self: Any) -> None:
        if self.flags.no_cpython_wrapper:  # as `cfunc` asks for
            wrap(self)

    library._optimize_functions = set_layout
    library._optimize_final_module = lambda self: None
    library._finalize_specific = lambda self: None
    library.get_pointer_to_function = link
    unit._add_module = lambda self, module: None
    unit.set_env = lambda self, name, env: None
    lower.create_cpython_wrapper = lambda self, release_gil=False: None
    lower._wrap, lower.create_cfunc_wrapper = wrap, wrap_kernel


def optimise(ir: str, native_name: str, name: str, target: Target) -> Any:
    """The optimised llvmlite module of one kernel for `target`, and its target machine."""
    import llvmlite.binding as llvm

    for placeholder, intrinsic in _PLACEHOLDERS.items():
        ir = ir.replace(f'"{placeholder}"', f'"{intrinsic}"').replace(placeholder, intrinsic)
    ir = ir.replace(native_name, symbol(name)).replace("linkonce_odr", "internal")
    if target.machine == "x86_64" and target.family == "generic":
        ir = without_fma(ir)
    llvm.set_option("", "--x86-machine-combiner=false")
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    features = target.features
    if target.family == "avx512":  # GFNI's shift of bytes would share the ports of wide dots
        features = features.replace("+gfni", "-gfni")
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=features, opt=3, reloc="pic", codemodel="small"
    )
    ir = re.sub(r'target triple = ".*"', f'target triple = "{target.triple}"', ir)
    ir = re.sub(r'target datalayout = ".*"', f'target datalayout = "{machine.target_data}"', ir)
    module = llvm.parse_assembly(ir)
    has_calls = False
    for function in module.functions:
        if not function.is_declaration and function.name != symbol(name):
            function.linkage = llvm.Linkage.internal
            if b"noinline" in function.attributes:  # `native.inlining`
                has_calls = True
            else:
                function.add_function_attribute("alwaysinline")
    for variable in module.global_variables:
        if not variable.is_declaration:
            variable.linkage = llvm.Linkage.internal
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    # The kernels are vectorised by hand; doing it again only costs code and time.
    options.loop_vectorization = False
    options.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, options)
    manager = passes.getModulePassManager()
    if has_calls:  # none of which fails, as can be seen once what they call is inlined
        manager.add_ipsccp_pass()
        manager.add_simplify_cfg_pass()
        manager.add_global_dead_code_eliminate_pass()
    manager.run(module, passes)
    check(name, module)
    return module, machine


def check(name: str, module: Any) -> None:
    """Refuse code that could give other bits on another machine (contract 1), or jump to nowhere.

    MCJIT takes an unresolved symbol without a word and jumps to address 0; a libm function
    differs between systems; a fast-math flag or `fmuladd` lets LLVM order or fuse at will.
    """
    declared = [f.name for f in module.functions if f.is_declaration]
    foreign = [f for f in declared if not _ALLOWED.fullmatch(f)]
    if foreign:
        raise KernelBuildError(f"kernel {name} would call {', '.join(foreign)}")
    flagged = _FAST_MATH.search(str(module))
    if flagged:
        raise KernelBuildError(f"kernel {name} has a fast-math flag: {flagged[0].strip()}")


def check_symbols(name: str, data: bytes) -> None:
    """Refuse an object that calls what LLVM had no instructions for (`fmaf`, `memset`)."""
    try:
        foreign = undefined_symbols(data)
    except ValueError as error:
        raise KernelBuildError(f"kernel {name} can't be checked: {error}") from error
    if foreign:
        raise KernelBuildError(f"kernel {name} would call {', '.join(foreign)}")


def build(name: str, target: Target) -> bytes:
    """The object file of one kernel."""
    ir, native_name = kernel_ir(name, target.family)
    module, machine = optimise(ir, native_name, name, target)
    data: bytes = machine.emit_object(module)
    check_symbols(name, data)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description="Build CPU kernels into a folder.")
    parser.add_argument("folder", type=Path, help="-: into no file, but behind each name")
    parser.add_argument("names", nargs="*", help="none: one name a line from standard input")
    parser.add_argument("--family", default=None, help="instead of this machine exactly")
    parser.add_argument("--triple", help="with --cpu and --features: LLVM's names of a machine")
    parser.add_argument("--cpu", default="generic")
    parser.add_argument("--features", default="")
    parser.add_argument("--asm", action="store_true", help="print assembly instead")
    args = parser.parse_args()
    gc.disable()  # a tenth of the time
    target = Target(args.family, args.triple, args.cpu, args.features) if args.triple else None
    if target is None:
        target = _target_of(args.family)
    for i, name in enumerate(args.names or map(str.strip, sys.stdin), 1):
        if i % _COLLECTED == 0:
            gc.collect()
        if args.asm:
            module, machine = optimise(*kernel_ir(name, target.family), name, target)
            print(machine.emit_assembly(module))
        elif args.folder == Path("-"):
            print(name, build(name, target).hex(), flush=True)
        else:
            write_object(args.folder, name, build(name, target))
            print(name, flush=True)
        if not args.names and platform.rss() > _MOST_HELD:
            platform.begin_anew()  # the next name comes once this one was answered


def _target_of(family: str | None) -> Target:
    """Any machine of a family, of this processor's kind where it has such a family."""
    host = Target.host()
    if family is None or family == host.family:
        return host
    machines = [machine for machine, each in FAMILIES if each == family]
    if not machines:
        raise SystemExit(f"no family {family!r}")
    return Target.any(family, host.machine if host.machine in machines else machines[0])


if __name__ == "__main__":
    main()
