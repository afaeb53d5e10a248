"""A block that guesses tokens (MTP), recorded beside a model's pass: `Graph.drafts`.

It makes the token after next from the next token and what the head read before that. Its cache is
one more layer's, in the pages of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple, Protocol

from edgeinfer.ops import Linear, Op, Recording, RmsNorm, SelectRows, Value
from edgeinfer.quant import Weight
from edgeinfer.segment import Segment


class Draft(NamedTuple):
    """The block, and the norm of every row of a step that it starts from."""

    source: RmsNorm
    block: Segment

    def beside(self, whole: Segment, ops: tuple[Op, ...]) -> Segment:
        """A model that has this draft, of these ops: its block's, for a context and caches.

        The model as it is where it has no pages for the block's cache.
        """
        block = self.block._replace(ops=ops)
        if not set(block.groups) <= set(whole.groups):
            return whole
        at = next(i for i, op in enumerate(whole.ops) if isinstance(op, SelectRows))
        model = (*whole.ops[:at], self.source, *whole.ops[at:])
        residuals = {**whole.residuals, rows_layer(whole): self.source.out}
        return whole._replace(ops=model, residuals=residuals, draft=block)


def rows_layer(segment: Segment) -> int:
    """Where among its residuals a model yields what a draft starts from."""
    return segment.graph.hparams.n_layers + 1


class Recorder(Recording, Protocol):
    """What is needed of a `Graph`."""

    ops: list[Op]
    logits: Value | None
    hidden: Value | None
    _layer: int
    _n_values: int
    _draft: Draft | None

    @property
    def dim(self) -> int: ...
    def has(self, name: str) -> bool: ...
    def rms_norm(self, x: Value, name: str | None) -> Value: ...
    def _weight(self, name: str, *shape: int) -> Weight: ...
    def _record(self, op: Any, dim: int, /, **fields: object) -> Value: ...
    def _times_twin(self, x: Value, name: str) -> Value: ...


def linear_of(g: Recorder, parts: Sequence[Value], name: str, out_dim: int) -> Value:
    """See `Graph.linear_of`."""
    weight = g._weight(f"{name}.weight", out_dim, sum(part.dim for part in parts))
    products, end = list[Value](), 0
    for part in parts:
        start, end = end, end + part.dim
        columns = weight.parts(start, end)
        products.append(g._record(Linear, out_dim, x=part, weight=columns, bias=None))
    return g._times_twin(reduce(g.add, products), name)


def record(g: Recorder) -> Iterator[tuple[str, Value]]:
    """See `Graph.drafts`. Of several blocks the first is taken, of one without its tensors none.

    Nor of one whose first matrix would be cut inside a block: the model runs without.
    """
    n = g.hparams.n_layers
    blk, logits, hidden = f"blk.{n}", g.logits, g.hidden
    if not all(g.has(f"{blk}.{name}.weight") for name in _NAMES) or not _can_be_cut(g, blk):
        return
    g.rms_norm(g.boundary(n - 1), "output_norm")
    source = g.ops.pop()
    assert isinstance(source, RmsNorm)
    entered, start, g._layer = Value(g, g._n_values, g.dim), len(g.ops), n + 1
    g._n_values += 1
    yield blk, entered
    output, read = g.logits, g.hidden
    assert output is not None and read is not None and output is not logits, "it has no head"
    ops, g.ops[start:] = tuple(g.ops[start:]), []
    g._draft = Draft(source, Segment(g, ops, entered, output, read, True))
    g.logits, g.hidden, g._layer = logits, hidden, n


_NAMES = ("nextn.eh_proj", "nextn.enorm", "nextn.hnorm", "attn_norm", "attn_q")


def _can_be_cut(g: Recorder, blk: str) -> bool:
    kind = g._weight(f"{blk}.nextn.eh_proj.weight", g.dim, 2 * g.dim).type
    return kind.is_runnable and g.dim % kind.block == 0
