"""The test suites that OpenAI and Anthropic publish with their clients, run against the server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from .server_for_tests import Running, running, small_model

pytestmark = [pytest.mark.slow, pytest.mark.network]
NEEDED = (
    "pytest", "pytest-asyncio", "respx", "inline-snapshot", "http-snapshot", "dirty-equals",
    "time-machine", "hatchling", "hatch-fancy-pypi-readme",
)  # fmt: skip


class Suite(NamedTuple):
    """Files of a client's suite, which of their tests are of endpoints that are here, and those
    that fail because the server refuses what they ask for, with the reason."""

    package: str
    version: str
    path: str  # behind the server's address
    files: tuple[str, ...]
    chosen: str
    refused: dict[str, str]


SUITES = [
    Suite(
        "openai",
        "3.57.0",
        "/v1",
        (
            "chat/test_completions.py", "test_completions.py", "test_models.py",
            "test_responses.py", "responses/test_input_tokens.py", "test_embeddings.py",
        ),
        "create or count or (Models and (list or retrieve))",
        {
            "test_responses.py create_with_all_params": "previous_response_id: nothing is stored",
            "responses/test_input_tokens.py count_with_all_params": "previous_response_id",
            "test_completions.py create_with_all_params": "suffix; echo with logprobs",
            # The client asks for base64, and with strict types takes that for an error.
            "test_embeddings.py create": "base64, as asked for",
            "test_embeddings.py raw_response_create": "base64, as asked for",
            "test_embeddings.py streaming_response_create": "base64, as asked for",
        },
    ),
    Suite(
        "anthropic",
        "2.14.0",
        "",
        ("test_messages.py", "test_models.py"),
        "create or stream or count_tokens or list or retrieve",
        {"test_messages.py create_with_all_params": "a strict tool by a schema that is none"},
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = small_model(tmp_path_factory.mktemp("suites"))
    with running([("tiny", path)], load={"device": "cpu", "slots": 4, "pooling": "mean"}) as found:
        yield found


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.package)
def test_a_suite_passes(served: Running, tmp_path: Path, suite: Suite) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pinned = f"{suite.package}=={suite.version}"
    extra = f"{suite.package}[aiohttp]=={suite.version}"
    run(python, "-m", "pip", "install", "-q", extra, *NEEDED)
    flags = ("--no-binary", ":all:", "--no-deps", "--no-build-isolation")
    run(python, "-m", "pip", "download", "-q", *flags, "-d", str(tmp_path), pinned)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    folder = archive.with_name(archive.name.removesuffix(".tar.gz"))
    files = [f"tests/api_resources/{name}" for name in suite.files]
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-o", "addopts=", *files, "-k", suite.chosen, "--tb=no"],
        cwd=folder,
        env={**os.environ, "TEST_API_BASE_URL": served.url + suite.path},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    named = (
        r"^FAILED tests/api_resources/(\S+\.py)::\w+::test_(?:method_)?(\w+?)(?:_overload_\d)?\["
    )
    failed = {" ".join(found) for found in re.findall(named, done.stdout, re.M)}
    print(done.stdout[-2000:], file=sys.stderr)
    assert " passed" in done.stdout
    assert failed == set(suite.refused)


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, timeout=900)
