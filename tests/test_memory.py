"""Memory as the system grants it and as a plan promises it: limits, loading, building kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer import LLM, plan, platform
from edgeinfer.batch import StepLimits, StepRequest
from edgeinfer.engine.plan_rows import HostBytes, base_bytes
from edgeinfer.errors import Keyword, PlanError, memory_ran_out
from edgeinfer.gguf import GGUFFile, TensorBytes
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.kernels.cpu.blueprint import Blueprint
from edgeinfer.kernels.cpu.builders import BUILDER_BYTES, build_command, n_builders
from edgeinfer.kernels.cpu.program import CpuProgram
from edgeinfer.kernels.cpu.ready import NAMES
from edgeinfer.kernels.cpu.targets import Target
from edgeinfer.kernels.cpu.team import shared_team
from edgeinfer.kernels.cpu.weights import PackedWeights
from edgeinfer.load_settings import LoadSettings
from edgeinfer.model import Model
from edgeinfer.options import LoadOptions
from edgeinfer.quant import QUANT_TYPES, Weight
from edgeinfer.runtime import plan_model
from edgeinfer.text.footprint import text_bytes

from .bench.make_model import make_model
from .models_for_tests import tiny_model
from .native import cache_root, library

ROOT = Path(__file__).resolve().parent.parent
MiB = 1 << 20
ONLY_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


# -- what the system grants ----------------------------------------------------------------------


def system(root: Path, files: dict[str, str]) -> Path:
    """A root folder with these files below /proc and /sys."""
    for name, text in {"proc/meminfo": "MemAvailable: 1048576 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, **files: str) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/{folder}/{name.replace('_', '.', 1)}": text for name, text in files.items()
    }


OWN = {"proc/self/cgroup": "0::/user.slice/app.scope\n"}
STAT = "anon 100\ninactive_file 3000\nactive_file 2000\nfile_dirty 400\nfile_writeback 100\n"
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/d/c\n4:memory:/d/c\n1:name=systemd:/\n",
    "sys/fs/cgroup/memory/d/c/memory.limit_in_bytes": "9223372036854771712",
    "sys/fs/cgroup/memory/d/c/memory.usage_in_bytes": "50000",
    "sys/fs/cgroup/memory/d/memory.limit_in_bytes": "90000",
    "sys/fs/cgroup/memory/d/memory.usage_in_bytes": "60000",
    "sys/fs/cgroup/memory/d/memory.stat": "total_inactive_file 1000\ntotal_dirty 100\n",
    "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_quota_us": "100000",
    "sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_period_us": "100000",
    "sys/fs/cgroup/cpu,cpuacct/d/c/cpu.cfs_quota_us": "-1",
}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 1 << 30),
        (group(".", memory_max="9000", memory_current="2000"), 7000),
        (
            OWN | group("user.slice/app.scope", memory_max="9000", memory_current="8000"),
            1000,
        ),
        (
            OWN
            | group("user.slice", memory_max="5000", memory_current="4000")
            | group("user.slice/app.scope", memory_max="max", memory_current="8000"),
            1000,
        ),
        (OWN | group("user.slice", memory_high="5000", memory_current="4900"), 100),
        (group(".", memory_max="9000", memory_current="8900", memory_stat=STAT), 100 + 4500),
        (group(".", memory_max="9000", memory_current="9500"), 0),
        (V1, 30000 + 900),
        (
            {"proc/self/cgroup": "0::/../../other"}
            | group(".", memory_max="9000", memory_current="1"),
            8999,
        ),
        ({"proc/self/cgroup": "0::/not/here"} | group(".", memory_max="9", memory_current="1"), 8),
    ],
    ids=[
        "no cgroup", "root", "own slice", "parent", "high", "clean file pages", "more than allowed",
        "version 1", "outside of the namespace", "the host's path",
    ],
)  # fmt: skip
def test_memory_is_never_more_than_any_of_our_cgroups_grants(
    tmp_path: Path, files: dict[str, str], available: int
) -> None:
    assert platform.available_memory(system(tmp_path, files)) == available


@pytest.mark.parametrize("used", [None, "", "many"])
def test_a_limit_holds_where_nobody_tells_what_is_used(tmp_path: Path, used: str | None) -> None:
    limit = platform.rss() + (1 << 29)
    files = group(".", memory_max=str(limit), **({} if used is None else {"memory_current": used}))
    found = platform.available_memory(system(tmp_path, files))
    assert abs(found - limit + platform.rss()) < 64 << 20


GiB = 1 << 30
HOST_FREE = {"proc/meminfo": f"MemAvailable: {4 * GiB // 1024} kB\n"}
UNLIMITED_V1 = {
    "proc/self/cgroup": "4:memory:/d\n",
    "sys/fs/cgroup/memory/d/memory.limit_in_bytes": "9223372036854771712",
    "sys/fs/cgroup/memory/d/memory.usage_in_bytes": "50000",
}


@pytest.mark.parametrize(
    ("files", "budget"),
    [
        ({}, 3 * GiB),
        (group(".", memory_max="max", memory_current="2000"), 3 * GiB),
        (UNLIMITED_V1, 3 * GiB),
        (group(".", memory_max=str(2 * GiB), memory_current=str(GiB)), GiB - 2 * GiB // 10),
        (group(".", memory_max=str(9 * GiB), memory_current=str(GiB)), 3 * GiB),
        (group(".", memory_max=str(GiB), memory_current=str(GiB)), 0),
        (
            OWN
            | group("user.slice", memory_max=str(2 * GiB), memory_current=str(GiB))
            | group("user.slice/app.scope", memory_max=str(GiB), memory_current="0"),
            GiB - 2 * GiB // 10,
        ),
        (
            UNLIMITED_V1
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GiB),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GiB // 2),
            },
            GiB // 2 - GiB // 10,
        ),
    ],
    ids=[
        "no cgroup", "version 2, unlimited", "version 1, unlimited", "version 2", "more than free",
        "full", "nested", "version 1, its parent",
    ],
)  # fmt: skip
def test_a_budget_leaves_a_quarter_of_what_is_free_and_a_tenth_of_each_limit(
    tmp_path: Path, files: dict[str, str], budget: int
) -> None:
    root = system(tmp_path, HOST_FREE | files)
    assert platform.memory_budget(root=root) == budget
    held = 40 * MiB  # by this very process: it is to stay below the same limits with it
    more = platform.memory_budget(held, root) - budget
    assert more in (held, held * 3 // 4) or budget == more == 0


@pytest.mark.parametrize(
    "files",
    [
        OWN | group("user.slice", cpu_max="150000 100000"),
        OWN | group("user.slice/app.scope", cpu_max="1000 100000") | group(".", cpu_max="max 1"),
        V1,
    ],
)
def test_threads_are_never_more_than_any_of_our_cgroups_grants(
    tmp_path: Path, files: dict[str, str]
) -> None:
    root = system(tmp_path, files)
    assert platform.default_threads(root) == platform.usable_processors(root) == 1


JUNK = st.one_of(
    st.sampled_from(["", "max", "-1", "9" * 400, "1e9", "\0", "0::/\0", "::", "0", "٣", "5 0"]),
    st.text(max_size=12),
)
KERNEL_FILES = sorted({*OWN, *V1, "proc/meminfo", "proc/self/status"}) + [
    f"sys/fs/cgroup/{name}"
    for name in ("memory.max", "memory.high", "memory.current", "memory.stat", "cpu.max")
]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(KERNEL_FILES), JUNK))
def test_damaged_answers_of_the_system_count_as_none(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, str]
) -> None:
    root = tmp_path_factory.mktemp("root")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert platform.available_memory(root) >= 0
    assert platform.default_threads(root) >= 1


def test_memory_that_nobody_tells_of_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sysconf` says -1 where it knows the name, and not the number."""
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if "SIZE" in name else -1, raising=False)
    assert platform.available_memory(tmp_path) > 1 << 30


# -- limits of a process -------------------------------------------------------------------------

_UNDER_LIMITS = """
import resource, sys
sys.path.insert(0, {root!r})
from edgeinfer import DeviceError, LLM, PlanError
{warm}
def used(name):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(name))
which, field = resource.{limit}, {field!r}
for mib in {sizes}:
    before = resource.getrlimit(which)
    resource.setrlimit(which, (used(field) + (mib << 20), before[1]))
    try:
        with LLM({model!r}, threads=2, n_ctx=64) as llm:
            answer = "loaded"
    except PlanError as error:
        answer = "PlanError"
        assert error.available is not None, error
    except DeviceError as error:
        answer = "no thread" if "thread" in str(error) else repr(error)
    finally:
        resource.setrlimit(which, before)
    print(mib, answer, flush=True)
with LLM({model!r}, threads=2, n_ctx=64) as llm:
    print("free", len(llm.generate("a", max_tokens=1).token_ids), flush=True)
"""


def under_limits(model: Path, limit: str, field: str, sizes: list[int], warm: str) -> list[str]:
    """What loading gave with so many MiB left, in one process, and that it works without limits."""
    code = _UNDER_LIMITS.format(
        root=str(ROOT), model=str(model), limit=limit, field=field, sizes=sizes, warm=warm
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout.splitlines()


@ONLY_LINUX
@pytest.mark.parametrize(("limit", "field"), [("RLIMIT_AS", "VmSize:"), ("RLIMIT_DATA", "VmData:")])
def test_a_limit_of_the_process_is_a_plan_error(tmp_path: Path, limit: str, field: str) -> None:
    sizes = [1, 40, 95, 130, 4000]
    lines = under_limits(tiny_model(tmp_path), limit, field, sizes, warm="")
    assert lines[0] == "1 PlanError" and lines[-2:] == ["4000 loaded", "free 1"]


@ONLY_LINUX
@pytest.mark.slow
@pytest.mark.parametrize("warm", ["", "LLM({model!r}, n_ctx=64).close()"])
@pytest.mark.parametrize(("limit", "field"), [("RLIMIT_AS", "VmSize:"), ("RLIMIT_DATA", "VmData:")])
def test_every_limit_of_the_process_is_a_plan_error(
    tmp_path: Path, limit: str, field: str, warm: str
) -> None:
    model = tiny_model(tmp_path)
    sizes = [*range(0, 300, 3), 4000]
    lines = under_limits(model, limit, field, sizes, warm.format(model=str(model)))
    assert lines[0] == "0 PlanError" and lines[-1] == "free 1"


# -- what a plan promises ------------------------------------------------------------------------

_LOAD_AND_RUN = """
import sys
sys.path.insert(0, {root!r})
from edgeinfer import LLM
with LLM({model!r}, threads=2, n_ctx=512) as llm:
    llm.generate([1 + i % 90 for i in range(300)], max_tokens=4, temperature=0.8, seed=1)
    status = open("/proc/self/status").read().split()
    print(llm.plan.total_bytes, int(status[status.index("VmHWM:") + 1]) << 10)
"""


def promised_and_taken(model: Path) -> tuple[int, int]:
    """The plan's bytes, and the most that a process held which loaded and ran the model."""
    code = _LOAD_AND_RUN.format(root=str(ROOT), model=str(model))
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    promised, taken = map(int, done.stdout.split())
    print(f"{model.stem}: plan {promised / MiB:.0f} MiB, peak {taken / MiB:.0f} MiB")
    return promised, taken


_WIDE = dict(dim=1024, n_heads=16, n_kv_heads=4, head_dim=64, ffn_dim=3072, n_layers=4)
_SMALL = dict(dim=256, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=512, n_layers=2)
LARGE: list[dict[str, Any]] = [
    *(dict(quant=quant, vocab=150_000, **_WIDE) for quant in ("F16", "Q8_0", "Q4_0", "Q6_K")),
    *(dict(quant=quant, vocab=150_000, tied=True, **_WIDE) for quant in ("F16", "BF16", "Q4_K_M")),
    dict(quant="F32", vocab=100_000, **_WIDE),
    dict(quant="Q8_0", vocab=260_000, tied=True, **_WIDE),
    *(dict(quant=quant, vocab=32_000, **_WIDE) for quant in ("Q4_1", "Q5_1", "MXFP4", "F16")),
    dict(quant="Q4_0", vocab=32_000, arch="qwen3", **{**_WIDE, "n_layers": 16}),
    dict(quant="F16", vocab=50_257, **{**_WIDE, "dim": 1020, "head_dim": 100}),
]


@ONLY_LINUX
@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
def test_the_peak_is_never_above_the_plan(tmp_path: Path, quant: str) -> None:
    """One tensor has most of the bytes."""
    model = make_model(tmp_path / "m.gguf", quant=quant, vocab=60_000, tied=True, **_SMALL)
    promised, taken = promised_and_taken(model)
    assert taken <= promised


@ONLY_LINUX
@pytest.mark.slow
@pytest.mark.parametrize("options", LARGE, ids=lambda o: f"{o['quant']}-{o['vocab']}")
def test_the_peak_is_never_above_the_plan_of_any_of_these(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    name = f"{options['quant']}-{options['vocab']}{'-tied' * options.get('tied', False)}"
    promised, taken = promised_and_taken(make_model(tmp_path / f"{name}.gguf", **options))
    assert taken <= promised


_EXPERTS = dict(arch="qwen3moe", n_experts=9, n_used=3, **{**_SMALL, "ffn_dim": 256})


PLANNED: list[tuple[dict[str, Any], LoadOptions]] = [
    (dict(quant="Q4_0", **_SMALL), {"n_ctx": 131_072, "threads": 1}),
    (dict(quant="Q4_K_M", **_SMALL), {"n_ctx": 32_768, "slots": 8, "threads": 2}),
    (dict(quant="Q8_0", tied=True, arch="qwen3", **_SMALL), {"n_ctx": 100, "threads": 2}),
    (dict(quant="F16", vocab=60_001, **_SMALL), {"n_ctx": 8192, "slots": 4, "threads": 3}),
    (dict(quant="MXFP4", **{**_SMALL, "n_layers": 9}), {"slots": 300, "n_ctx": 33}),
    (dict(quant="Q6_K", **{**_SMALL, "n_kv_heads": 4}), {"device": "reference"}),
    (dict(quant="Q4_K", **_EXPERTS), {"n_ctx": 500, "threads": 2}),
]


@pytest.mark.parametrize(("shape", "options"), PLANNED, ids=str)
def test_what_is_reserved_is_what_was_planned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: dict[str, Any],
    options: LoadOptions,
) -> None:
    """To the byte, on the CPU; what is only touched for a time (portions of a file) is not kept."""
    kept: list[platform.Memory] = []

    class Memory(platform.Memory):
        def __init__(self, n_bytes: int, *, huge: bool = False) -> None:
            super().__init__(n_bytes, huge=huge)
            kept.append(self)

        def close(self) -> None:
            super().close()
            if self in kept:
                kept.remove(self)

    monkeypatch.setattr(platform, "Memory", Memory)
    path = make_model(tmp_path / "m.gguf", **shape)
    with LLM(path, **options) as llm:
        planned = {name for name in llm.plan.rows if name.startswith("weights ")}
        rows, program = llm.plan.rows, llm.runtime.program
        if isinstance(program, CpuProgram):
            pages = rows["KV cache"] + rows.get("prefix pages", 0)
            weights, scratch = sum(rows[name] for name in planned), rows["scratch"] + rows["logits"]
            assert sum(program.memory.values()) == weights + pages + scratch
            *small, c, b, a = sorted(memory.n_bytes for memory in kept)
            assert sorted((a, b, c)) == sorted((weights, pages, scratch))
            assert sum(small) < MiB  # lists of what to run, and what threads share
        else:
            assert program.step_weight_bytes == rows["weights F32"] and not kept
        again = plan(path, **options).rows  # the kernels are built by now
        assert again == {name: llm.plan.rows[name] for name in again}


@pytest.fixture
def no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests have imported what a full-screen chat takes memory for."""
    monkeypatch.delitem(sys.modules, "textual", raising=False)


@pytest.mark.usefixtures("no_screen")
@pytest.mark.parametrize("slots", [1, 3])
def test_a_tenth_less_than_fits_is_refused_with_settings_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Before a tensor was read or memory reserved; each of the settings then loads and answers."""
    path = make_model(
        tmp_path / "m.gguf", quant="Q4_0", **_SMALL | {"n_kv_heads": 4, "n_layers": 8}
    )
    for kv_type in ("f16", "q8_0"):
        LLM(path, n_ctx=64, threads=1, kv_type=kv_type).close()  # its kernels are there from now on
    given: LoadOptions = {"n_ctx": 4096 if slots > 1 else 8192, "slots": slots, "threads": 1}
    least = plan(path, kv_type="q8_0", **given)
    spare = least.rows.get("prefix pages", 0)
    with monkeypatch.context() as context, pytest.raises(PlanError) as caught:
        context.setattr(platform, "Memory", None)
        context.setattr(TensorBytes, "read_into", None)
        LLM(path, memory=(least.total_bytes - spare) * 9 // 10, **given)
    named = [each for each in caught.value.advice if isinstance(each, Keyword)]
    assert [each.name for each in named][:1] == ["n_ctx"] and len(named) == 2
    for name, value in named:
        memory = (least.total_bytes - spare) * 9 // 10
        options: Any = {"memory": memory, **given, name: value}
        with LLM(path, **options) as llm:
            assert llm.plan.total_bytes <= llm.plan.available
            assert len(llm.generate([3] * 20, max_tokens=4).token_ids) > 0


class Counted:
    """Bytes of a file that notes how many are asked for at a time."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes, self.asked = n_bytes, list[int]()

    def __len__(self) -> int:
        return self.n_bytes

    def __getitem__(self, part: slice) -> memoryview:
        raise AssertionError("the whole matrix was asked for")

    def read_into(self, buffer: memoryview, start: int) -> None:
        assert start == sum(self.asked)
        self.asked.append(len(buffer))


def test_no_more_of_a_matrix_is_in_memory_twice_than_a_portion() -> None:
    half = next(kind for kind in QUANT_TYPES.values() if kind.name == "F16")
    n_rows, n_cols = 20_003, 1024
    data = Counted(2 * n_rows * n_cols)
    weights = PackedWeights([Weight("w", (n_rows, n_cols), half, data)], [])
    weights.reserve()
    kernels = library()
    kernels.load(["pack.f16"])
    weights.pack(shared_team(kernels, 2), kernels, 2, lambda *_: None)
    weights.close()
    assert sum(data.asked) == len(data)
    assert max(data.asked) <= 16 * MiB


# -- building kernels ----------------------------------------------------------------------------


def test_the_kernels_of_a_plan_are_those_that_load(tmp_path: Path) -> None:
    with GGUFFile.open(tiny_model(tmp_path, arch="qwen3", quant="Q4_K_M")) as file:
        segment = Model.load(file).graph.segment()
        backend = CpuBackend(cache_root())
        limits = StepLimits({0: 2}, 4, 4, 1, 1)
        with backend.compile(segment, limits):
            assert set(backend.library.origins) == Blueprint(segment, limits).kernels()
        assert backend.demand(segment, StepRequest(64, 1, 1)).building_bytes == 0


@pytest.mark.usefixtures("no_screen")
def test_building_is_planned_and_takes_no_more_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path / "empty"))
    with GGUFFile.open(tiny_model(tmp_path, head_dim=24)) as file:
        model = Model.load(file)
        host = HostBytes(text_bytes(file.metadata).kept)
        code = plan(file.path, n_ctx=64).rows["code"]
        least = base_bytes(host) + code + BUILDER_BYTES
        fits = LoadSettings.resolve("plan", {"memory": least, "n_ctx": 64})
        needed = plan_model(model, fits)
        assert needed.total_bytes == least and needed.fits
        with pytest.raises(PlanError, match="warmup"):
            plan_model(model, fits._replace(memory=least - 1))
    assert [n_builders(99, n * BUILDER_BYTES) for n in (0, 1)] == [1, 1]
    assert n_builders(99, 100 * BUILDER_BYTES) == n_builders(99, None) <= 8
    assert n_builders(1, None) == 1


def test_no_more_processes_build_than_processors_are_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a large machine a container may have half a processor."""
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(platform, "usable_processors", lambda: 1)
    assert n_builders(99, None) == 1


@pytest.mark.usefixtures("no_screen")
@pytest.mark.parametrize("where", [{}, {"device": "shim", "gpu_layers": 1}], ids=str)
def test_more_memory_never_refuses_what_less_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: dict[str, Any]
) -> None:
    """With kernels to build, by as many processes as there is memory for beside their code."""
    if where and shutil.which("g++") is None:
        pytest.skip("no g++ to compile kernels for processors")
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(platform, "usable_processors", lambda: 8)
    path = tiny_model(tmp_path, head_dim=24)
    code = plan(path, n_ctx=64, **where).rows["code"]

    def taken(memory: int) -> int | None:
        try:
            return plan(path, n_ctx=64, memory=memory, **where).host.total_bytes
        except PlanError:
            return None

    with pytest.raises(PlanError) as caught:  # of one process
        plan(path, n_ctx=64, memory=1024, **where)
    least = caught.value.needed
    assert least
    for n_builders_more in range(4):
        for at in (-code, -1, 0, 1, code // 2, code - 1, code, 30 * MiB):
            memory = least + n_builders_more * BUILDER_BYTES + at
            found = taken(memory)
            assert found is None and memory < least or found is not None and found <= memory


@ONLY_LINUX
@pytest.mark.slow
@pytest.mark.parametrize("family", [None, "avx2", "generic"])
def test_a_builder_of_all_kernels_takes_no_more_than_planned(
    tmp_path: Path, family: str | None
) -> None:
    command = build_command(tmp_path, Target.host(family))
    job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdin is not None and job.stdout is not None
    with job:
        for name in NAMES:
            job.stdin.write(name + "\n")
            job.stdin.flush()
            assert job.stdout.readline().strip() == name
        job.stdin.close()
        _, job.returncode, usage = os.wait4(job.pid, 0)
    peak = usage.ru_maxrss << 10  # of all programs that the process has been
    print(f"{family}: {peak / MiB:.0f} MiB")
    assert peak <= BUILDER_BYTES


def test_memory_that_ran_out_is_seen_behind_what_a_library_says_of_it() -> None:
    def raised(inner: Exception, *, hides: bool = False) -> Exception:
        try:
            try:
                raise inner
            except Exception as error:
                raise OSError("could not be found or loaded") from (None if hides else error)
        except OSError as error:
            return error

    unmapped = OSError("libllvmlite.so: failed to map segment from shared object")
    assert memory_ran_out(raised(unmapped)) and memory_ran_out(raised(MemoryError()))
    assert not memory_ran_out(raised(unmapped, hides=True))
    assert not memory_ran_out(raised(OSError("no such file")))
