"""Keep an answer with all that its tokens follow from, and check it on another device.

python replay.py [MODEL]
"""

import json
import sys
import tempfile
from pathlib import Path

from edgeinfer import LLM, Recording

model = sys.argv[1] if sys.argv[1:] else "smollm2"
file = Path(tempfile.mkdtemp()) / "answer.json"
with LLM(model, n_ctx=256, download=True) as llm, llm.stream_chat("Hi!", max_tokens=8) as stream:
    print(stream.run())
    file.write_text(json.dumps(Recording.of(llm, stream).as_json()))
with LLM(model, n_ctx=256, device="law") as llm:  # NumPy, with the bits of every other device
    print("equal:", Recording.read(file).replay(llm).is_equal)
