"""What the API says of what was computed before, and how a prompt says what later ones share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM, InvalidRequestError, Message, SessionError

from .models_for_tests import tiny_model

# As ChatML does, with what a model thought left out of all turns but the last.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPEC: Any = dict(max_tokens=6, seed=1, logit_bias={257: -1e9})
SYSTEM: Message = {"role": "system", "content": "Answer briefly, in the words of a sailor. " * 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "attention": dict(arch="llama"),
    "hybrid": dict(arch="qwen35", n_layers=4),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("reuse")
    path = tiny_model(folder, n_ctx=2048, chat_template=TEMPLATE, **FAMILIES[request.param])
    with LLM(path, n_ctx=2048, slots=2) as llm:
        yield llm


def asked(*texts: str) -> list[Message]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": t}
            for i, t in enumerate(texts)]  # fmt: skip


def test_a_second_turn_reads_only_what_is_new(llm: LLM) -> None:
    """Also where the answer before is another than the one that was given, or less of it."""
    first = llm.chat([SYSTEM, *asked("What is a keel? " * 30)], **SPEC)
    assert first.usage.cached_tokens == 0 and first.usage.cache_miss == "new"
    for answer in ("<think>hm</think>A beam.", "Wood."):
        turn = [SYSTEM, *asked("What is a keel? " * 30, answer, "And a mast?")]
        second = llm.chat(turn, **SPEC)
        new = second.usage.prompt_tokens - second.usage.cached_tokens
        assert new < 60 < second.usage.cached_tokens


def test_messages_that_later_prompts_share(llm: LLM) -> None:
    """A header that changes costs what follows it; what is marked before it does not."""
    rules: Message = {"role": "system", "content": "Rules of the house. " * 30}
    counts = []
    for i in range(3):
        header: Message = {"role": "user", "content": f"It is {i} o'clock. " * 3}
        answer = llm.chat([rules, header, *asked("", "Go on.")], n_stable=1, **SPEC)
        counts.append(answer.usage.cached_tokens)
    n_rules = len(llm.tokenize(f"<system>{rules['content']}</system>"))
    assert counts[0] < 32 and min(counts[1:]) >= n_rules - 32


def test_tokens_that_later_prompts_share(llm: LLM) -> None:
    head = list(range(20, 120))
    for i in range(3):
        answer = llm.generate([*head, 200 + i, *range(30, 50)], n_stable=len(head), **SPEC)
    assert answer.usage.cached_tokens >= 96
    whole = llm.stream(head, n_stable=10**6, **SPEC)  # shorter than what is shared
    assert whole.request.n_stable == len(head) and whole.run().usage.completion_tokens


def test_what_is_cached_changes_no_token(llm: LLM) -> None:
    turn = [SYSTEM, *asked("What is a rope?", "A line.", "Who made it?")]
    first = llm.chat(turn, **SPEC)
    again = llm.chat(turn, **SPEC)
    assert first.token_ids == again.token_ids
    assert again.usage.cached_tokens > first.usage.prompt_tokens - 40


def test_a_session_goes_on_in_another_model_of_the_file(llm: LLM, tmp_path: Path) -> None:
    turn = [SYSTEM, *asked("What is a sail? " * 20)]
    with llm.stream_chat(turn, **SPEC) as stream:
        answer = stream.run()
    n_saved = llm.save_session(tmp_path / "one.session", stream)
    ids = (*stream.prompt_ids, *answer.token_ids)
    assert n_saved >= len(stream.prompt_ids) - 32
    later = [*ids, *range(30, 60)]
    expected = llm.generate(later, **SPEC)
    with LLM(llm.runtime.model.file.path, n_ctx=2048, slots=2) as other:
        assert other.load_session(tmp_path / "one.session") == ids[:n_saved]
        found = other.generate(later, **SPEC)
        assert found.token_ids == expected.token_ids
        assert found.usage.cached_tokens == n_saved
        with pytest.raises(InvalidRequestError, match="cache"):
            other.save_session(tmp_path / "none.session", [1, 2, 3])
        for wrong in (5, "text", [1.5]):
            with pytest.raises(InvalidRequestError):
                other.save_session(tmp_path / "none.session", wrong)  # type: ignore[arg-type]
    (tmp_path / "bad.session").write_bytes(b"no session")
    with pytest.raises(SessionError):
        llm.load_session(tmp_path / "bad.session")
