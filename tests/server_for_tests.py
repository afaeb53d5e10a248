"""A real server on a tiny random model, and replies that it is made to give.

Knows nothing of APIs.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from edgeinfer import LLM, platform
from edgeinfer.engine.generation import Generation
from edgeinfer.engine.sequence import Finished, Prefilled, Request, Token
from edgeinfer.options import LoadOptions
from edgeinfer.server.models import Models
from edgeinfer.server.run import Server
from edgeinfer.server.service import Limits, Service

from .models_for_tests import tiny_model
from .waiting import wait_until

TEMPLATE = (
    "{% if enable_thinking %}[think]{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{{ c.id }}{% endfor %}\n{% endfor %}[assistant]"
)
N_CTX = 4096
_LOAD_SECONDS = 600.0  # kernels are built where none are kept: minutes, if busy
LOAD: LoadOptions = {"device": "reference", "slots": 2, "n_ctx": N_CTX}


class Running:
    """A server that listens, and ways to talk to it."""

    def __init__(self, service: Service, server: Server, port: int) -> None:
        self.service, self.server = service, server
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx2.Client(base_url=self.url, timeout=120)

    @property
    def llm(self) -> LLM:
        return self.service.models.served[0].opened

    def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        return self.http.post(path, json=body, **more)

    @contextmanager
    def replying(self, *texts: str, reason: Any = "stop", error: Any = None) -> Iterator[list[str]]:
        """Inside, answers are these texts by turns, token by token; yields the prompts."""
        engine, tokenizer = self.llm.runtime.engine, self.llm.runtime.tokenizer
        prompts: list[str] = []

        def scripted(request: Request) -> Generation:
            generation = Generation(engine, request, engine.layout("error"))
            text = texts[len(prompts) % len(texts)]
            prompts.append(self.llm.detokenize(request.ids, special=True))
            now = time.perf_counter()
            n = len(request.ids)
            generation.events.put(Prefilled(n, n, 0, now))
            logprob = None if request.params.logprobs is None else -0.5
            for token in tokenizer.encode(text, bos=False):
                generation.events.put(
                    Token(token, now, logprob, ((token, -0.5),) if logprob else ())
                )
            stop = None if reason == "length" else tokenizer.eos_id
            generation.events.put(Finished("error" if error else reason, now, stop, error))
            return generation

        engine.generation = scripted  # type: ignore[method-assign]
        engine.begin = lambda work: None  # type: ignore[method-assign]
        try:
            yield prompts
        finally:
            del engine.generation, engine.begin

    def wait_until_idle(self) -> None:
        """Until no answer is on its way, in the server or in the engine, nor holds a model."""
        # NOTE: an answer leaves the list before it gives its model back, and is counted last.
        wait_until(
            lambda: not (self.service.is_busy or self.llm.runtime.engine.n_running),
            "the end of all answers",
        )


@contextmanager
def running(
    models: list[tuple[str, Path]],
    *,
    load: LoadOptions = LOAD,
    strict: bool = False,
    may_pull: bool = False,
    **limits: Any,
) -> Iterator[Running]:
    """A server on a free port; it has ended when the block is left."""
    found_models = Models(models, load, has_strict_names=strict, may_pull=may_pull)
    service = Service(found_models, Limits(**limits))
    loaded = threading.Event()
    server = Server(service, loaded.set)
    with platform.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run_on, args=(listener,))
        thread.start()
        found = Running(service, server, port)
        try:
            end = time.monotonic() + _LOAD_SECONDS
            while not loaded.wait(1):
                assert thread.is_alive() and time.monotonic() < end, "no model was loaded"
            yield found
        finally:
            found.http.close()
            server.stop()
            thread.join(120)
            assert not thread.is_alive()


def read_reply(connection: socket.socket) -> bytes:
    """One whole reply of a stated length, in however many pieces it comes; b"" at the end."""
    data, end = b"", 1
    while len(data) < end:
        if not (part := connection.recv(1 << 16)):
            break
        data += part
        head, found, _ = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        end = len(head) + 4 + int(length[1] if length else 0) if found else len(data) + 1
    return data


def small_model(folder: Path, **more: Any) -> Path:
    return tiny_model(folder, n_ctx=N_CTX, chat_template=TEMPLATE, **more)


@contextmanager
def running_small(folder: Path) -> Iterator[Running]:
    """One that many requests at once fill: 2 slots of 1,024 tokens, on the CPU."""
    load: LoadOptions = {"device": "cpu", "slots": 2, "n_ctx": 1024, "pooling": "mean"}
    with running([("tiny", small_model(folder))], load=load) as found:
        yield found
