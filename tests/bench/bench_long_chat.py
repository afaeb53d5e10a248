"""Fifty turns in a context of 1,024 tokens: speed and memory of every turn, and who is obeyed.

    python -m tests.bench.bench_long_chat MODEL [--turns 50] [--ctx 1024]

Knows nothing of the command line's chat, which keeps its turns in the same way.
"""

from __future__ import annotations

import argparse
import statistics

from edgeinfer import LLM, Message, platform

SYSTEM = "You are a parrot named Coco. Begin every answer with the word SQUAWK."
TOPICS = ("the sea", "bread", "mountains", "clocks", "rain", "trains", "music", "the moon")
ASKED = "Tell me something about {}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--ctx", type=int, default=1024)
    args = parser.parse_args()
    messages: list[Message] = [{"role": "system", "content": SYSTEM}]
    print("turn dropped prompt cached answer first_s tok_s rss_mib obeyed")
    rates, sizes, obeyed, firsts = [], [], [], []
    with LLM(args.model, n_ctx=args.ctx) as llm:
        for i in range(args.turns):
            question = ASKED.format(TOPICS[i % len(TOPICS)])
            messages.append({"role": "user", "content": question})
            with llm.stream_chat(
                messages, overflow="drop-turns", max_tokens=120, temperature=0.0
            ) as stream:
                answer = stream.run()
            messages.append({"role": "assistant", "content": answer.text})
            usage, times = answer.usage, answer.timings
            rates.append(times.decode_tok_s)
            firsts.append(times.first_token_s)
            sizes.append(platform.rss() / 2**20)
            obeyed.append(answer.text.lstrip().upper().startswith("SQUAWK"))
            print(
                f"{i + 1:4} {stream.dropped_turns:7} {usage.prompt_tokens:6} "
                f"{usage.cached_tokens:6} {usage.completion_tokens:6} {times.first_token_s:7.3f} "
                f"{times.decode_tok_s:5.0f} {sizes[-1]:7.1f} {'yes' if obeyed[-1] else 'no'}",
                flush=True,
            )
    n = args.turns // 5
    print(f"decode tok/s, first and last {n} turns: {_median(rates[:n])} {_median(rates[-n:])}")
    print(f"first token s, median and worst: {_median(firsts)} {max(firsts):.3f}")
    print(f"RSS MiB after turns {n} and {args.turns}: {sizes[n - 1]:.1f} {sizes[-1]:.1f}")
    print(f"system prompt obeyed in {sum(obeyed)} of {args.turns} answers")


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.3g}"


if __name__ == "__main__":
    main()
