"""Plans beside what processes hold that load a model so, fill its context and go on for long."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgeinfer.gguf import GGUFFile
from edgeinfer.text.footprint import text_bytes

from .bench.bench_plan import HEADER, ROOT, line, measure
from .bench.make_model import LLAMA_1B, make_model
from .golden_models import GOLDENS, Draft
from .models_for_tests import tiny_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
MiB = 1 << 20
_GROWTH = MiB  # Python's own heap moves by that much
_TOKEN_BYTES = (
    256  # of an answer, held while it runs: its ids as Python's integers, its text in pieces
)


def check(name: str, model: Path, more: int = 0, **options: Any) -> None:
    held = measure(model, more, **options)
    print(HEADER, line(name, held), sep="\n")
    assert held.is_kept and held.is_close, line(name, held)
    assert held.grown <= _GROWTH + _TOKEN_BYTES * more, line(name, held)


def test_a_filled_context_takes_what_was_planned_and_no_more_after(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, n_ctx=8192)
    check("tiny, 4 slots", model, 1500, n_ctx=512, slots=4, threads=2)


# The 8 configurations: a name, what writes the model, and how it is loaded.
CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    ("135M", dict(n_ctx=512)),
    ("135M", dict(n_ctx=8192, kv_type="q8_0")),
    ("135M", dict(n_ctx=1024, slots=16, kv_type="q4_0")),
    ("1B", dict(n_ctx=2048)),
    ("1B", dict(n_ctx=512, slots=16, kv_type="q8_0")),
    ("gemma3", dict(n_ctx=4096, slots=4)),
    ("gemma3", dict(n_ctx=8192, kv_type="q4_0")),
    ("qwen35", dict(n_ctx=4096, slots=4)),
]
_MORE = 10_000  # tokens after that


_TWO = """
import sys
from edgeinfer import LLM, platform
from tests.bench.bench_plan import BUILDING, _peak
with LLM(sys.argv[1], n_ctx=512, threads=2) as one, LLM(sys.argv[2], n_ctx=512, threads=2) as two:
    for turn in range(3):
        for llm in (one, two):
            prompt = [3 + (i + turn) % 200 for i in range(480)]
            stream = llm.stream(prompt, max_tokens=24, seed=turn)
            (two if llm is one else one).generate(prompt[:200], max_tokens=24, seed=turn)
            list(stream)
    plans = [llm.plan.total_bytes - llm.plan.rows.get(BUILDING, 0) for llm in (one, two)]
    print(sum(plans), _peak())
"""


def test_two_models_in_a_process_take_no_more_than_both_plans(tmp_path: Path) -> None:
    paths = [
        with_tokens(GOLDENS[name].draft(), tmp_path / f"{name}.gguf")
        for name in ("gemma3", "qwen35")
    ]
    run = [sys.executable, "-c", _TWO, *map(str, paths)]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT)
    planned, peak = map(int, done.stdout.split())
    print(f"{planned >> 20} MiB planned, {peak >> 20} held")
    assert peak <= planned


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
def test_the_configurations_that_were_promised(
    tmp_path: Path, data_file: Callable[[str], Path], name: str, options: dict[str, Any]
) -> None:
    if name == "135M":
        model = data_file("models/SmolLM2-135M-Instruct.Q4_1.gguf")
    elif name == "1B":
        model = make_model(tmp_path / "1b.gguf", quant="Q4_0", **LLAMA_1B)
    else:
        model = with_tokens(GOLDENS[name].draft(), tmp_path / f"{name}.gguf")
    check(f"{name} {options}", model, _MORE, threads=2, **options)


_REQUESTS = """
import sys
from edgeinfer import LLM, EdgeInferError, platform
model, n_rounds = sys.argv[1], int(sys.argv[2])
with LLM(model, n_ctx=256, slots=2, threads=2, chat_template="chatml") as llm:
    def requests(i):
        prompts = [[3 + (i + 31 * j * k) % 200 for k in range(20 + (i + j) % 90)] for j in range(4)]
        llm.generate_batch(prompts, max_tokens=3, seed=i)
        with llm.stream(prompts[0], seed=i) as stream:  # cut short
            next(stream)
        message = {"role": "user", "content": f"number {i}"}
        llm.chat([message], max_tokens=2, logprobs=3, stop=f"{i}")
        llm.logits(prompts[1], last=2)
        try:
            llm.generate(list(range(400)))
        except EdgeInferError:
            pass
    held = []
    for i in range(2 * n_rounds):
        requests(i)
        if i in (n_rounds - 1, 2 * n_rounds - 1):
            held.append(platform.rss())
    print(held[1] - held[0], llm.plan.total_bytes, platform.peak_rss())
"""


def check_requests(folder: Path, n_rounds: int) -> None:
    """After twice as many rounds of 8 requests no more is held."""
    run = [sys.executable, "-c", _REQUESTS, str(tiny_model(folder)), str(n_rounds)]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT)
    grown, planned, peak = map(int, done.stdout.split())
    print(f"{n_rounds} rounds more: {grown >> 10} KiB")
    assert grown <= MiB and peak <= planned


def test_requests_of_every_kind_leave_nothing_behind(tmp_path: Path) -> None:
    check_requests(tmp_path, 40)


@pytest.mark.slow
def test_thousands_of_requests_leave_nothing_behind(tmp_path: Path) -> None:
    check_requests(tmp_path, 1000)


def with_tokens(draft: Draft, path: Path, n_tokens: int = 320) -> Path:
    """A small model of a family, with as many tokens as a vocabulary of bytes needs."""
    draft.keys["vocab_size"] = n_tokens
    for name in ("token_embd.weight", "output.weight"):
        if name in draft.tensors:
            dim = draft.tensors[name].shape[1]
            draft.tensors[name] = np.resize(draft.tensors[name], (n_tokens, dim))
    return draft.write(path, "Q4_0", has_tokenizer=True)


_BUILD = """
import sys
from pathlib import Path
import edgeinfer.llm
from edgeinfer.gguf import GGUFFile
from edgeinfer.text import tokenizer
def field(name):
    words = open("/proc/self/status").read().split()
    return int(words[words.index(name) + 1]) << 10
before = field("VmRSS:")
with GGUFFile.open(Path(sys.argv[1])) as file:
    made = tokenizer.Tokenizer.from_metadata(file.metadata)
    made.encode("A text of w\\u00f6rds, \\u4f60\\u597d, 12345!\\n" * 200)
    print(field("VmRSS:") - before, field("VmHWM:") - before)
"""
_MOST_OVER = 16 * MiB


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_a_vocabulary_takes_what_is_reckoned(data_file: Callable[[str], Path], name: str) -> None:
    check_vocabulary(data_file(f"vocab/ggml-vocab-{name}.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek-llm", "llama-bpe", "phi-3", "qwen2", "starcoder"])
def test_every_vocabulary_takes_what_is_reckoned(
    data_file: Callable[[str], Path], name: str
) -> None:
    check_vocabulary(data_file(f"vocab/ggml-vocab-{name}.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize("n_tokens", [1000, 100_000, 262_144])
def test_pieces_of_any_number_take_what_is_reckoned(tmp_path: Path, n_tokens: int) -> None:
    """As many as Gemma's: no file here has them."""
    path = tmp_path / "pieces.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += ["\u2581" + "na\u00efve"[: i % 6] + str(i) for i in range(n_tokens - len(texts))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([-float(i) for i in range(n_tokens)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (n_tokens - 259)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_vocabulary(path)


def check_vocabulary(path: Path) -> None:
    run = [sys.executable, "-c", _BUILD, str(path)]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT)
    kept, peak = map(int, done.stdout.split())
    with GGUFFile.open(path) as file:
        reckoned = text_bytes(file.metadata)
    print(
        f"{path.stem}: kept {kept / MiB:.1f} of {reckoned.kept / MiB:.1f} MiB, "
        f"at most {peak / MiB:.1f} of {reckoned.building / MiB:.1f}"
    )
    assert kept <= reckoned.kept and peak <= reckoned.building
    assert reckoned.kept - kept <= _MOST_OVER and reckoned.building - peak <= _MOST_OVER
