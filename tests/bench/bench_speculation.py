"""What guessing tokens ahead gains: prompts to summarise or edit, and chats that must not lose.

    python -m tests.bench.bench_speculation MODEL.gguf [-r 7] [--cost-only]

First the cost of a step by its rows; then every prompt plain, guessed, plain, guessed, ... and
the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from typing import Any

from edgeinfer import LLM, platform
from edgeinfer.bench_steps import step_seconds

ARTICLE = """The harbour of Lindmouth was built in 1842 by the engineer Thomas Arkwright. It was \
made of granite that ships brought from Cornwall. For sixty years the harbour was the largest on \
the east coast, and two hundred fishing boats sailed from it every week. In 1903 a storm broke \
the northern wall. The town council asked the government for money, but the government refused. \
The fishermen repaired the wall themselves, with stones from the old lighthouse. The work took \
eleven months. Today the harbour of Lindmouth is a museum, and forty thousand visitors come to \
see the northern wall every year."""
CODE = '''def total_price(items, tax_rate):
    """Sum the prices of all items and add tax."""
    total = 0
    for item in items:
        if item.quantity > 0:
            total = total + item.price * item.quantity
    return total * (1 + tax_rate)


def print_receipt(items, tax_rate):
    """Print a line for every item and the total price."""
    for item in items:
        print(item.name, item.quantity, item.price)
    print("Total:", total_price(items, tax_rate))
'''
PROMPTS = {
    "summarise": f"Summarise this text in its own words, sentence by sentence:\n\n{ARTICLE}",
    "edit text": f"Repeat this text exactly, but write Lindport for Lindmouth:\n\n{ARTICLE}",
    "edit code": f"Rename total_price to full_price in this code. Print all of it:\n\n{CODE}",
    "chat: sky": "Why is the sky blue?",
    "chat: story": "Tell me a story about a fox who wants to learn to swim.",
    "chat: list": "What should I see in Rome in three days?",
}


def rates(llm: LLM, prompt: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Decode rates of a plain and a guessed answer, one after the other; both are the same."""
    sampling: Any = {"max_tokens": args.max_tokens, "seed": seed}
    if args.temperature is not None:
        sampling["temperature"] = args.temperature
    turns = (False, True) if seed % 2 else (True, False)
    answers = {each: llm.chat(prompt, speculation=each, **sampling) for each in turns}
    assert answers[True].token_ids == answers[False].token_ids
    plain, guessed = answers[False].timings, answers[True].timings
    return {
        "plain": plain.decode_tok_s,
        "guessed": guessed.decode_tok_s,
        "tokens": len(answers[True].token_ids),
        "proposed": guessed.proposed_tokens,
        "accepted": guessed.accepted_tokens,
        "text": answers[True].text,
    }


def show_prompt(llm: LLM, name: str, args: argparse.Namespace) -> dict[str, Any]:
    runs = [rates(llm, PROMPTS[name], args, seed) for seed in range(args.repeat)]
    runs = [run for run in runs if run["tokens"] >= 8]
    ratio = statistics.median(run["guessed"] / run["plain"] for run in runs)
    middle = {key: statistics.median(run[key] for run in runs) for key in _SHOWN}
    print(f"{name:14}" + "".join(f"{middle[key]:10.1f}" for key in _SHOWN) + f"{ratio:9.2f}x")
    if args.text:
        print(runs[0]["text"])
    return {"prompt": name, **middle, "ratio": ratio}


_SHOWN = ("tokens", "plain", "guessed", "proposed", "accepted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("-n", "--max-tokens", type=int, default=160)
    parser.add_argument("-r", "--repeat", type=int, default=7)
    parser.add_argument("--temperature", type=float, help="the model's own by default")
    parser.add_argument("--text", action="store_true", help="show the first answers")
    parser.add_argument("--cost-only", action="store_true")
    args = parser.parse_args()
    with LLM(args.model, n_ctx=2048, threads=args.threads) as llm:
        threads = llm.runtime.n_threads
        print(
            f"{llm.name}, {platform.cpu_name()}, {threads} threads, load {os.getloadavg()[0]:.2f}"
        )
        costs = step_seconds(llm.runtime, range(1, 9), depth=256, repeat=21)
        print("rows      " + "".join(f"{n:9}" for n in costs))
        print("step, ms  " + "".join(f"{1e3 * s:9.2f}" for s in costs.values()))
        print("of one row" + "".join(f"{s / costs[1]:8.2f}x" for s in costs.values()))
        if args.cost_only:
            return
        print(f"{'':14}" + "".join(f"{key:>10}" for key in _SHOWN) + f"{'ratio':>10}")
        results = [show_prompt(llm, name, args) for name in PROMPTS]
        print(json.dumps({"rows": costs, "prompts": results}))


if __name__ == "__main__":
    main()
