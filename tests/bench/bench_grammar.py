"""What a schema costs: decode without and with one in turns, and what comes before.

    python -m tests.bench.bench_grammar MODEL.gguf [-n 200] [-r 7]

Free, by schema, free, ... the same number of tokens each; the ratios are of neighbours, the
figures medians. "unguessed" is the cost of masks alone, "usual" what a caller sees.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from edgeinfer import LLM, platform
from edgeinfer.constraining import Grammars
from edgeinfer.sampling.params import mask_words
from edgeinfer.text.grammar import Grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["happy", "sad", "tired"]},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 4},
    },
    "required": ["name", "age", "mood", "likes"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 200}
PROMPT = "List many people as JSON, each with name, age, mood and what they like."


def rate(llm: LLM, n: int, seed: int, *, guesses: bool | None, **given: Any) -> float:
    """Decode rate of an answer of `n` tokens, which nothing ends before."""
    never: Any = {id: -np.inf for id in llm.runtime.tokenizer.eog_ids}
    answer = llm.chat(
        PROMPT, max_tokens=n, seed=seed, speculation=guesses, logit_bias=never, **given
    )
    assert len(answer.token_ids) == n, answer.text
    return answer.timings.decode_tok_s


def show_decode(llm: LLM, n: int, n_turns: int) -> None:
    for name, guesses in (("unguessed", False), ("usual", None)):
        pairs = [
            (rate(llm, n, seed, guesses=guesses),
             rate(llm, n, seed, guesses=guesses, schema=SCHEMA))
            for seed in range(n_turns)
        ]  # fmt: skip
        free, held = (statistics.median(each) for each in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"{name:12}{free:9.1f} tok/s free{held:9.1f} tok/s by schema{ratio:8.2f}x")


def show_masks(llm: LLM, n: int) -> None:
    """What is done once per vocabulary, once per grammar, and for each token."""
    tokenizer, grammars = llm.runtime.tokenizer, Grammars()
    answer = llm.chat(PROMPT, max_tokens=n, seed=1, schema=SCHEMA)
    first = timed(lambda: grammars.compile(Grammar.of_regex("a"), tokenizer))
    before = platform.rss()
    schema = timed(lambda: grammars.compile(Grammar.of_schema(SCHEMA), tokenizer))
    matcher = grammars.compile(Grammar.of_schema(SCHEMA), tokenizer).begin()
    masks = np.zeros((1, mask_words(llm.n_vocab)), np.uint32)
    seconds = []
    for token in answer.token_ids:
        seconds.append(
            timed(lambda: (matcher.forced(8), matcher.fill(masks, ())))
            + timed(lambda token=token: matcher.advance(token))  # type: ignore[misc]
        )
    micros = [round(1e6 * q) for q in np.quantile(seconds, [0.5, 0.9, 1])]
    print(f"vocabulary {1e3 * first:.0f} ms, schema {1e3 * schema:.1f} ms")
    print(f"a token's mask, us: median {micros[0]}, 90 % below {micros[1]}, most {micros[2]}")
    print(f"memory of this schema and its answer: {(platform.rss() - before) >> 10} KiB")


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("-n", "--max-tokens", type=int, default=200)
    parser.add_argument("-r", "--repeat", type=int, default=7)
    args = parser.parse_args()
    with LLM(args.model, n_ctx=1024, threads=args.threads) as llm:
        threads, load = llm.runtime.n_threads, os.getloadavg()[0]
        print(f"{llm.name}, {platform.cpu_name()}, {threads} threads, load {load:.2f}")
        show_masks(llm, args.max_tokens)
        show_decode(llm, args.max_tokens, args.repeat)
        print(f"load {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
