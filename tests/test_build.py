"""Building and loading kernels: contract 1 checked in their code, and a cache that can't hurt."""

from __future__ import annotations

import ast
import ctypes
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest

from edgeinfer.batch import StepLimits
from edgeinfer.errors import DeviceError
from edgeinfer.gguf import GGUFFile
from edgeinfer.kernels.cpu import build, builders, kept_objects, library, ready, soft_float
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.kernels.cpu.blueprint import Blueprint
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.object_files import undefined_symbols
from edgeinfer.kernels.cpu.ready import Ready
from edgeinfer.kernels.cpu.targets import TRIPLES, Target
from edgeinfer.model import Model, architectures

from . import native
from .golden_models import GOLDENS
from .models_for_tests import tiny_model

# One of every module, and what differs within it.
KERNELS = [*(name for name in ready.NAMES if not name.startswith("experts.")), "probe"]
KERNELS += [f"experts.{name}" for name in ("q4_0", "q6_k", "f16")]  # the tiles of matmul


def module_of(body: str, declare: str = "") -> llvm.ModuleRef:
    return llvm.parse_assembly(
        f"{declare}\ndefine float @f(float %x, float %y) {{\n{body}\nret float %z\n}}"
    )


def test_every_kernel_is_in_the_list() -> None:
    modules = {path.stem for path in (kept_objects._HERE / "native").glob("*.py")}
    parts = {
        "__init__", "simd", "words", "isa", "isa_aarch64", "registry", "fields", "floats",
        "formats", "blocks32", "blocks256", "blocks_table", "grid", "math", "activations", "sink",
        "pages", "attention", "attend_kv", "kv_store", "inlining", "operations", "runs",
    }  # fmt: skip
    assert {name.partition(".")[0] for name in KERNELS} == modules - parts


@pytest.mark.parametrize("module", sorted({name.partition(".")[0] for name in KERNELS}))
def test_a_kernels_key_covers_all_of_ours_that_its_sources_import(module: str) -> None:
    sources = kept_objects._sources(module)
    names = {path.stem for path in sources}
    for path in sources - set(kept_objects._BUILDER):
        if kept_objects._HERE not in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("edgeinfer"):
                own = {str(node.module).rpartition(".")[2], *(alias.name for alias in node.names)}
                assert own & names, f"{path.name} imports {node.module}"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["avx512", "vnni", "avx2", "generic", "neon"])
def test_every_kernel_obeys_contract_1(family: str, tmp_path: Path) -> None:
    """The builder refuses fast-math flags and calls outside its list, so building is the scan."""
    command = [sys.executable, "-m", "edgeinfer.kernels.cpu.build", "--family", family]
    done = subprocess.run(
        [*command, str(tmp_path), *KERNELS], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == KERNELS


@pytest.mark.parametrize("flag", ["fast", "reassoc", "contract", "nnan", "arcp", "afn nsz"])
def test_fast_math_is_refused(flag: str) -> None:
    module = module_of(f"%z = fadd {flag} float %x, %y")
    with pytest.raises(build.KernelBuildError, match="fast-math"):
        build.check("sample", module)


@pytest.mark.parametrize(
    ("name", "n"), [("llvm.fmuladd.f32", 3), ("expf", 1), ("llvm.exp.f32", 1), ("llvm.pow.f32", 2)]
)
def test_foreign_calls_are_refused(name: str, n: int) -> None:
    declare = f"declare float @{name}({', '.join(['float'] * n)})"
    module = module_of(f"%z = call float @{name}({', '.join(['float %x'] * n)})", declare)
    with pytest.raises(build.KernelBuildError, match=name):
        build.check("norm", module)


def test_exact_arithmetic_is_accepted() -> None:
    declare = "declare float @llvm.fma.f32(float, float, float)"
    build.check(
        "norm", module_of("%z = call float @llvm.fma.f32(float %x, float %y, float %x)", declare)
    )


def test_a_damaged_object_is_built_again(tmp_path: Path) -> None:
    target = Target.host()
    Library(target, tmp_path).load(["probe"])
    path = kept_objects.object_path(tmp_path, "probe")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert kept_objects.read_object(tmp_path, "probe") is None
    again = Library(target, tmp_path)
    again.load(["probe"])
    assert again.address("probe")
    assert kept_objects.read_object(tmp_path, "probe") is not None


def test_a_cut_object_counts_as_absent(tmp_path: Path) -> None:
    kept_objects.write_object(tmp_path, "probe", b"some machine code")
    path = kept_objects.object_path(tmp_path, "probe")
    assert kept_objects.read_object(tmp_path, "probe") == b"some machine code"
    for n in (0, 5, 32, len(path.read_bytes()) - 1):
        cut = path.read_bytes()[:n]
        path.write_bytes(cut)
        assert kept_objects.read_object(tmp_path, "probe") is None
        kept_objects.write_object(tmp_path, "probe", b"some machine code")


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    lib = Library(Target.host(), blocked / "kernels")
    lib.load(["probe"])
    assert lib.address("probe")
    assert not lib.is_cached


def test_a_kernel_that_does_not_exist_says_so(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="building CPU kernels failed"):
        Library(Target.host(), tmp_path).load(["nonsense"])


def test_what_lies_in_the_current_folder_does_not_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("edgeinfer", "numba", "argparse", "runpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    Library(Target.host(), tmp_path / "cache").load(["probe"])


def test_loading_ready_kernels_takes_no_numba() -> None:
    native.library().load(["norm", "team.work"])
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tests import native\n"
        "lib = native.library(); lib.load(['norm', 'team.work'])\n"
        "assert lib.address('norm'); print('numba' in sys.modules)"
    )
    root = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# -- ready kernels -------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path) -> Ready:
    """A file of two ready kernels for any machine of this one's family, read back."""
    host = Target.host()
    target = Target.any(host.family, host.machine, host.triple)
    objects = builders.build_objects(tmp_path / "objects", ["norm", "read"], target, None)
    ready.write(tmp_path, target, objects)
    return Ready.of(target, tmp_path)


def test_ready_kernels_are_taken_and_rebuilt_for_this_machine(
    shipped: Ready, tmp_path: Path
) -> None:
    lib = Library(Target.host(), tmp_path / "cache", shipped)
    lib.load(["norm", "read", "probe"])
    assert lib.origins == {"norm": "ready", "read": "ready", "probe": "built"}
    assert lib.rebuild() == 2
    again = Library(Target.host(), tmp_path / "cache", shipped)
    again.load(["norm", "read", "probe"])
    assert set(again.origins.values()) == {"cached"}
    assert library.kernels_here(Target.host(), tmp_path / "cache")["norm"] == "cached"


def test_damaged_or_stale_ready_kernels_count_as_absent(shipped: Ready) -> None:
    entry = shipped.entries["read"]
    assert shipped.read("read", entry.key) is not None
    assert shipped.read("read", None) is not None  # a frozen program has no sources to compare
    assert shipped.read("read", "of other sources") is None
    for at in range(0, len(shipped.data), 97):
        data = bytearray(shipped.data)
        data[at] ^= 0x10
        try:
            damaged = Ready.parse(bytes(data))
        except (ValueError, KeyError, TypeError):
            continue
        found = damaged.read("read", entry.key)
        assert found is None or found == shipped.read("read", entry.key)
    for n in range(0, len(shipped.data), 331):
        try:
            assert Ready.parse(shipped.data[:n]).read("read", entry.key) is None
        except (ValueError, KeyError, TypeError):
            continue


@pytest.mark.parametrize("wrong", ["-1", "true", "1.5", "1e999", '"1"'])
def test_no_number_of_bytes_in_ready_kernels_counts_as_absent(tmp_path: Path, wrong: str) -> None:
    for place in ("%s, 1", "1, %s"):
        manifest = f'{{"kernels": {{"read": ["key", "digest", {place % wrong}]}}}}'.encode()
        file = tmp_path / "x.kernels"
        file.write_bytes(ready._MAGIC + len(manifest).to_bytes(ready._LENGTH, "little") + manifest)
        assert Ready.open(file) == Ready()


def test_ready_kernels_cover_what_supported_models_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every architecture, rotation and weight type; heads as wide as in published models."""

    class Asked(Exception):
        pass

    def record(self: CpuBackend, names: set[str]) -> None:
        asked.update(names)
        raise Asked

    monkeypatch.setattr(CpuBackend, "load", record)
    limits = StepLimits(n_pages={0: 4}, max_rows=4, max_outputs=4, max_sequences=1, n_threads=1)
    asked: set[str] = set()
    for arch in ("llama", "qwen2", "qwen3"):
        for quant in ("F16", "Q4_0", "Q4_1", "Q4_K_M"):
            path = tiny_model(tmp_path, arch=arch, quant=quant, head_dim=64)
            with GGUFFile.open(path) as file:
                segment = Model.load(file).graph.segment()
                with pytest.raises(Asked):
                    CpuBackend(tmp_path).compile(segment, limits)
    assert {golden.arch for golden in GOLDENS.values()} == set(architectures())
    for golden in GOLDENS.values():
        with golden.draft().loaded(tmp_path) as model:
            segment = model.graph.segment()
            most = limits._replace(n_pages={window: 4 for window in segment.groups})
            names = Blueprint(segment, most).kernels()
            asked.update(name for name in names if not name.startswith("attend."))
    assert asked - {*ready.NAMES} == set()
    used = {name.partition(".")[0] for name in asked}
    plain = {"quantise", "norm_heads", "mul_parts"}  # that no such model needs
    assert {name.partition(".")[0] for name in ready.NAMES} - used <= plain


def test_a_frozen_program_says_which_kernels_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    lib = Library(Target.host(), tmp_path, Ready())
    with pytest.raises(DeviceError, match="frozen without the kernels norm .*wheel"):
        lib.load(["norm"])
    assert lib.inexact() == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
def test_a_system_that_forbids_generated_code_is_told_apart() -> None:
    native.library().load(["norm"])
    script = (
        "import ctypes, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests import native; from edgeinfer.errors import DeviceError\n"
        "print(ctypes.CDLL(None).prctl(65, 1, 0, 0, 0))  # PR_SET_MDWE\n"
        "try: native.library().load(['norm'])\n"
        "except DeviceError as error: print(error)"
    )
    root = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True)
    if done.stdout.startswith("-1"):
        pytest.skip("a kernel before Linux 6.3 can't forbid it to one process")
    assert "forbids generated code" in done.stdout, done.stderr
    assert done.returncode == 0


# -- objects for other systems -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("triple", "system"),
    [
        ("x86_64-unknown-linux-gnu", "linux"),
        ("aarch64-unknown-linux-musl", "linux"),
        ("arm64-apple-darwin24.1.0", "macos"),
        ("x86_64-pc-windows-msvc-elf", "windows"),
        ("x86_64-unknown-freebsd14.1", "other"),
    ],
)
def test_ready_kernels_are_found_by_system(triple: str, system: str) -> None:
    target = Target("generic", triple, "generic", "")
    machine = "x86_64" if triple[0] == "x" else "aarch64"
    assert ready.path(Path(), target).name == f"{system}-{machine}-generic.kernels"


def test_windows_gets_the_objects_that_llvm_can_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llvm, "get_process_triple", lambda: "x86_64-pc-windows-msvc")
    assert Target.host().triple == Target.any("avx2", "x86_64", TRIPLES["x86_64"][1]).triple


@pytest.mark.parametrize("triple", [triple for each in TRIPLES.values() for triple in each])
def test_calls_are_seen_in_the_objects_of_every_system(triple: str) -> None:
    machine = emitter("generic", triple)
    declare = "declare float @sinf(float)"
    calls = module_of("%z = call float @sinf(float %x)", declare)
    assert [name.lstrip("_") for name in undefined_symbols(machine.emit_object(calls))] == ["sinf"]
    plain = machine.emit_object(module_of("%z = fadd float %x, %y"))
    assert undefined_symbols(plain) == []
    with pytest.raises(ValueError, match="damaged"):
        undefined_symbols(plain[:40])


def test_objects_of_an_unknown_format_are_refused() -> None:
    data = emitter("generic", "x86_64-pc-windows-msvc").emit_object(
        module_of("%z = fadd float %x, %y")
    )
    with pytest.raises(build.KernelBuildError, match="can't be checked"):
        build.check_symbols("norm", data)


def emitter(family: str, triple: str) -> llvm.TargetMachine:
    target = Target.any(family, Target(family, triple, "", "").machine, triple)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=target.cpu, features=target.features, reloc="pic", codemodel="small"
    )


# -- what LLVM has no instructions for -----------------------------------------------------------


def test_an_object_that_calls_a_function_is_refused() -> None:
    machine = emitter("generic", TRIPLES["x86_64"][0])
    declare = "declare float @llvm.fma.f32(float, float, float)"
    module = module_of("%z = call float @llvm.fma.f32(float %x, float %y, float %x)", declare)
    with pytest.raises(build.KernelBuildError, match="fmaf"):
        build.check_symbols("norm", machine.emit_object(module))


def test_plain_arithmetic_converts_halves_like_numpy() -> None:
    ir = """
define void @f(ptr %x, ptr %y, ptr %z) {
  %a = load half, ptr %x
  %b = fpext half %a to float
  store float %b, ptr %y
  %c = load float, ptr %z
  %d = fptrunc float %c to half
  store half %d, ptr %x
  ret void
}"""
    module = llvm.parse_assembly(soft_float.without_fma(ir))
    assert not [f.name for f in module.functions if f.is_declaration]
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(module, machine)
    kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)(engine.get_function_address("f"))
    halves = np.arange(65536, dtype=np.uint16)
    floats = halves.view(np.float16).astype(np.float32)
    finite = floats[np.isfinite(floats)]
    near = np.concatenate([floats, np.nextafter(finite, np.float32(np.inf)), finite * 1.0004])
    near = near[~np.isnan(near)].astype(np.float32)
    with np.errstate(over="ignore"):
        rounded = near.astype(np.float16)
    for i, value in enumerate(near):
        x = np.array([halves[i & 0xFFFF]])
        y, z = np.zeros(1, np.float32), np.array([value])
        kernel(x.ctypes.data, y.ctypes.data, z.ctypes.data)
        assert y[0] == floats[i & 0xFFFF] or np.isnan(floats[i & 0xFFFF])
        assert x.view(np.float16)[0] == rounded[i]
