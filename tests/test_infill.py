"""Text between two others: for vocabularies that have tokens for it; the others refuse by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.infill import infill_prompt
from edgeinfer.text.tokenizer import Tokenizer

from .bench.tokenizers import byte_letters
from .models_for_tests import metadata_of
from .server_for_tests import LOAD, Running, running, small_model

NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def tokenizer(*more: str, **keys: Any) -> Tokenizer:
    texts = [*byte_letters(), "<|bos|>", "<|endoftext|>", *more]
    values = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": texts, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1] * len(texts), "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
    }  # fmt: skip
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return Tokenizer.from_metadata(metadata_of({**values, **named}))


def test_the_order_that_models_of_code_were_trained_on() -> None:
    found = tokenizer("ab", *NAMES)
    pre, suf, mid = (found.special_id(name) for name in NAMES)
    ids = infill_prompt(found, "x = ", "\nreturn x")
    assert ids == [pre, *found.encode("x = "), suf, *found.encode("\nreturn x"), mid]
    assert infill_prompt(found, [1, 2], "") == [pre, 1, 2, suf, mid]
    # What the texts say of such tokens is text.
    assert infill_prompt(found, NAMES[2], "x").count(mid) == 1
    with_bos = tokenizer("ab", *NAMES, add_bos_token=True)
    assert infill_prompt(with_bos, "a", "b")[:2] == [256, pre]


def test_keys_name_them_too() -> None:
    keys = {"fim_pre_token_id": 3, "fim_suf_token_id": 4, "middle_token_id": 5}
    assert tokenizer("ab", **keys).infill_ids == (3, 4, 5)


@pytest.mark.parametrize("names", [(), NAMES[:2], NAMES[1:]])
def test_without_all_of_them_it_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="no tokens to fill in") as refused:
        infill_prompt(tokenizer("ab", *names), "a", "b")
    assert refused.value.param == "suffix"


BODY: Any = {"model": "tiny", "prompt": "def f(", "suffix": "):", "max_tokens": 2}


def test_the_server_refuses_it_by_name(server: Running) -> None:
    refused = server.post("/v1/completions", BODY)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "suffix"
    assert "suffix" in server.post("/api/generate", BODY).json()["error"]
    assert server.post("/v1/completions", {**BODY, "suffix": ""}).status_code == 200
    server.wait_until_idle()


@pytest.mark.parametrize("path", ["/v1/completions", "/api/generate"])
def test_the_server_fills_in(tmp_path: Path, path: str) -> None:
    with running([("tiny", small_model(tmp_path))], load=LOAD) as found:
        found.llm.runtime.tokenizer.infill_ids = (310, 311, 312)
        with found.replying("x") as prompts:
            reply = found.post(path, {**BODY, "stream": False}).json()
        assert prompts == ["<|bos|>tok310def f(tok311):tok312"]
        assert (
            reply["choices"][0]["text"] == "x" if "choices" in reply else reply["response"] == "x"
        )
