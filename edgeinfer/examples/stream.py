"""An answer as it comes: text by text, then why it ended; leaving the loop cancels it.

python stream.py [MODEL]
"""

import sys

from edgeinfer import LLM

with LLM(sys.argv[1] if sys.argv[1:] else "smollm2", n_ctx=2048, download=True) as llm:
    with llm.stream("Once upon a time", max_tokens=64, seed=1) as stream:
        for event in stream:
            if event.type == "prompt_progress":
                print(f"[{event.done} of {event.total} tokens of the prompt]")
            elif event.type == "delta":
                print(event.text, end="", flush=True)
    answer = stream.completion
    print(f"\n[{answer.finish_reason}, {answer.timings.decode_tok_s:.0f} tokens a second]")
