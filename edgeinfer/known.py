"""What a backend says that it knows of ops, and the error, at load and by name, for all else."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NoReturn, TypeAlias

from edgeinfer.errors import UnsupportedModelError
from edgeinfer.graph import (
    KV,
    Attention,
    Conv,
    DeltaNet,
    ExpertLinear,
    ExpertSum,
    Op,
    Rotate,
    Route,
    Segment,
    SelectRows,
    Value,
    inputs,
)
from edgeinfer.quant import Weight

# The fields of each op and of what ops hold, by type; and the values that a field may have, where
# these are names. Everything else is refused.
Known: TypeAlias = Mapping[type, Mapping[str, Container[str] | None]]


# Ops that need every row of a step.
_OF_ALL_ROWS = (
    Attention, Rotate, Route, ExpertLinear, ExpertSum, Conv, DeltaNet, SelectRows
)  # fmt: skip


def fields(names: str, **values: Container[str]) -> dict[str, Container[str] | None]:
    """An entry of `Known`: names of fields, and for some of them the values they may have."""
    return {**dict.fromkeys(names.split()), **values}


def check(segment: Segment, known: Known, backend: str) -> None:
    """UnsupportedModelError for the first op, field or value that a backend does not know.

    In the block that guesses tokens, too.
    """
    makers: dict[Value, Op] = {}
    unsure: dict[type, list[tuple[int, str]]] = {}
    for op in segment.ops:
        makers[op.out] = op
        for record in _records(op):
            kind = type(record)
            if kind not in unsure:
                if kind not in known:
                    refuse(op, makers, backend, f"has no kernel for {kind.__name__}")
                unsure[kind] = _unsure(kind, known)
            for i, name in unsure[kind]:
                _check_field(op, record, i, name, known, makers, backend)
    _check_rows(segment, makers, backend)
    _check_caches(segment, makers, backend)
    if segment.draft is not None:
        check(segment.draft, known, backend)


def selected(segment: Segment) -> set[Value]:
    """The values that have a row for each wanted output, not for each input of a step."""
    found: set[Value] = set()
    for op in segment.ops:
        if isinstance(op, SelectRows) or (found and not found.isdisjoint(inputs(op))):
            found.add(op.out)
    return found


def where(op: Op, makers: Mapping[Value, Op]) -> str:
    """An op in words: its name, its layer, and the tensor that is nearest to it."""
    n_layers = op.out.graph.hparams.n_layers
    place = "layer " + str(op.layer) if 0 <= op.layer < n_layers else "head"
    place = "embedding" if op.layer < 0 else place
    tensor = _nearest_tensor(op, makers)
    return f"{type(op).__name__} in {place}" + (f" ({tensor})" if tensor else "")


def refuse(op: Op, makers: Mapping[Value, Op], backend: str, what: str) -> NoReturn:
    """Say which op a backend can't run, and why."""
    raise UnsupportedModelError(
        f"{where(op, makers)}: the {backend} backend {what}",
        architecture=op.out.graph.hparams.architecture,
        missing=[f"{type(op).__name__}: {what}"],
    )


def _records(op: Op) -> list[tuple[object, ...]]:
    """An op and all that it holds, as a rope and what that holds."""
    records: list[tuple[object, ...]] = [op]
    for record in records:
        records += [field for field in record if isinstance(field, tuple)]
    return records


def _unsure(kind: type, known: Known) -> list[tuple[int, str]]:
    """The fields of a type, by place and name, that are not known with whatever they hold."""
    names: tuple[str, ...] = getattr(kind, "_fields", ())
    sure = {"layer", "out", *(name for name, values in known[kind].items() if values is None)}
    return [(i, name) for i, name in enumerate(names) if name not in sure]


def _check_field(
    op: Op,
    record: tuple[object, ...],
    i: int,
    name: str,
    known: Known,
    makers: Mapping[Value, Op],
    backend: str,
) -> None:
    """`record` is the op or something it holds. A field at its default is as if it were not there.

    NOTE: a new field of an op needs a default that changes nothing, or every backend refuses it.
    """
    kind, value = type(record), record[i]
    values = known[kind].get(name)
    if values is not None:
        if value not in values:
            refuse(op, makers, backend, f"does not know {name} {value!r} of {kind.__name__}")
        return
    defaults: dict[str, object] = getattr(kind, "_field_defaults", {})
    if name not in defaults or value != defaults[name]:
        refuse(op, makers, backend, f"does not know {name} of {kind.__name__}")


def _check_rows(segment: Segment, makers: Mapping[Value, Op], backend: str) -> None:
    """Every op reads rows of one kind, and what the segment yields has the kind it must have."""
    found = selected(segment)
    for op in segment.ops:
        values = inputs(op)
        if found.isdisjoint(values):
            continue
        if not found.issuperset(values):
            refuse(op, makers, backend, "can't combine selected rows and all rows")
        if isinstance(op, _OF_ALL_ROWS):
            refuse(op, makers, backend, "can't do that to selected rows")
    for value in (segment.output, segment.hidden):
        if (value in found) != segment.is_last and value in makers:
            what = "needs rows selected before the head" if segment.is_last else "yields all rows"
            refuse(makers[value], makers, backend, what)
    for value in segment.residuals.values():
        if value in found:
            refuse(makers[value], makers, backend, "yields all rows of a residual stream")


def _check_caches(segment: Segment, makers: Mapping[Value, Op], backend: str) -> None:
    """A layer fills one cache, or reads one like it that an earlier layer has filled."""
    filled: dict[int, KV] = {}
    for op in segment.ops:
        if not isinstance(op, Attention):
            continue
        has_k, has_v = op.k is not None, op.v is not None
        if has_k == (op.source is not None) or has_v != (has_k and not op.cache.k_is_v):
            refuse(op, makers, backend, "needs keys and values, or a layer that has them")
        if op.cache.k_is_v and op.cache.v_dim > op.cache.k_dim:
            refuse(op, makers, backend, "takes values out of keys that are as wide")
        if op.source is None:
            if op.layer in filled:
                refuse(op, makers, backend, "keeps one cache a layer, and this is the second")
            filled[op.layer] = op.cache
        elif filled.get(op.source) != op.cache:
            what = f"needs a cache like its own in layer {op.source}, filled before it"
            refuse(op, makers, backend, what)


def _nearest_tensor(op: Op, makers: Mapping[Value, Op]) -> str:
    seen, waiting = set[Value](), [op]
    while waiting:
        each = waiting.pop(0)
        weight = next((field for field in each if isinstance(field, Weight)), None)
        if weight is not None:
            return weight.name
        for value in inputs(each):
            if value in makers and value not in seen:
                seen.add(value)
                waiting.append(makers[value])
    return ""
