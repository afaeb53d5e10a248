"""An answer that is a value of a class: its schema says which tokens may follow.

python schema.py [MODEL]
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from edgeinfer import LLM

Text = Annotated[str, msgspec.Meta(max_length=20)]


@dataclass
class Pet:
    name: Text
    kind: Literal["cat", "dog", "fish"]
    age: Annotated[int, msgspec.Meta(ge=0, le=30)]


with LLM(sys.argv[1] if sys.argv[1:] else "smollm2", n_ctx=512, download=True) as llm:
    answer = llm.chat("Make up a pet.", schema=Pet, max_tokens=100, seed=1)
    pet = msgspec.json.decode(answer.text, type=Pet)
    print(f"{pet.name} is a {pet.kind} of {pet.age}")
