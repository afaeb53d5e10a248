"""What is pasted is text: no key, whatever it holds and however its bytes come."""

from __future__ import annotations

import os
import pty
import sys
import threading
import time
import tty
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual import events

from edgeinfer.tui.pastes import Pastes

START, END = "\x1b[200~", "\x1b[201~"
EVIL = "red \x1b[31mtext\x1b[0m \x1b]0;title\x07 \x03\x07\x11 \x1b\x1b[A\x1b[200~ end"


def taken(parts: list[str]) -> list[tuple[str, bool]]:
    """What comes of parts; neighbours of a kind are one."""
    pastes, found = Pastes(), list[tuple[str, bool]]()
    for part in parts:
        for text, is_pasted in pastes.push(part):
            if found and not is_pasted and not found[-1][1]:
                text = found.pop()[0] + text
            found.append((text, is_pasted))
    held = pastes.flush()
    return [*found, (held, False)] if held else found


@given(st.lists(st.sampled_from([START, END, "\x1b", "[", "200~", "a", "\r", EVIL])), st.data())
def test_a_paste_is_the_same_in_any_parts(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = taken([text])
    typed = "".join(text for text, is_pasted in whole if not is_pasted)
    assert "".join(text for text, is_pasted in taken(parts) if not is_pasted) == typed
    pasted = [text for text, is_pasted in whole if is_pasted]
    assert [text for text, is_pasted in taken(parts) if is_pasted] == pasted
    assert not any(c < " " and c not in "\t\n" for each in pasted for c in each)


def test_lines_of_a_paste_end_as_lines_do() -> None:
    assert taken([f"x{START}one\rtwo\r\nthree{END}y"]) == [
        ("x", False), ("one\ntwo\nthree", True), ("y", False),
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="its consoles have no driver of ours")
def test_the_driver_makes_no_key_of_a_paste() -> None:
    from edgeinfer.tui.driver import ChatDriver

    parent, child = pty.openpty()
    tty.setraw(child)
    got: list[Any] = []
    driver: Any = object.__new__(ChatDriver)
    driver.__dict__ |= {"_debug": False, "fileno": child, "exit_event": threading.Event()}
    driver._owner = SimpleNamespace(hang_up=lambda: None)
    driver.process_message = driver.send_message = got.append
    reader = threading.Thread(target=driver.run_input_thread)
    reader.start()
    try:
        for part in (f"a{START}", f"{EVIL}\x1b", f"[3mslanted{END[:3]}", f"{END[3:]}b\x1b[A"):
            os.write(parent, part.encode())
            time.sleep(0.03)  # longer than an Escape waits
        end = time.monotonic() + 120
        while not any(getattr(each, "key", "") == "up" for each in got):
            assert time.monotonic() < end, got
            time.sleep(0.01)
    finally:
        driver.exit_event.set()
        reader.join()
        os.close(parent)
        os.close(child)
    keys = [each.key for each in got if isinstance(each, events.Key)]
    assert keys == ["a", "b", "up"]
    assert [each.text for each in got if isinstance(each, events.Paste)] == [
        "red text    end" + "slanted"
    ]
