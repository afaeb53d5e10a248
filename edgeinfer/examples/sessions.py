"""A conversation that another run goes on with: its beginning is not read again.

python sessions.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from edgeinfer import LLM, Message

model = sys.argv[1] if sys.argv[1:] else "smollm2"
file = Path(tempfile.mkdtemp()) / "boat.session"
messages: list[Message] = [{"role": "user", "content": "Explain in detail how a boat floats."}]
with LLM(model, n_ctx=1024, download=True) as llm:
    with llm.stream_chat(messages, max_tokens=64, temperature=0.0) as stream:
        messages.append({"role": "assistant", "content": stream.run().text})
    print("saved:", llm.save_session(file, stream), "tokens")
with LLM(model, n_ctx=1024) as llm:  # another day, another process
    print("loaded:", len(llm.load_session(file)), "tokens")
    messages.append({"role": "user", "content": "And a submarine?"})
    answer = llm.chat(messages, max_tokens=24, temperature=0.0)
    print(answer)
    print(f"{answer.usage.cached_tokens} of {answer.usage.prompt_tokens} tokens were known")
