"""What all tests share: where the data that is too large for the repository lies.

Knows nothing of any one test.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from edgeinfer.graph import Segment

    from .server_for_tests import Running

# A job started in the background inherits that interrupts are ignored, and so would the programs
# that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# NumPy's library spins in a thread for each processor, and what our tests multiply is small.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Processes that run tests side by side share the processors; teams of two threads are left.
_n_processes, _n_cores = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), os.cpu_count() or 1
if _n_processes > 1 and _n_cores > 2:
    os.environ.setdefault("EDGEINFER_THREADS", str(max(2, _n_cores // _n_processes)))

# A run says of a change what the run before it would have said. Other draws are for whoever looks
# for more: HYPOTHESIS_PROFILE=search pytest ..., as often as there is time. How long one takes says
# what else the machine does.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", _PATIENT, derandomize=True)
settings.register_profile("search", _PATIENT, derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

_REPOSITORY = Path(__file__).resolve().parent.parent


def shared_data() -> Path | None:
    """The folder of shared test data, None where there is none."""
    named = os.environ.get("EDGEINFER_TEST_DATA")
    folder = Path(named) if named else _REPOSITORY.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """`data_file("vocab/x.gguf")`: that file of the shared data; the test is skipped without it."""

    def find(name: str) -> Path:
        folder = shared_data()
        if folder is None or not (folder / name).exists():
            pytest.skip(f"no {name}: set EDGEINFER_TEST_DATA to a folder that holds it")
        return folder / name

    return find


@pytest.fixture(scope="session", autouse=True)
def kernels_are_built_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    from .builder import kernels_built_once

    folder = tmp_path_factory.getbasetemp()
    is_one_of_many = hasattr(request.config, "workerinput")  # as pytest-xdist's processes are
    with kernels_built_once((folder.parent if is_one_of_many else folder) / "building"):
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that all its tests share."""
    from .server_for_tests import running, small_model

    path = small_model(tmp_path_factory.mktemp("server"))
    with running([("tiny", path)], ping_seconds=0.3) as found:
        yield found


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Segment]]:
    """A model of each kind of what is kept of a sequence: all pages, the last ones, states."""
    from .golden_models import GOLDENS
    from .test_windows import segment

    with GOLDENS["qwen35"].draft().loaded(tmp_path_factory.mktemp("hybrid"), "Q8_0") as model:
        yield {
            "full": segment(0), "windows": segment(0, 40, 40), "hybrid": model.graph.segment()
        }  # fmt: skip
