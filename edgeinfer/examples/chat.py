"""A conversation: each answer joins the messages, and what was read is not read again.

python chat.py [MODEL]
"""

import sys

from edgeinfer import LLM, Message

with LLM(sys.argv[1] if sys.argv[1:] else "smollm2", n_ctx=2048, download=True) as llm:
    messages: list[Message] = [{"role": "system", "content": "Answer in one sentence."}]
    for question in ("What is a river?", "Name the longest one.", "Where does it end?"):
        messages.append({"role": "user", "content": question})
        answer = llm.chat(messages, max_tokens=48, temperature=0.0)
        messages.append({"role": "assistant", "content": answer.text})
        print(f"> {question}\n{answer}")
        print(f"  ({answer.usage.cached_tokens} of {answer.usage.prompt_tokens} tokens were known)")
