"""Fifty turns in a context of 1,024 tokens: speed and memory of every turn, and who is obeyed.

    python -m tests.bench.bench_long_chat MODEL [--turns 50] [--ctx 1024]

Knows nothing of the command line's chat, which keeps its turns in the same way.
"""

from __future__ import annotations

import argparse
import statistics

from edgeinfer import LLM, Message, platform

SYSTEM = "You are a parrot. Your name is Coco."
NAME_ASKED = "What is your name?"  # every seventh turn, when the last such turn has dropped out
NAME = "Coco"
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
    rates: list[float] = []
    sizes: list[float] = []
    firsts: list[float] = []
    obeyed: list[bool] = []
    with LLM(args.model, n_ctx=args.ctx) as llm:
        for i in range(args.turns):
            is_name = i % 7 == 0
            question = NAME_ASKED if is_name else ASKED.format(TOPICS[i % len(TOPICS)])
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
            if is_name:
                obeyed.append(_knows_its_name(llm, stream.prompt_ids))
            shown = {True: "yes", False: "no"}[obeyed[-1]] if is_name else "-"
            print(
                f"{i + 1:4} {stream.dropped_turns:7} {usage.prompt_tokens:6} "
                f"{usage.cached_tokens:6} {usage.completion_tokens:6} {times.first_token_s:7.3f} "
                f"{times.decode_tok_s:5.0f} {sizes[-1]:7.1f} {shown}",
                flush=True,
            )
    n = args.turns // 5
    print(f"decode tok/s, first and last {n} turns: {_median(rates[:n])} {_median(rates[-n:])}")
    print(f"first token s, median and worst: {_median(firsts)} {max(firsts):.3f}")
    print(f"RSS MiB after turns {n} and {args.turns}: {sizes[n - 1]:.1f} {sizes[-1]:.1f}")
    print(f"system prompt obeyed in {sum(obeyed)} of {len(obeyed)} answers that show it")


def _knows_its_name(llm: LLM, prompt_ids: tuple[int, ...]) -> bool:
    """Whether an answer that begins with "My name is" goes on with the system message's name.

    A model of 135 M rarely chooses those words after a long talk, whatever runs it.
    """
    ids = [*prompt_ids, *llm.tokenize("My name is")]
    likeliest = int(llm.logits(ids, last=1)[0].argmax())
    return likeliest == llm.tokenize(f" {NAME}")[0]


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.3g}"


if __name__ == "__main__":
    main()
