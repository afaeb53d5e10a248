"""An answer as a response: its object, and the events in the order that clients put together."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable
from typing import Any

from edgeinfer.results import Completion, Delta, Event
from edgeinfer.server.answers import Answer
from edgeinfer.server.blocks import Block, Blocks, Change
from edgeinfer.server.custom_tools import input_of
from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.requests import new_call_id, new_id
from edgeinfer.server.wire import PING, event

_PREFIXES = {"reasoning": "rs_", "text": "msg_", "call": "fc_"}
_CUSTOM = "response.custom_tool_call_input"


class Shape:
    """One response; `echoed` is what it repeats of its request, `custom` has tools of a text."""

    ping = PING

    def __init__(self, answer: Answer, echoed: Json, custom: Container[str] = ()) -> None:
        self._answer, self._blocks, self._custom = answer, Blocks(), custom
        self._head = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": answer.model.name,
            **echoed,
        }
        self._items: list[Json] = []
        self._n_events = self._n_reasoning = 0
        self._logprobs: dict[int, list[Json]] = {}  # by the index of a text's block
        self._latest: list[Json] = []  # of the latest piece of text
        self._waiting: list[Json] = []  # of tokens that have no text yet

    async def whole(self) -> Json:
        await self._answer.collect(self._add)
        self._note(self._blocks.finish())
        return self._finished()

    def begin(self) -> bytes:
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event(kind, response=self._response("in_progress")) for kind in kinds)

    def part(self, i: int, found: Event) -> bytes:
        return self._told(self._add(found)) if isinstance(found, Delta) else b""

    def end(self) -> bytes:
        told = self._told(self._note(self._blocks.finish()))
        response = self._finished()
        return told + self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> bytes:
        code = error.code or "server_error"
        response = self._response("failed", error={"code": code, "message": error.message})
        return self._event("response.failed", response=response)

    # -- items -----------------------------------------------------------------------------------

    def _add(self, delta: Delta) -> list[Change]:
        self._n_reasoning += len(delta.token_ids) if delta.reasoning and not delta.text else 0
        changes = self._note(self._blocks.add(delta))
        if delta.logprobs and (delta.text or not (delta.reasoning or delta.call)):
            self._waiting += self._answer.logprobs_json(delta.logprobs)
        for change in changes:
            if change.kind == "more" and change.block.kind == "text":
                found = self._logprobs.setdefault(change.block.index, [])
                begun = self._waiting if found else _of_text(self._waiting, change.text)
                self._latest, self._waiting = begun, []
                found += begun
        return changes

    def _note(self, changes: list[Change]) -> list[Change]:
        """Items that are begun get their names."""
        for change in changes:
            if change.kind == "begin":
                item: Json = {"id": new_id(_PREFIXES[change.block.kind]), "status": "in_progress"}
                if change.block.kind == "call":
                    item["call_id"] = new_call_id("call_")
                self._items.append(item)
        return changes

    def _item(self, block: Block, status: str, is_empty: bool = False) -> Json:
        item = {**self._items[block.index], "status": status}
        parts = [] if is_empty else [self._part(block)]
        if block.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": parts}
        if block.kind == "text":
            return {**item, "type": "message", "role": "assistant", "content": parts}
        arguments, item = "" if is_empty else block.text, {**item, "name": block.name}
        if block.name in self._custom:
            return {**item, "type": "custom_tool_call", "input": input_of(arguments)}
        return {**item, "type": "function_call", "arguments": arguments}

    def _finished(self) -> Json:
        answer = self._answer.completions[0]
        was_cut = answer.finish_reason == "length"
        status = "incomplete" if was_cut else "completed"
        output = [self._item(block, self._status(block)) for block in self._blocks.all]
        reason = {"reason": "max_output_tokens"} if was_cut else None
        return self._response(
            status, output=output, incomplete_details=reason, usage=self._usage(answer)
        )

    def _status(self, block: Block) -> str:
        """Of a block that is whole: the last one may have been cut off."""
        answer = self._answer.completions.get(0)
        was_cut = answer is not None and answer.finish_reason == "length"
        return "incomplete" if was_cut and block is self._blocks.all[-1] else "completed"

    def _response(self, status: str, **more: Any) -> Json:
        usual: Json = {"output": [], "error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": status, **usual, **more}

    def _usage(self, answer: Completion) -> Json:
        usage = answer.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._n_reasoning},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _part(self, block: Block, is_empty: bool = False) -> Json:
        text = "" if is_empty else block.text
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = [] if is_empty else self._logprobs.get(block.index, [])
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    # -- events ----------------------------------------------------------------------------------

    def _told(self, changes: list[Change]) -> bytes:
        return b"".join(frame for change in changes for frame in self._frames(change))

    def _frames(self, change: Change) -> Iterable[bytes]:
        if change.kind == "begin":
            return self._begun(change.block)
        if change.kind == "end":
            return self._ended(change.block)
        return [self._more(change.block, change.text)]

    def _begun(self, block: Block) -> Iterable[bytes]:
        item = self._item(block, "in_progress", is_empty=True)
        yield self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "call":
            part = self._part(block, is_empty=True)
            yield self._event("response.content_part.added", part=part, **self._place(block))

    def _more(self, block: Block, text: str) -> bytes:
        if block.kind == "call" and block.name in self._custom:
            return b""  # a text that is whole comes at its end
        if block.kind == "call":
            return self._event(
                "response.function_call_arguments.delta", delta=text, **self._place(block)
            )
        if block.kind == "reasoning":
            return self._event("response.reasoning_text.delta", delta=text, **self._place(block))
        place, logprobs = self._place(block), self._latest
        return self._event("response.output_text.delta", delta=text, logprobs=logprobs, **place)

    def _ended(self, block: Block) -> Iterable[bytes]:
        place, text = self._place(block), block.text
        if block.kind == "call" and block.name in self._custom:
            yield self._event(f"{_CUSTOM}.delta", delta=input_of(text), **place)
            yield self._event(f"{_CUSTOM}.done", input=input_of(text), **place)
        elif block.kind == "call":
            yield self._event(
                "response.function_call_arguments.done", arguments=text, name=block.name, **place
            )
        else:
            if block.kind == "reasoning":
                yield self._event("response.reasoning_text.done", text=text, **place)
            else:
                logprobs = self._part(block)["logprobs"]
                yield self._event(
                    "response.output_text.done", text=text, logprobs=logprobs, **place
                )
            yield self._event("response.content_part.done", part=self._part(block), **place)
        item = self._item(block, self._status(block))
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _place(self, block: Block) -> Json:
        place = {"item_id": self._items[block.index]["id"], "output_index": block.index}
        return place if block.kind == "call" else {**place, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        frame = event({"type": kind, "sequence_number": self._n_events, **fields}, kind)
        self._n_events += 1
        return frame


def _of_text(tokens: list[Json], text: str) -> list[Json]:
    """The last of them that spell a text: before it may be those of a tag."""
    n_bytes, n = len(text.encode()), 0
    for each in reversed(tokens):
        if n_bytes <= 0:
            break
        n_bytes, n = n_bytes - len(each["bytes"]), n + 1
    return tokens[len(tokens) - n :]
