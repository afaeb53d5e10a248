"""Between computing and picking: forbid tokens in one answer, and watch a layer in another.

python hooks.py [MODEL]
"""

import sys

import numpy as np

from edgeinfer import LLM, Step

LAYER = 2
model = sys.argv[1] if sys.argv[1:] else "smollm2"
with LLM(model, n_ctx=512, residuals=[LAYER], download=True) as llm:
    with_e = ["e" in llm.detokenize([id]) for id in range(llm.n_vocab)]

    def without_e(step: Step) -> None:
        if step.logits is not None:  # None while the prompt is read
            step.logits[with_e] = -np.inf

    print(llm.generate("A cat is", max_tokens=24, seed=1, on_step=without_e))

    norms: list[float] = []

    def measure(step: Step) -> None:  # views: copy what is to stay
        norms.extend(np.linalg.norm(step.residuals[LAYER], axis=1).tolist())

    llm.generate("A dog is", max_tokens=8, seed=1, on_step=measure, watch=[LAYER])
    print(f"what enters layer {LAYER} is {np.mean(norms):.1f} long, over {len(norms)} tokens")

    ids = llm.tokenize("The dog sleeps, because it is tired", bos=True)
    weights = llm.attention(ids, LAYER, last=1)[0].mean(axis=0)  # of all heads
    for id, weight in zip(ids, weights, strict=True):
        print(f"{llm.detokenize([id], special=True)!r:>14} {weight:.2f}")
