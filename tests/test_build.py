"""Building and loading kernels: contract 1 checked in their code, and a cache that can't hurt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cpu import build, library
from edgeinfer.kernels.cpu.formats import FORMATS
from edgeinfer.kernels.cpu.library import Library, Target

from . import native

KERNELS = [
    *(f"{op}.{name}" for op in ("matmul", "pack", "embed") for name in FORMATS),
    *("norm", "swiglu", "quantise", "copy_rows", "angles", "rotate.norm", "rotate.neox"),
    *("plan_attention", "attend.64.64", "attend.128.128", "fold", "sample", "read", "probe"),
    *("team.work", "team.step"),
]


def module_of(body: str, declare: str = "") -> llvm.ModuleRef:
    return llvm.parse_assembly(
        f"{declare}\ndefine float @f(float %x, float %y) {{\n{body}\nret float %z\n}}"
    )


def test_every_kernel_is_in_the_list() -> None:
    modules = {path.stem for path in (library._HERE / "native").glob("*.py")}
    parts = {
        "__init__", "simd", "isa", "registry", "fields", "formats", "blocks32", "blocks256",
        "math", "sink", "pages", "attention",
    }  # fmt: skip
    assert {name.partition(".")[0] for name in KERNELS} == modules - parts


@pytest.mark.slow
@pytest.mark.parametrize("family", ["avx512", "vnni", "avx2", "generic"])
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
    path = library.object_path(tmp_path, "probe")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert library.read_object(tmp_path, "probe") is None
    again = Library(target, tmp_path)
    again.load(["probe"])
    assert again.address("probe")
    assert library.read_object(tmp_path, "probe") is not None


def test_a_cut_object_counts_as_absent(tmp_path: Path) -> None:
    library.write_object(tmp_path, "probe", b"some machine code")
    path = library.object_path(tmp_path, "probe")
    assert library.read_object(tmp_path, "probe") == b"some machine code"
    for n in (0, 5, 32, len(path.read_bytes()) - 1):
        cut = path.read_bytes()[:n]
        path.write_bytes(cut)
        assert library.read_object(tmp_path, "probe") is None
        library.write_object(tmp_path, "probe", b"some machine code")


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
