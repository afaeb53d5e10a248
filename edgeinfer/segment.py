"""A range of layers of a recorded graph, and what it keeps of sequences. Knows no file format."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from edgeinfer.errors import InvalidRequestError, UnsupportedModelError
from edgeinfer.ops import (
    KV,
    Attention,
    Conv,
    DeltaNet,
    KVType,
    Op,
    Recording,
    Rotate,
    SelectRows,
    State,
    Value,
    inputs,
)


class Segment(NamedTuple):
    """A range of layers of one graph, the unit that a backend compiles.

    `input` is None where the segment starts with token ids, else the residual stream that enters
    it. `output` is the value it yields: logits of the selected rows, or the residual stream.
    `hidden` is what steps yield that want no logits: what the head reads, or the output.
    `residuals` are the streams that enter some layers, by layer, which steps may yield beside it.
    `draft` guesses tokens with weights and pages of this one: see `edgeinfer.draft`.
    """

    graph: Recording
    ops: tuple[Op, ...]
    input: Value | None
    output: Value
    hidden: Value
    is_last: bool
    residuals: Mapping[int, Value] = MappingProxyType({})
    draft: Segment | None = None

    @property
    def kept(self) -> set[Value]:
        """The values that are read once the step is done: no other may lie in their place."""
        return {self.output, self.hidden, *self.residuals.values()}

    @property
    def caches(self) -> dict[int, KV]:
        """The caches that layers of this segment fill, by layer."""
        attentions = [op for op in self.ops if isinstance(op, Attention)]
        return {op.layer: op.cache for op in attentions if op.source is None}

    @property
    def groups(self) -> dict[int, dict[int, KV]]:
        """The caches by window, ascending: each group has page tables of its own."""
        groups: dict[int, dict[int, KV]] = {}
        for layer, cache in sorted(self.caches.items(), key=lambda item: (item[1].window, item[0])):
            groups.setdefault(cache.window, {})[layer] = cache
        return groups

    @property
    def windows(self) -> list[int]:
        """Of the groups, and of those of the draft, ascending."""
        of_draft = self.draft.groups if self.draft else {}
        return sorted({**self.groups, **of_draft})

    @property
    def states(self) -> dict[int, tuple[State, ...]]:
        """What a state slot holds of a sequence: the states of each layer, in the ops' order."""
        states: dict[int, tuple[State, ...]] = {}
        for op in self.ops:
            if isinstance(op, (Conv, DeltaNet)):
                states[op.layer] = (*states.get(op.layer, ()), op.state)
        return states

    def for_context(self, n_ctx: int, kv_types: tuple[KVType, KVType]) -> Segment:
        """The same of a whole model, for contexts of a length and caches of these types."""
        ops = self.graph.ops_for(n_ctx, kv_types)
        if self.draft is None:
            return self._replace(ops=ops)
        made = {op.out for op in ops}
        added = [op for op in self.ops if op.out not in made]
        at = next(i for i, op in enumerate(ops) if isinstance(op, SelectRows))
        block = self.draft._replace(ops=self.graph.ops_for(n_ctx, kv_types, of_draft=True))
        return self._replace(ops=(*ops[:at], *added, *ops[at:]), draft=block)

    def cut(self, layer: int) -> tuple[Segment, Segment]:
        """The layers before `layer`, and those from it on.

        What guesses tokens stays with the head. UnsupportedModelError where these layers read more
        of the others than the stream that leaves them.
        """
        stream = self.graph.boundary(layer - 1)
        before = tuple(op for op in self.ops if op.layer < layer)
        after = tuple(op for op in self.ops if op.layer >= layer)
        assert before and after, f"a segment can't be cut at layer {layer}"
        made = {op.out for op in before} | ({self.input} if self.input else set())
        read = {value for op in after for value in inputs(op)}
        caches = {op.source for op in after if isinstance(op, Attention)} - {None}
        if (made & read) - {stream} or caches & {op.layer for op in before}:
            raise UnsupportedModelError(
                f"layer {layer} reads more of those before it than their output: this model can't "
                "be split there; choose another number of layers"
            )
        early = {i: value for i, value in self.residuals.items() if value in made}
        late = {i: value for i, value in self.residuals.items() if value not in made}
        first = self._replace(
            ops=before, output=stream, hidden=stream, is_last=False, residuals=early, draft=None
        )
        return first, self._replace(ops=after, input=stream, residuals=late)


def of_types(op: Op, kv_types: tuple[KVType, KVType]) -> Op:
    if not isinstance(op, Attention) or kv_types == ("f16", "f16"):
        return op
    k_type, v_type = kv_types
    if op.cache.k_is_v and k_type != v_type:
        raise InvalidRequestError(
            f"K is {k_type} and V is {v_type}, but in layer {op.layer} K serves as V; give one "
            "type for both",
            param="kv_type",
        )
    return op._replace(cache=op.cache._replace(k_type=k_type, v_type=v_type))


def in_context(op: Op, n_ctx: int) -> Op:
    if not isinstance(op, Rotate) or op.rope.longer is None:
        return op
    return op._replace(rope=op.rope.in_context(n_ctx))
