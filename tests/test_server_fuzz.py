"""Requests at random: each is answered, or refused in the words of its API; none stays."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterable, Iterator

import pytest

from .fuzz_requests import Sent, asked
from .server_for_tests import Running, running_small
from .test_server_storm import check_all_free

N_CONNECTIONS = 4
SECONDS = 60  # that a reply may take, however busy the machine is
LONGEST = 3000  # bytes of a refusal
STATUSES = (200, 204, 400, 403, 404, 405, 409, 413, 415)
PLAIN = {"prompt": "hello there", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_small(tmp_path_factory.mktemp("fuzz")) as found:
        yield found


class Fuzz:
    """Many requests on a few connections; `wrong` is what should not have come."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.wrong: list[str] = []
        self.n_answered = 0

    def run(self, seeds: range) -> None:
        threads = [
            threading.Thread(target=self._ask_all, args=(seeds[i::N_CONNECTIONS],))
            for i in range(N_CONNECTIONS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _ask_all(self, seeds: range) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=SECONDS)
        for seed in seeds:
            sent = asked(seed)
            try:
                connection.request(sent.method, _quoted(sent.path), sent.body, sent.headers)
                reply = connection.getresponse()
                found = fault(sent, reply, reply.read())
                self.n_answered += reply.status == 200
            except (OSError, http.client.HTTPException) as error:
                found = f"{error!r}"
                connection.close()
            if found:
                self.wrong.append(f"seed {seed}, {sent.method} {sent.path}: {found}")
        connection.close()


def _quoted(path: str) -> str:
    return re.sub(r"[^!-~]", lambda found: f"%{ord(found[0]):02x}", path)


def fault(sent: Sent, reply: http.client.HTTPResponse, body: bytes) -> str:
    """What is wrong with a reply, "" where nothing is."""
    text = body.decode()
    if reply.status not in STATUSES or "should not be" in text:
        return f"{reply.status} {text[-300:]}"
    if sent.method == "HEAD" or reply.status == 204:
        return "a body where there can be none" if body else ""
    if reply.status != 200:
        return _fault_of_refusal(sent, text)
    for part in _parts(reply.headers.get_content_type(), text):
        json.loads(part)
        if '"error":{' in part or '"error":"' in part:
            return f"an error inside of a reply: {part[:300]}"
    return ""


def _parts(kind: str, text: str) -> Iterable[str]:
    """The JSON that a reply of some kind consists of."""
    if kind == "text/event-stream":
        assert text.endswith("\n\n")
        data = re.findall(r"(?m)^data: (.*)$", text)
        return [each for each in data if each != "[DONE]"]
    if kind == "application/x-ndjson":
        return text.splitlines()
    return [text] if kind == "application/json" else []


def _fault_of_refusal(sent: Sent, text: str) -> str:
    error = json.loads(text).get("error")
    path = re.sub(r"^(/v1)+(?=/)", "", sent.path)
    if path.startswith(("/api/", "/v2/")):
        is_right = isinstance(error, str)
    else:
        is_right = isinstance(error, dict) and isinstance(error["message"], str)
        is_anthropic = path.startswith("/messages") or "anthropic-version" in sent.headers
        is_right &= ("request_id" in json.loads(text)) == is_anthropic
    return "" if is_right and len(text) <= LONGEST else f"a refusal that is none: {text[:300]}"


@pytest.mark.parametrize("n", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_whatever_is_asked_has_an_answer(served: Running, n: int) -> None:
    before = served.post("/v1/completions", PLAIN).json()["choices"]
    fuzz = Fuzz(int(served.url.rpartition(":")[2]))
    fuzz.run(range(n))
    assert fuzz.wrong == []
    assert fuzz.n_answered > n // 20
    assert served.post("/v1/completions", PLAIN).json()["choices"] == before
    served.wait_until_idle()
    assert served.service.models.served[0].n_users == 0 and not served.service.is_busy
    check_all_free(served)
