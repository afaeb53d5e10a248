"""Damages GGUF files in their structure, and runs the damaged ones through everything that reads.

    python -m tests.damage_gguf FOLDER --first 0 --count 1000 [--vocabulary FILE] [--generate 50]

The number of a file decides its damage. Prints a JSON line for each file that ended badly: with an
exception that is none of ours, after more than 2 s of the processor's time, or with more memory
than its size and 100 MiB; then a summary.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO
from unicodedata import category

from edgeinfer.dequantize import dequantize
from edgeinfer.errors import EdgeInferError
from edgeinfer.gguf import Array, GGUFFile, Metadata

from .models_for_tests import tiny_model

MAX_SECONDS = 2.0
MAX_EXTRA_BYTES = 100 << 20
N_VOCAB = 266  # the fewest that the byte tokenizer of tests has
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

NUMBERS = (
    0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 255, 256, 320, 321, 4096, 2**16, 2**20, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1, -1, -2, -(2**31),
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-30, 1e30, 3e38, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    b"", b"a", b"\x00", b"\xff\xfe", b"<0x0A>", b"<0xZZ>", b"<unk>", b"<s>", b"</s>", b"llama",
    b"gpt2", b"gemma4", b"bert", b"qwen2", b"superbpe", b"default", b"linear", b"yarn", b"none",
    "▁".encode(), "é\u202e🦙".encode(), b"\x1b[2J\n", b"x" * 300, b"y" * 70_000, b"z" * (1 << 21),
    b"{{ messages }}", b"{% for m in messages %}{{ m.content }}{% endfor %}", b"{% raw",
    b"{{ 1/0 }}",
)  # fmt: skip
KEYS = tuple(
    key.encode()
    for key in (
        *(f"tokenizer.ggml.{name}" for name in (
            "model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id",
            "eos_token_id", "eos_token_ids", "eot_token_id", "eom_token_id", "unknown_token_id",
            "padding_token_id", "fim_pad_token_id", "add_bos_token", "add_space_prefix",
            "suppress_tokens", "add_eos_token",
        )),
        "tokenizer.chat_template", "tokenizer.chat_template.tool_use", "general.alignment",
        "general.architecture", "general.name", "general.sampling.top_p", "general.sampling.seed",
        "general.sampling.dry_sequence_breakers", "general.license", "split.count", "split.no",
        *(f"llama.{name}" for name in (
            "block_count", "context_length", "embedding_length", "feed_forward_length",
            "attention.head_count", "attention.head_count_kv", "attention.key_length",
            "attention.value_length", "rope.dimension_count", "rope.freq_base",
            "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
            "attention.layer_norm_rms_epsilon", "attention.sliding_window", "expert_count",
            "attention.causal", "logit_scale", "hidden_activation", "vocab_size",
        )),
    )
)  # fmt: skip


# -- a file's structure --------------------------------------------------------------------------


@dataclass
class Value:
    """A metadata value as it is written; `n` is what an array claims, `raw` its bytes."""

    kind: int
    raw: bytes
    item_kind: int = 0
    n: int = 0
    items: list[bytes] = field(default_factory=list)  # of an array, each as it is written

    def written(self) -> bytes:
        if self.kind != ARRAY:
            return self.raw
        return struct.pack("<IQ", self.item_kind & 0xFFFFFFFF, self.n) + b"".join(self.items)


@dataclass
class Tensor:
    name: bytes
    dims: list[int]
    kind: int
    offset: int


@dataclass
class Sound:
    """A file taken apart."""

    keys: list[tuple[bytes, Value]]
    tensors: list[Tensor]
    data: bytes
    version: int = 3

    def copy(self) -> Sound:
        keys = [(name, replace(value, items=list(value.items))) for name, value in self.keys]
        tensors = [replace(tensor, dims=list(tensor.dims)) for tensor in self.tensors]
        return Sound(keys, tensors, self.data, self.version)

    def written(self, n_keys: int | None = None, n_tensors: int | None = None) -> bytes:
        n_keys = len(self.keys) if n_keys is None else n_keys
        n_tensors = len(self.tensors) if n_tensors is None else n_tensors
        head = [struct.pack("<4sIQQ", b"GGUF", self.version & 0xFFFFFFFF, n_tensors, n_keys)]
        for name, value in self.keys:
            head += [string(name), struct.pack("<I", value.kind & 0xFFFFFFFF), value.written()]
        for t in self.tensors:
            head += [string(t.name), struct.pack("<I", len(t.dims))]
            head += [struct.pack("<Q", dim & (2**64 - 1)) for dim in t.dims]
            head += [struct.pack("<IQ", t.kind & 0xFFFFFFFF, t.offset & (2**64 - 1))]
        joined = b"".join(head)
        return joined + bytes(-len(joined) % 32) + self.data


def string(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def number(kind: int, value: float) -> bytes:
    code = CODES[kind]
    if code in "fd":
        try:
            return struct.pack("<" + code, value)
        except OverflowError:
            return struct.pack("<" + code, float("inf"))
    size = struct.calcsize(code)
    value = 0 if value != value or abs(value) == float("inf") else int(value)
    return (value & (2 ** (8 * size) - 1)).to_bytes(size, "little")


def take_apart(raw: bytes) -> Sound:
    """The structure of a sound file."""
    at = 8

    def read(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> bytes:
        nonlocal at
        n = read("Q")
        at += n
        return raw[at - n : at]

    def item(kind: int) -> bytes:
        nonlocal at
        start = at
        if kind == STRING:
            text()
        else:
            at += struct.calcsize(CODES[kind])
        return raw[start:at]

    n_tensors, n_keys = read("Q"), read("Q")
    keys = []
    for _ in range(n_keys):
        name, kind = text(), read("I")
        if kind == ARRAY:
            item_kind, n = read("I"), read("Q")
            items = [item(item_kind) for _ in range(n)]
            keys.append((name, Value(kind, b"", item_kind, n, items)))
        else:
            keys.append((name, Value(kind, item(kind))))
    tensors = []
    for _ in range(n_tensors):
        name = text()
        dims = [read("Q") for _ in range(read("I"))]
        tensors.append(Tensor(name, dims, read("I"), read("Q")))
    return Sound(keys, tensors, raw[at + -at % 32 :])


# -- damage --------------------------------------------------------------------------------------


def damaged(sounds: list[Sound], seed: int) -> bytes:
    """The bytes of file number `seed`."""
    rng = random.Random(seed)
    file = rng.choice(sounds).copy()
    counts: dict[str, int] = {}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
        rng.choice(_STRUCTURAL)(rng, file, counts)
    raw = file.written(**counts)
    if rng.randrange(3) == 0:
        raw = _raw_damage(rng, raw, sounds)
    return raw


def _header(rng: random.Random, file: Sound, counts: dict[str, int]) -> None:
    what = rng.randrange(3)
    if what == 0:
        file.version = rng.choice((0, 1, 2, 4, 3 << 24, 2**32 - 1))
    else:
        name = ("n_keys", "n_tensors")[what - 1]
        n = len(file.keys if what == 1 else file.tensors)
        counts[name] = rng.choice((0, n - 1, n + 1, *(x for x in NUMBERS if x >= 0))) & (2**64 - 1)


def _key(rng: random.Random, file: Sound, counts: dict[str, int]) -> None:
    """Names: another, a twin, none at all, in another place; values exchanged."""
    if not file.keys:
        return
    i, j = rng.randrange(len(file.keys)), rng.randrange(len(file.keys))
    name, value = file.keys[i]
    match rng.randrange(7):
        case 0:
            file.keys[i] = (rng.choice(KEYS), value)
        case 1:
            file.keys[i] = (rng.choice(TEXTS), value)
        case 2:
            del file.keys[i]
        case 3:
            file.keys.insert(j, (name, value))
        case 4:
            other, exchanged = file.keys[j]
            file.keys[i], file.keys[j] = (name, exchanged), (other, value)
        case 5:
            file.keys[i], file.keys[j] = file.keys[j], file.keys[i]
        case _:
            file.keys.append((rng.choice(KEYS), _any_value(rng)))


def _value(rng: random.Random, file: Sound, counts: dict[str, int]) -> None:
    """A value: another number, text or type, an array of another length."""
    if not file.keys:
        return
    i = rng.randrange(len(file.keys))
    name, value = file.keys[i]
    match rng.randrange(5):
        case 0:
            value.kind = rng.choice((*range(14), 99, 2**31))
        case 1:
            value = _any_value(rng)
        case 2 if value.kind in CODES:
            value.raw = number(value.kind, rng.choice((*NUMBERS, *FLOATS)))
        case 2 if value.kind == STRING:
            value.raw = string(rng.choice(TEXTS))
        case _ if value.kind == ARRAY:
            _array(rng, value)
        case _:
            value = _any_value(rng)
    file.keys[i] = (name, value)


def _array(rng: random.Random, value: Value) -> None:
    items = value.items
    match rng.randrange(7):
        case 0:
            value.item_kind = rng.choice((*range(14), 2**31))
        case 1:
            value.n = rng.choice((0, len(items) - 1, len(items) + 1, *NUMBERS)) & (2**64 - 1)
        case 2:
            del items[rng.randrange(len(items) + 1) :]
            value.n = len(items)
        case 3 if items:
            items.extend(rng.choices(items, k=rng.choice((1, 5, 1000))))
            value.n = len(items)
        case 4 if items:
            a, b = rng.randrange(len(items)), rng.randrange(len(items))
            items[a], items[b] = items[b], items[a]
        case _:
            for _ in range(rng.choice((1, 1, 3, 100))):
                if items:
                    items[rng.randrange(len(items))] = _any_item(rng, value.item_kind)


def _any_value(rng: random.Random) -> Value:
    kind = rng.choice((*CODES, STRING, STRING, ARRAY))
    if kind != ARRAY:
        return Value(kind, _any_item(rng, kind))
    item_kind, n = rng.choice((*CODES, STRING)), rng.choice((0, 1, 2, 3, 320))
    return Value(kind, b"", item_kind, n, [_any_item(rng, item_kind) for _ in range(n)])


def _any_item(rng: random.Random, kind: int) -> bytes:
    if kind in CODES:
        return number(kind, rng.choice((*NUMBERS, *FLOATS)))
    return string(rng.choice(TEXTS) if rng.randrange(2) else rng.randbytes(rng.randrange(9)))


def _tensor(rng: random.Random, file: Sound, counts: dict[str, int]) -> None:
    if not file.tensors:
        return
    i, j = rng.randrange(len(file.tensors)), rng.randrange(len(file.tensors))
    a, b = file.tensors[i], file.tensors[j]
    match rng.randrange(9):
        case 0:
            a.dims = [rng.choice(NUMBERS) for _ in range(rng.randrange(6))]
        case 1 if a.dims:
            a.dims[rng.randrange(len(a.dims))] = rng.choice(NUMBERS)
        case 2:
            a.dims = rng.choice((a.dims[::-1], [*a.dims, 1], [1, *a.dims], a.dims[:1]))
        case 3:
            a.kind = rng.choice((*range(45), 2**31))
        case 4:
            a.offset = rng.choice((*NUMBERS, a.offset + 32, a.offset - 32, b.offset))
        case 5:
            a.name, b.name = b.name, a.name
        case 6:
            a.name = rng.choice((b.name, a.name + b"s", *TEXTS[:26]))
        case 7:
            del file.tensors[i]
        case _:
            file.tensors.insert(j, replace(a, dims=list(a.dims)))


def _data(rng: random.Random, file: Sound, counts: dict[str, int]) -> None:
    """Weights: other bytes, which may be NaN or infinite scales."""
    n = len(file.data)
    if n:
        at = rng.randrange(n)
        piece = rng.choice((rng.randbytes(64), b"\xff" * 64, b"\x00\x7c" * 32, b"\x00\xfe" * 512))
        file.data = (file.data[:at] + piece + file.data[at + len(piece) :])[:n]


_STRUCTURAL: tuple[Callable[[random.Random, Sound, dict[str, int]], None], ...] = (
    _header, _key, _key, _value, _value, _value, _tensor, _tensor, _data,
)  # fmt: skip


def _raw_damage(rng: random.Random, raw: bytes, sounds: list[Sound]) -> bytes:
    """Bytes: turned, overwritten by a number, cut off, taken out, doubled, spliced."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if len(out) < 32:
            break
        at = rng.randrange(min(len(out) - 8, 20_000))
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                form = rng.choice(("<Q", "<I"))
                high = 2**64 - 1 if form == "<Q" else 2**32 - 1
                struct.pack_into(form, out, at, rng.choice(NUMBERS) & high)
            case 3:
                del out[rng.randrange(len(out)) :]
            case 4:
                del out[at : at + rng.randrange(1, 64)]
            case 5:
                out[at:at] = out[at : at + rng.randrange(1, 64)]
            case _:
                other = rng.choice(sounds).written()
                out[at:] = other[rng.randrange(len(other)) :]
    return bytes(out)


# -- everything that reads -----------------------------------------------------------------------

MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|im_end|> 12345 é🦙\n"},
]


class Untold(Exception):
    """A file did something that it must not."""


def read_all(path: Path, *, renders: bool, generates: bool) -> int:
    """Put a file through all that reads one; how many of the parts refused it.

    `renders` is for what takes longer: templates, weights, every getter, the facts of `info`.
    """
    n_refused = 0

    def attempt(action: Callable[[], object]) -> Any:
        nonlocal n_refused
        try:
            return action()
        except EdgeInferError as error:
            unseen = any(category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in str(error))
            if unseen or len(str(error)) > 2200:
                raise Untold(f"an error of {len(str(error))} characters") from error
            n_refused += 1
            return None

    from edgeinfer.inspect_file import describe
    from edgeinfer.llm import LLM
    from edgeinfer.load_settings import LoadSettings
    from edgeinfer.model import Model
    from edgeinfer.runtime import plan_model
    from edgeinfer.text.chat import ChatTemplate
    from edgeinfer.text.tokenizer import Tokenizer

    file = attempt(lambda: GGUFFile.open(path))
    if file is None:
        return n_refused
    with file:
        for key in file.metadata:
            attempt(lambda key=key: _read_value(file.metadata[key]))
            if renders:
                for read in _GETTERS:
                    attempt(lambda key=key, read=read: read(file.metadata, key))
        model = attempt(lambda: Model.load(file))
        if model is not None:
            options = LoadSettings.resolve("plan", {"device": "reference", "threads": 1})
            attempt(lambda: plan_model(model, options))
        tokenizer = attempt(lambda: Tokenizer.from_metadata(file.metadata))
        if tokenizer is not None:
            attempt(lambda: _round_trip(tokenizer))
        if renders:
            for weight in file.tensors.values():
                attempt(lambda weight=weight: dequantize(weight))
            texts = () if tokenizer is None else tokenizer.texts
            template = attempt(lambda: ChatTemplate.from_metadata(file.metadata, texts=texts))
            if template is not None:
                attempt(lambda: template.render(MESSAGES))
    if renders:
        attempt(lambda: describe(str(path)))
    if generates and model is not None and tokenizer is not None:
        attempt(lambda: _generate(LLM, path))
    return n_refused


_GETTERS: tuple[Callable[[Metadata, str], object], ...] = (
    Metadata.get_int, Metadata.get_float, Metadata.get_str, Metadata.get_bool,
    Metadata.get_ints, Metadata.get_floats, Metadata.get_bools,
)  # fmt: skip


def _read_value(value: Any) -> None:
    if isinstance(value, Array):
        if value.item_type == "string":
            value.bytes()
        else:
            value.numpy()
            value.tolist()


def _round_trip(tokenizer: Any) -> None:
    for special in (False, True):
        ids = tokenizer.encode("Hi <0x0A> 1234567 é🦙\n\x00 </s>", parse_special=special)
        tokenizer.decode(ids, special=special)
    for id in range(0, tokenizer.n_vocab, max(1, tokenizer.n_vocab // 100)):
        tokenizer.piece(id)
        tokenizer.text(id).encode()
    _ = tokenizer.bos_text + tokenizer.eos_text


def _generate(kind: Any, path: Path) -> None:
    with kind(path, n_ctx=64, threads=1, memory="200M") as llm:
        llm.generate([1, 2, 3], max_tokens=2, temperature=0)


# -- running -------------------------------------------------------------------------------------


def sound_files(folder: Path, vocabulary: Path | None) -> list[Sound]:
    """What is damaged: small models of all architectures, or one with a real vocabulary."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    small: dict[str, Any] = dict(n_layers=1, vocab=N_VOCAB, chat_template=template)
    if vocabulary is not None:
        small |= {"tokenizer": vocabulary}
        return [take_apart(tiny_model(folder, **small).read_bytes())]
    sounds = []
    for arch in ("llama", "qwen2", "qwen3"):
        sounds.append(take_apart(tiny_model(folder, arch=arch, **small).read_bytes()))
    spm = sounds[0].copy()
    spm.keys = [pair for pair in spm.keys if not pair[0].startswith(b"tokenizer.ggml")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcde", "▁a"]
    types = [2, 3, 3, *[6] * 256, *[1] * 7]
    assert len(pieces) == N_VOCAB
    texts = [string(piece.encode()) for piece in pieces]
    scores = [number(6, -i) for i in range(N_VOCAB)]
    spm.keys += [
        (b"tokenizer.ggml.model", Value(STRING, string(b"llama"))),
        (b"tokenizer.ggml.tokens", Value(ARRAY, b"", STRING, N_VOCAB, texts)),
        (b"tokenizer.ggml.scores", Value(ARRAY, b"", 6, N_VOCAB, scores)),
        (
            b"tokenizer.ggml.token_type",
            Value(ARRAY, b"", 5, N_VOCAB, [number(5, t) for t in types]),
        ),
        (b"tokenizer.ggml.eos_token_ids", Value(ARRAY, b"", 5, 2, [number(5, 2), number(5, 9)])),
    ]
    raw = spm.copy()
    raw.keys = [pair for pair in raw.keys if pair[0] not in (b"tokenizer.ggml.model",)]
    raw.keys += [
        (b"tokenizer.ggml.model", Value(STRING, string(b"gemma4"))),
        (b"tokenizer.ggml.merges", Value(ARRAY, b"", STRING, 1, [string("▁ a".encode())])),
    ]
    return [*sounds, spm, raw]


def run(
    folder: Path, numbers: range, sounds: list[Sound], *, render_every: int, generate_every: int
) -> Iterator[dict[str, Any]]:
    """What went wrong with each of the damaged files, and a summary at the end."""
    path, memory = folder / "damaged.gguf", Memory()
    note = (folder / "number").open("wb", buffering=0)
    n_refused = n_whole = 0
    slowest, largest = 0.0, 0
    for i, seed in enumerate(numbers):
        content = damaged(sounds, seed)
        # A new file each time: shrinking one that is still mapped would be a bus error.
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        note.seek(0)
        note.write(b"%-20d" % seed)
        renders, generates = i % render_every == 0, generate_every and i % generate_every == 0
        for _ in range(2):
            before, start, trouble = memory.reset_peak(), time.process_time(), ""
            try:
                refused = read_all(path, renders=renders, generates=bool(generates))
            except Exception:
                refused, trouble = 0, traceback.format_exc()[-1500:]
            seconds, extra = time.process_time() - start, memory.peak() - before
            # Once more where a library was imported or a kernel built, which happens once.
            if seconds < MAX_SECONDS and extra < len(content) + MAX_EXTRA_BYTES:
                break
        n_refused += bool(refused)
        n_whole += not refused
        slowest, largest = max(slowest, seconds), max(largest, extra - len(content))
        if seconds > MAX_SECONDS:
            trouble += f" took {seconds:.1f} s"
        if extra > len(content) + MAX_EXTRA_BYTES:
            trouble += f" took {extra >> 20} MiB"
        if trouble:
            yield {"file": seed, "trouble": trouble}
    yield {
        "files": len(numbers), "refused": n_refused, "whole": n_whole,
        "slowest_s": round(slowest, 3), "largest_mib": largest >> 20,
    }  # fmt: skip


class Memory:
    """This process's resident bytes; 0 where the system does not tell."""

    def __init__(self) -> None:
        try:
            self._clear: BinaryIO | None = open("/proc/self/clear_refs", "wb", buffering=0)
            self._status = open("/proc/self/status", "rb", buffering=0)
        except OSError:
            self._clear = None

    def reset_peak(self) -> int:
        """What is resident now, from which the peak is counted."""
        if self._clear is None:
            return 0
        self._clear.write(b"5")
        return self._read(b"VmRSS:")

    def peak(self) -> int:
        return 0 if self._clear is None else self._read(b"VmHWM:")

    def _read(self, name: bytes) -> int:
        self._status.seek(0)
        status = self._status.read(8192)
        return int(status.partition(name)[2].split(None, 1)[0]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--vocabulary", type=Path)
    parser.add_argument("--render", type=int, default=10, help="templates of every n-th file")
    parser.add_argument("--generate", type=int, default=0, help="run every n-th file")
    parser.add_argument("--limit-mib", type=int, default=4096, help="of address space")
    args = parser.parse_args()
    if sys.platform != "win32":
        import resource

        limit = args.limit_mib << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sounds = sound_files(args.folder, args.vocabulary)
    numbers = range(args.first, args.first + args.count)
    every = dict(render_every=args.render, generate_every=args.generate)
    for line in run(args.folder, numbers, sounds, **every):
        print(json.dumps(line), flush=True)
    os._exit(0)  # not through the clean-up of what damaged files left


if __name__ == "__main__":
    main()
