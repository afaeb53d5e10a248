"""Many answers at once in one event loop: they share the steps of one engine.

python many.py [MODEL]
"""

import asyncio
import sys

from edgeinfer import AsyncLLM

CITIES = ("Paris", "Lagos", "Lima", "Hanoi")


async def ask(llm: AsyncLLM, city: str) -> None:
    async for event in await llm.stream_chat(f"What is {city} known for?", max_tokens=24, seed=1):
        if event.type == "delta":
            print(f"{city:>6}: {event.text!r}")


async def main() -> None:
    model = sys.argv[1] if sys.argv[1:] else "smollm2"
    async with AsyncLLM(model, n_ctx=512, slots=len(CITIES), download=True) as llm:
        await asyncio.gather(*(ask(llm, city) for city in CITIES))


asyncio.run(main())
