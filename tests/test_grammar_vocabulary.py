"""Grammars of forms that people use, over the 151,936 tokens of Qwen2: all stay within limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.constraining import Grammars
from edgeinfer.gguf import GGUFFile
from edgeinfer.sampling.params import mask_words
from edgeinfer.text.grammar import Grammar
from edgeinfer.text.tokenizer import Tokenizer

from .test_grammar import allowed


def an_object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT: Any = {"type": "string"}
ADDRESS = an_object(
    street=TEXT,
    zip={"type": "string", "pattern": r"^[0-9]{5}(-[0-9]{4})?$"},
    country={"enum": [f"country {i} of ümlaut" for i in range(250)]},
)
PERSON = an_object(
    id={"type": "string", "format": "uuid"},
    name={"type": "string", "minLength": 1, "maxLength": 200},
    mail={"type": "string", "format": "email"},
    born={"type": "string", "format": "date"},
    seen={"type": "string", "format": "date-time"},
    phone={"type": "string", "pattern": r"^\+?[0-9 ()-]{5,20}$"},
    age={"type": "integer", "minimum": 0, "maximum": 130},
    score={"type": "number", "minimum": -1, "maximum": 1},
    address=ADDRESS,
    tags={"type": "array", "items": TEXT, "maxItems": 20},
)
ADA: Any = {
    "id": "123e4567-e89b-42d3-a456-426614174000",
    "name": "Ада Lovelace 🎈",
    "mail": "ada.l@example.org",
    "born": "1815-12-10",
    "seen": "1852-11-27T10:00:00Z",
    "phone": "+44 (20) 7946-0958",
    "age": 36,
    "score": 0.75,
    "address": {"street": "St. James's Sq.\n12", "zip": "12345", "country": "country 7 of ümlaut"},
    "tags": ["maths", 'machines: "engines"', "поэзия"],
}
NODE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": an_object(
            name=TEXT,
            children={"type": "array", "items": {"$ref": "#/$defs/node"}},
            next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        )
    },
}
LEAF: Any = {"name": "leaf", "children": [], "next": None}
STEPS = [
    an_object(kind={"const": f"step_{i}"}, **{f"argument_{i}_{k}": TEXT for k in range(8)})
    for i in range(40)
]
FORMS: dict[str, tuple[Any, Any]] = {
    "person": (PERSON, ADA),
    "people": ({"type": "array", "items": PERSON, "minItems": 1, "maxItems": 50}, [ADA] * 8),
    "tree": (NODE, {**LEAF, "children": [{**LEAF, "children": [LEAF] * 3}] * 3, "next": LEAF}),
    "one of 40 steps": (
        an_object(steps={"type": "array", "items": {"anyOf": STEPS}}),
        {"steps": [{"kind": f"step_{i}", **{f"argument_{i}_{k}": "a " * k for k in range(8)}}
                   for i in range(0, 40, 4)]},
    ),
    "100 that may be there": (
        {"type": "object", "properties": {f"field_{i}": TEXT for i in range(100)}},
        {f"field_{i}": f"value {i}" for i in range(0, 100, 7)},
    ),
    "1,000 names": (
        {"enum": [f"item-{i:04}-{i * 7919 % 1000}" for i in range(1000)]}, "item-0500-500"
    ),
    "a long text": ({"type": "string", "maxLength": 100_000}, "日本語のテキスト。" * 330),
    "anything": ({}, {"a": [1, 2.5e-7, None, {"b": [True, "x" * 300]}], "ü": {}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen(data_file: Callable[[str], Path]) -> tuple[Tokenizer, Grammars]:
    with GGUFFile.open(data_file("vocab/ggml-vocab-qwen2.gguf")) as file:
        return Tokenizer.from_metadata(file.metadata), Grammars()


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_filled_in_within_limits(qwen: tuple[Tokenizer, Grammars], name: str) -> None:
    """Token by token, with a mask before each, as an answer takes them."""
    tokenizer, grammars = qwen
    schema, value = FORMS[name]
    matcher = grammars.compile(Grammar.of_schema(schema), tokenizer).begin()
    masks = np.zeros((1, mask_words(tokenizer.n_vocab)), np.uint32)
    (mask,) = masks
    for id in tokenizer.encode_middle(json.dumps(value, ensure_ascii=False)):
        matcher.fill(masks, [])
        assert mask[id >> 5] >> np.uint32(id & 31) & 1, tokenizer.text(id)
        matcher.advance(id)
    assert matcher.is_ended or allowed(matcher, tokenizer.n_vocab)[0] >= tokenizer.eog_ids
