"""Median time of sampling one row on one core, by vocabulary and settings.

python -m tests.bench.bench_sampler
"""

from __future__ import annotations

import ctypes
import statistics
import time

import numpy as np

from edgeinfer.kernels.cpu import layout
from edgeinfer.sampling.params import SampleTable, SamplingParams
from tests import native

CASES = {
    "greedy": SamplingParams(temperature=0),
    "default": SamplingParams(),
    "default, penalties, DRY": SamplingParams(repeat_penalty=1.1, dry_multiplier=0.8),
    "default, logprobs 5": SamplingParams(logprobs=5),
    "top_k 1000": SamplingParams(top_k=1000),
    "top_k 0": SamplingParams(top_k=0),
    "top_k 0, min_p 0": SamplingParams(top_k=0, min_p=0),
    "only temperature": SamplingParams(top_k=0, top_p=1, min_p=0),
    "mirostat 2": SamplingParams(mirostat=2),
    "typical, whole vocabulary": SamplingParams(top_k=0, typical_p=0.9),
}


def median_us(params: SamplingParams, logits: np.ndarray, n: int = 21) -> float:
    n_vocab = logits.shape[1]
    table = SampleTable(1)
    n_bytes = layout.sample_scratch_bytes(n_vocab)
    scratch = native.huge(n_bytes)
    history = (np.arange(1000, dtype=np.int32) * 7) % 50
    words = [logits.ctypes.data, 4 * n_vocab, n_vocab, scratch.ctypes.data, n_bytes]
    arguments = np.array(words, np.int64)
    header = native.header(H_SAMPLES=table.address, H_WANTED_ROWS=1)
    kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 4)(native.address("sample"))
    times = []
    for i in range(n):
        table.set_row(0, params, 1, i, history)
        start = time.perf_counter()
        kernel(header.ctypes.data, arguments.ctypes.data, 0, 0)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def main() -> None:
    random = np.random.default_rng(1)
    sizes = (49_152, 151_936, 262_144)
    # Peaked like a language model's logits, and flat: the worst case for a lazy sort.
    for shape, spread in (("peaked", 3.0), ("flat", 0.01)):
        print(f"{shape:28}" + "".join(f"{n:>12,}" for n in sizes) + "   (us, one core)")
        for name, params in CASES.items():
            row = f"  {name:26}"
            for n_vocab in sizes:
                logits = random.normal(0, spread, (1, n_vocab)).astype(np.float32)
                row += f"{median_us(params, logits):12.0f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
