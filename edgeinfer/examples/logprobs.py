"""How sure a model was of each token, and what else it might have said.

python logprobs.py [MODEL]
"""

import math
import sys

from edgeinfer import LLM

with LLM(sys.argv[1] if sys.argv[1:] else "smollm2", n_ctx=512, download=True) as llm:
    answer = llm.generate("The capital of France is", max_tokens=8, temperature=0.0, logprobs=3)
    for token in answer.logprobs or ():
        others = ", ".join(
            f"{llm.detokenize([id])!r} {math.exp(logprob):.0%}" for id, logprob in token.top[1:]
        )
        print(f"{token.text!r:>12} {math.exp(token.logprob):4.0%}   else {others}")
