"""What a cache of 8 or 4 bits costs: divergence from the truth, perplexity, bytes of a token.

`python -m tests.bench.bench_kv_types MODEL.gguf GOLDEN.npz [--plain]`: the file of shared data that
`tests/test_golden.py` reads. `--plain` leaves out the Hadamard transform, to show what it is for.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import get_args

import numpy as np

from edgeinfer import LLM
from edgeinfer.graph import KV, KVType
from tests.test_golden import log_softmax, mean_divergence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("golden")
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    if args.plain:
        KV.transforms_k = KV.transforms_v = property(lambda cache: False)  # type: ignore[assignment]
    with np.load(args.golden) as file:
        golden = {name: file[name] for name in file.files}
    ids = golden["ids"].tolist()
    print("   K     V   mean KL   perplexity   bytes a token")
    for types in product(get_args(KVType), repeat=2):
        with LLM(args.model, device="cpu", n_ctx=1024, kv_type=types) as llm:
            logits = llm.logits(ids)
            cache = llm.plan.rows["KV cache"] / 1024
        ours = log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
        print(
            f"{types[0]:>4} {types[1]:>5} {mean_divergence(golden, logits):9.5f}"
            f" {np.exp(-ours.mean()):12.3f} {cache:15.0f}"
        )


if __name__ == "__main__":
    main()
