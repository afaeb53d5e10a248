"""Tensors as KServe's protocol has them, in JSON or as bytes behind it: see "binary tensor data".

Whatever a client sends is checked here; ApiError names what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.fields import Fields
from edgeinfer.server.wire import decode, encode, floats

LENGTH_HEADER = "inference-header-content-length"
_MOST_SIZE = 2**31 - 1  # of a dimension
_MOST_DIMENSIONS = 8
_MOST_ELEMENTS = 2048


class Output(NamedTuple):
    """A tensor of a reply: texts, or numbers (float32)."""

    name: str
    values: Sequence[str] | NDArray[np.float32]
    is_binary: bool = False


def read_body(body: bytes, json_length: str | None) -> tuple[Fields, bytes]:
    """A request and the bytes behind it, of which a header gives the length of the JSON."""
    if json_length is None:
        return Fields(decode(body)), b""
    if not (json_length.isascii() and json_length.isdecimal()) or len(json_length) > 10:
        raise _wrong(f"{LENGTH_HEADER} is {json_length[:80]!r}; it must be a number of bytes")
    n_bytes = int(json_length)
    if n_bytes > len(body):
        raise _wrong(f"{LENGTH_HEADER} is {n_bytes}, and the body has {len(body)} bytes")
    return Fields(decode(body[:n_bytes])), body[n_bytes:]


def read_texts(inputs: Sequence[Fields], behind: bytes, name: str) -> list[str]:
    """The texts of the input `name`, which is the only one that there may be."""
    found: list[str] | None = None
    start = 0
    for each in inputs:
        if each.text("name") != name or found is not None:
            raise each.wrong("name", f"{name!r}, and there is one such input")
        if each.text("datatype") != "BYTES":
            raise each.wrong("datatype", "'BYTES'")
        n_needed = math.prod(_shape(each))
        if n_needed > _MOST_ELEMENTS:
            raise each.wrong("shape", f"of at most {_MOST_ELEMENTS} elements")
        parameters = each.object("parameters")
        if "binary_data_size" in parameters:
            size = parameters.integer("binary_data_size", 0, 0, len(behind) - start)
            if "data" in each:
                raise _wrong(f"input {name} has both data and binary_data_size")
            texts = list(islice(_texts_in(behind[start : start + size], name), n_needed + 1))
            start += size
        else:
            texts = _flat(each)
        if n_needed != len(texts):
            more = " or more" if len(texts) > n_needed else ""
            raise each.wrong("shape", f"that of {len(texts)}{more} elements, which the input has")
        found = texts
    if found is None:
        raise _wrong(f"inputs has no {name!r}, which is needed")
    if start != len(behind):
        raise _wrong(f"{len(behind) - start} bytes behind the JSON belong to no input")
    return found


def _shape(given: Fields) -> list[int]:
    shape = given.get("shape")
    is_list = isinstance(shape, list) and 0 < len(shape) <= _MOST_DIMENSIONS
    if not is_list or not all(type(n) is int and 0 <= n <= _MOST_SIZE for n in shape):
        raise given.wrong("shape", f"1 to {_MOST_DIMENSIONS} numbers from 0 to {_MOST_SIZE}")
    found: list[int] = shape
    return found


def _flat(given: Fields) -> list[str]:
    """The texts of a list, or of lists of lists."""
    pending, found = [given.get("data")], []
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += reversed(value)
        elif isinstance(value, str):
            found.append(value)
        else:
            raise given.wrong("data", "texts, or binary_data_size says how many bytes they are")
    if not isinstance(given.get("data"), list):
        raise given.wrong("data", "a list")
    return found


def _texts_in(data: bytes, name: str) -> Iterator[str]:
    """Each is its length in 4 bytes, the lowest first, and so many bytes of UTF-8."""
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        end = at + 4 + length
        if at + 4 > len(data) or end > len(data):
            raise _wrong(
                f"the bytes of input {name} end inside an element: byte {at} of {len(data)} begins "
                f"one of {length} bytes"
            )
        try:
            yield data[at + 4 : end].decode()
        except UnicodeDecodeError as error:
            raise _wrong(f"an element of input {name} is no UTF-8: {error.reason}") from None
        at = end


def write(head: Json, outputs: Sequence[Output]) -> Response:
    """A reply with these tensors, the binary ones behind its JSON."""
    told: list[Json] = []
    behind: list[bytes] = []
    for output in outputs:
        values = output.values
        is_numbers = isinstance(values, np.ndarray)
        shape = list(values.shape) if isinstance(values, np.ndarray) else [len(values)]
        each: Json = {
            "name": output.name, "datatype": "FP32" if is_numbers else "BYTES", "shape": shape
        }  # fmt: skip
        if output.is_binary:
            behind.append(_bytes_of(values))
            each["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            each["data"] = floats(values.ravel()) if isinstance(values, np.ndarray) else values
        told.append(each)
    text = encode({**head, "outputs": told})
    if not behind:
        return Response(text, media_type="application/json")
    headers = {LENGTH_HEADER: str(len(text))}
    return Response(b"".join([text, *behind]), 200, headers, "application/octet-stream")


def _bytes_of(values: Sequence[str] | NDArray[Any]) -> bytes:
    if isinstance(values, np.ndarray):
        return values.astype("<f4").tobytes()
    encoded = [text.encode("utf-8", "replace") for text in values]
    return b"".join(len(data).to_bytes(4, "little") + data for data in encoded)


def _wrong(message: str) -> ApiError:
    return ApiError(400, message, param="inputs")
