"""What guessing tokens ahead gains: prompts to summarise or edit, and chats that must not lose.

    python -m tests.bench.bench_speculation MODEL.gguf [-r 7] [-k summarise] [--cost-only]

First the cost of a step by its rows; then every prompt plain, guessed, plain, guessed, ... and
the median of the ratios of neighbours; of a kind the ratio of the times that its prompts take
together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from typing import Any

from edgeinfer import LLM, platform
from edgeinfer.bench.steps import step_seconds

HARBOUR = """The harbour of Lindmouth was built in 1842 by the engineer Thomas Arkwright. It was \
made of granite that ships brought from Cornwall. For sixty years the harbour was the largest on \
the east coast, and two hundred fishing boats sailed from it every week. In 1903 a storm broke \
the northern wall. The town council asked the government for money, but the government refused. \
The fishermen repaired the wall themselves, with stones from the old lighthouse. The work took \
eleven months. Today the harbour of Lindmouth is a museum, and forty thousand visitors come to \
see the northern wall every year."""
NEWS = """The city council of Brindleford voted on Tuesday to close the High Street to cars from \
September. Seven councillors voted for the plan and four against it. Under the plan, cars will be \
banned between the railway station and the market square from ten in the morning until six in the \
evening. Buses, taxis and delivery vans will still be allowed. The council will spend 2.4 million \
pounds on wider pavements, trees and benches. Councillor Helen Moss, who proposed the plan, said \
that it would make the town centre cleaner and safer. Shop owners are divided. Raj Patel, who \
runs a bookshop on the High Street, welcomed the decision, but Susan Cole, the owner of a \
furniture shop, said that her customers need their cars to take home what they buy. The council \
will review the plan after one year."""
BATS = """Bats are the only mammals that can truly fly. There are more than 1,400 species of bats, \
which is about a fifth of all species of mammals. The smallest is the bumblebee bat of Thailand, \
which weighs two grams; the largest are the flying foxes, whose wings can span a metre and a half. \
Most bats eat insects. A single little brown bat can catch a thousand mosquitoes in an hour. Other \
bats eat fruit, and by spreading seeds and pollen they help forests to grow back. Bats find their \
way in the dark by echolocation: they call out at pitches too high for people to hear and listen \
to the echoes. From the echo a bat can tell how far away an insect is, how large it is and in \
which direction it flies."""
GLACIERS = """Glaciers are large bodies of ice that form where more snow falls in winter than \
melts in summer. Over many years the snow is pressed into ice by its own weight. When it is about \
thirty metres thick it begins to flow downhill, slowly, like very thick honey. Most glaciers move \
less than a metre a day, but a few have been seen to surge by more than fifty metres in a single \
day. As they move, glaciers grind the rock beneath them and carry the pieces along. The valleys \
they leave behind have the shape of the letter U, while the valleys cut by rivers have the shape \
of the letter V. About ten percent of the land on Earth is covered by glaciers today, and nearly \
all of that ice lies in Antarctica and Greenland."""
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
# By kind. Simulated, these summaries together gain 3 to 4 % more than the 29 of TUNING.md.
PROMPTS = {
    "summarise": [
        f"Summarise this text in its own words, sentence by sentence:\n\n{HARBOUR}",
        f"Summarize the following text in three sentences.\n\n{HARBOUR}",
        f"Summarise this text:\n\n{GLACIERS}",
        f"Summarise this text:\n\n{BATS}",
        f"Summarize the following text in three sentences.\n\n{NEWS}",
    ],
    "answer": [
        f"{NEWS}\n\nWhat does the plan allow and what does it ban?",
        f"{BATS}\n\nHow do bats find their way?",
    ],
    "edit text": [
        f"Repeat this text exactly, but write Lindport for Lindmouth:\n\n{HARBOUR}",
        f"Correct the spelling of this text:\n\n{NEWS.replace('council', 'counsil')}",
    ],
    "edit code": [
        f"Rename total_price to full_price in this code. Print all of it:\n\n{CODE}",
        f"Add type hints to this Python code:\n\n{CODE}",
    ],
    "chat": [
        "Why is the sky blue?",
        "Tell me a story about a fox who wants to learn to swim.",
        "What should I see in Rome in three days?",
        "Explain the causes of the First World War.",
    ],
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


def show_prompt(llm: LLM, name: str, prompt: str, args: argparse.Namespace) -> dict[str, Any]:
    runs = [rates(llm, prompt, args, seed) for seed in range(args.repeat)]
    runs = [run for run in runs if run["tokens"] >= 8]
    ratio = statistics.median(run["guessed"] / run["plain"] for run in runs)
    middle = {key: statistics.median(run[key] for run in runs) for key in _SHOWN}
    show_line(name, middle, ratio)
    if args.text:
        print(runs[0]["text"])
    return {"prompt": name, **middle, "ratio": ratio}


def show_kind(llm: LLM, kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every prompt of a kind, and all of them as if they were one answer."""
    prompts = PROMPTS[kind]
    shown = [show_prompt(llm, f"{kind} {i}", each, args) for i, each in enumerate(prompts, 1)]
    total = {key: sum(each[key] for each in shown) for key in ("tokens", "proposed", "accepted")}
    plain = sum(each["tokens"] / each["plain"] for each in shown)
    guessed = sum(each["tokens"] / each["plain"] / each["ratio"] for each in shown)
    total |= {"plain": total["tokens"] / plain, "guessed": total["tokens"] / guessed}
    show_line(f"{kind}: all", total, plain / guessed)
    return [*shown, {"prompt": kind, **total, "ratio": plain / guessed}]


def show_line(name: str, figures: dict[str, float], ratio: float) -> None:
    print(f"{name:16}" + "".join(f"{figures[key]:10.1f}" for key in _SHOWN) + f"{ratio:9.2f}x")


_SHOWN = ("tokens", "plain", "guessed", "proposed", "accepted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("-n", "--max-tokens", type=int, default=160)
    parser.add_argument("-r", "--repeat", type=int, default=7)
    parser.add_argument("--temperature", type=float, help="the model's own by default")
    parser.add_argument("-k", "--kind", choices=list(PROMPTS), action="append")
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
        print(f"{'':16}" + "".join(f"{key:>10}" for key in _SHOWN) + f"{'ratio':>10}")
        results = [row for kind in args.kind or PROMPTS for row in show_kind(llm, kind, args)]
        print(json.dumps({"rows": costs, "prompts": results}))


if __name__ == "__main__":
    main()
