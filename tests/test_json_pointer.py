"""Where references of schemas lead: to what they name, or nowhere."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer.text.call_values import Parameters, Unwritable
from edgeinfer.text.json_pointer import pointed

NAMES = st.text(st.characters(codec="utf-8"), max_size=4)


@given(st.lists(st.one_of(st.integers(0, 3), NAMES), max_size=5))
def test_a_place_is_found_by_its_steps(steps: list[Any]) -> None:
    root: Any = "here"
    for step in reversed(steps):
        root = {step: root} if isinstance(step, str) else [*[0] * step, root]
    names = (str(step).replace("%", "%25") for step in steps)
    pointer = "".join(f"/{each.replace('~', '~0').replace('/', '~1')}" for each in names)
    assert pointed(root, pointer) == "here"


@pytest.mark.parametrize("name", ["²", "1" * 5000, "-1", "", "1", "x"])
def test_a_list_has_no_such_place(name: str) -> None:
    """The first two are digits that Python makes no number of."""
    with pytest.raises(LookupError):
        pointed([0], f"/{name}")
    with pytest.raises(Unwritable, match="leads nowhere"):
        Parameters({"anyOf": [{"type": "object"}]}, is_strict=True).resolve(f"#/anyOf/{name}")
