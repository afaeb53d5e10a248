"""The facts about this machine, and what the commands about models print."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import platform
from edgeinfer.cli import doctor
from edgeinfer.cli.fact_lines import fact_lines
from edgeinfer.cli.gpu_advice import gpu_advice
from edgeinfer.cli.main import main
from edgeinfer.platform import CudaDriver, Gpu

from .models_for_tests import tiny_model


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path / "ours"))
    monkeypatch.setattr("edgeinfer.config.model_folders", dict)
    return tmp_path / "ours"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    out, err = capsys.readouterr()
    assert isinstance(exit.value.code, int)
    return exit.value.code, out, err


def test_doctor_knows_this_machine_within_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 0 and time.perf_counter() - start < 300  # of a busy machine, too
    facts = json.loads(out)
    sections = ["edgeinfer", "python", "platform", "cpu", "memory", "gpu", "kernels", "models"]
    assert list(facts) == [*sections, "advice"]
    assert facts["cpu"]["family"] and facts["cpu"]["llvm_name"]
    assert facts["cpu"]["read_gb_s"] > 0
    assert facts["memory"]["available_bytes"] > 0
    assert facts["models"]["default_model"] is False


def test_doctor_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "doctor")
    assert code == 0 and "free disk: " in out and "advice" in out
    assert_reads_well(out)


def assert_reads_well(text: str) -> None:
    """No key of a program, no value as Python writes it, no count of bytes."""
    for line in text.splitlines():
        label, _, value = line.strip().partition(": ")
        assert not re.search(r"_bytes|\bn |gb s|[{}\[\]]", label), line
        assert value not in ("True", "False", "None", "-") and not re.fullmatch(r"\d{5,}", value), (
            line
        )


def test_what_few_machines_have_reads_well() -> None:
    gpu = {"name": "Orin", "compute_capability": "8.7", "memory_bytes": 8 * 10**9}
    facts = {
        "driver": "runs CUDA up to 12.6", "error": None, "devices": [gpu, gpu],
        "install": "pip install 'x'", "folders": {"/a\x1b[1m": 1, "/b": 2}, "n_params": 7 * 10**9,
    }  # fmt: skip
    lines = fact_lines(facts)
    assert "devices: Orin, compute capability 8.7, 8.00 GB; Orin, compute" in "\n".join(lines)
    assert ["  /a: 1 model", "  /b: 2 models", "parameters: 7.00 billion"] == lines[-3:]


def test_info_reads_well(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tiny_model(tmp_path, n_ctx=128)
    code, out, _ = call(capsys, "info", str(path))
    assert code == 0 and "\nruns: yes\n" in out and "\nlicence: not named\n" in out
    assert_reads_well(out.partition("file: ")[0] + out.partition("\narchitecture")[2])
    path.write_bytes(path.read_bytes().replace(b"llama", b"lhama"))
    assert "\nruns: no; architecture 'lhama'" in call(capsys, "info", str(path))[1]


@pytest.mark.parametrize(("version", "extra"), [(12040, "cuda12x"), (13010, "cuda13x")])
def test_the_command_for_the_gpu(monkeypatch: pytest.MonkeyPatch, version: int, extra: str) -> None:
    driver = CudaDriver(version, (Gpu("Orin", "8.7", 8 << 30),))
    monkeypatch.setattr(platform, "cuda_driver", lambda: driver)
    needs = [f"cupy-{extra}>=14; extra == '{extra[:-1]}'", "numpy"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needs)
    gpu = doctor._gpu()
    assert gpu["install"].endswith(f"-m pip install 'cupy-{extra}>=14'") and gpu["auto"] is None
    assert gpu["devices"][0]["compute_capability"] == "8.7"
    monkeypatch.setattr("edgeinfer.device.has_cupy", lambda: True)
    gpu = doctor._gpu()
    assert gpu["install"] is None and gpu["auto"] == gpu["fast_numerics"] == ["cuda:0"]
    assert "taken by --device auto, the later ones where a model needs them: cuda:0" in fact_lines(
        gpu
    )


@pytest.mark.parametrize("driver", [None, CudaDriver(11040, ()), CudaDriver(13000, (), 100)])
def test_no_usable_gpu_needs_no_command(
    monkeypatch: pytest.MonkeyPatch, driver: CudaDriver | None
) -> None:
    monkeypatch.setattr(platform, "cuda_driver", lambda: driver)
    assert doctor._gpu()["install"] is None


ORIN, PASCAL = Gpu("Orin", "8.7", 8 << 30), Gpu("GTX 1080", "6.1", 8 << 30)
KEPLER = Gpu("GTX 780", "3.5", 3 << 30)


@pytest.mark.parametrize(
    ("driver", "cupys", "nvrtcs", "said"),
    [
        (CudaDriver(12040, (ORIN,)), [12], [12], []),
        (CudaDriver(13000, (ORIN,)), [12], [13, 12], []),
        (CudaDriver(13000, (PASCAL,)), [12], [12], []),
        (CudaDriver(12040, (ORIN,)), [], [], []),  # the facts say what to install
        (None, [], [], []),
        (None, [12], [12], ["cupy-cuda12x is here, and no NVIDIA GPU"]),
        (CudaDriver(13000, (), 100), [13], [13], ["cupy-cuda13x is here, and no NVIDIA GPU"]),
        (CudaDriver(11040, (ORIN,)), [12], [12], ["Orin is not used: .*11.4, .*update the driver"]),
        (CudaDriver(12040, (KEPLER,)), [], [], ["GTX 780 is not used: .*3.5, 6.1 is needed"]),
        (CudaDriver(12040, (), 804), [12], [12], [r"the NVIDIA driver fails \(error 804\)"]),
        (CudaDriver(12040, (ORIN,)), [12], [], ["no NVRTC of CUDA 12 .* install"]),
        (CudaDriver(12040, (ORIN,)), [13], [13], ["13, .* up to 12.4: uninst.*12x", "no NVRTC"]),
        (CudaDriver(13000, (ORIN,)), [12, 13], [13], ["12x and cupy-cuda13x are both"]),
        (CudaDriver(13000, (PASCAL,)), [13], [13], ["GTX 1080 needs CUDA 12.*cupy-cuda12x"]),
    ],
)
def test_what_keeps_a_gpu_from_being_used(
    monkeypatch: pytest.MonkeyPatch,
    driver: CudaDriver | None,
    cupys: list[int],
    nvrtcs: list[int],
    said: list[str],
) -> None:
    found = [platform.NvrtcLibrary(Path("nvrtc"), cuda) for cuda in nvrtcs]
    names = [f"cupy-cuda{cuda}x" for cuda in cupys]
    needs = [f"cupy-cuda{cuda}x>=14; extra == 'cuda{cuda}'" for cuda in (12, 13)]
    monkeypatch.setattr(platform, "cuda_driver", lambda: driver)
    monkeypatch.setattr(platform, "nvrtc_libraries", lambda: found)
    monkeypatch.setattr("edgeinfer.device.has_cupy", lambda: bool(cupys))
    monkeypatch.setattr("edgeinfer.cli.gpu_advice._is_installed", names.__contains__)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needs)
    lines = list(gpu_advice())
    assert len(lines) == len(said), lines
    for line, part in zip(lines, said, strict=True):
        assert re.search(part, line), line


def test_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "can_run_generated_code", lambda: False)
    monkeypatch.setattr(platform, "is_writable", lambda folder: False)
    monkeypatch.setattr(platform, "available_memory", lambda: 200 << 20)
    monkeypatch.setattr(platform, "memory_budget", lambda: 150 << 20)
    text = "\n".join(doctor.examine()["advice"])
    for part in ("--device reference", "EDGEINFER_HOME", "memory is short"):
        assert part in text


def test_list_and_cache_and_rm(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert "edgeinfer pull smollm2" in call(capsys, "list")[2]
    assert "qwen3-4b" in call(capsys, "list", "--all")[1]
    model = home / "data/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"GGUF" + bytes(100))
    (model.parent / "x.gguf.abc.part").write_bytes(b"half")
    kernels = home / "cache/kernels/x/k.o"
    kernels.parent.mkdir(parents=True)
    kernels.write_bytes(bytes(1000))
    listed = json.loads(call(capsys, "list", "--json")[1])
    assert [m["name"] for m in listed["models"]] == ["smollm2"] and listed["pull"] == []
    assert "unfinished" in call(capsys, "cache")[1]
    cached: dict[str, Any] = json.loads(call(capsys, "cache", "--json")[1])
    assert cached["folders"][str(home / "cache")] == 1000
    cleared: dict[str, Any] = json.loads(call(capsys, "cache", "--clear", "--json")[1])
    assert cleared == {
        "folders": {**cached["folders"], str(home / "cache"): 0, str(home / "data/models"): 104},
        "unfinished": [],
    }
    assert not kernels.exists() and [p.name for p in model.parent.iterdir()] == [model.name]
    assert call(capsys, "rm", "smolm2")[0] == 1
    assert call(capsys, "rm", "smollm2")[0] == 0
    assert not model.parent.exists()
