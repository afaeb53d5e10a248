"""Writes GGUF models of any shape and tensor type with random, well-conditioned weights.

Knows nothing of running them. Also a command: `python -m tests.bench.make_model --help`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edgeinfer.quant import E2M1_DOUBLED, IQ4_VALUES

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# The shape of Llama 3.2 1B with an untied 32k vocabulary: 1.10 B parameters.
LLAMA_1B: dict[str, Any] = dict(
    n_layers=16, dim=2048, n_heads=32, n_kv_heads=8, ffn_dim=8192, vocab=32000
)
# preset: (most matrices, attn_v and ffn_down in layers with more bits, file type id); head Q6_K
PRESETS = {
    "Q4_K_M": ("Q4_K", "Q6_K", 15),
    "Q5_K_M": ("Q5_K", "Q6_K", 17),
    "Q3_K_M": ("Q3_K", "Q5_K", 12),
    "IQ4_XS": ("IQ4_XS", "Q5_K", 30),
}
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32, "MXFP4": 38,
}  # fmt: skip
Q6_K_HEADS = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"}
# What a row that is not a multiple of 256 falls back to.
NARROW = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}  # fmt: skip
HYBRIDS = ("qwen35",)
N_TAPS = 4  # of a convolution
N_CONTROL = 2  # <|bos|> and <|eos|>, after the 256 bytes


def make_model(
    path: str | Path,
    *,
    arch: str = "llama",
    quant: str = "Q4_0",
    n_layers: int = 2,
    dim: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int | None = None,
    ffn_dim: int = 128,
    vocab: int = 320,
    seed: int = 0,
    n_ctx: int = 4096,
    rope_base: float = 10000.0,
    norm_eps: float = 1e-5,
    rope_freqs: bool = False,
    bias: bool | None = None,
    qk_norm: bool | None = None,
    tied: bool = False,
    n_experts: int = 0,
    n_used: int = 0,
    delta_heads: tuple[int, int, int] = (2, 4, 16),
    drafts: bool = False,
    tokenizer: str | Path = "bytes",
    chat_template: str | None = None,
    metadata: Mapping[str, bool | int | float | str | Sequence[int]] | None = None,
) -> Path:
    """Write a model and return its path.

    `quant` is a tensor type or a preset (Q4_K_M, Q5_K_M, Q3_K_M, IQ4_XS); Q4_0 to Q5_1 and IQ4_NL
    get a Q6_K head and MXFP4 one of Q8_0, as published files do. `bias` (q, k, v) and `qk_norm`
    default to what `arch` has. `tokenizer` is "bytes" or a GGUF file to copy one from, which then
    sets `vocab`. `metadata` adds keys. With `n_experts` the feed-forward networks are as many, of
    which `n_used` are chosen. Of the qwen35 family three of four layers are delta nets of
    `delta_heads`: key heads, value heads, and their width; with `drafts` the last block, which has
    to be one of attention, guesses tokens.
    """
    path, rng = Path(path), np.random.default_rng(seed)
    head_dim = head_dim or dim // n_heads
    bias = arch == "qwen2" if bias is None else bias
    qk_norm = arch.startswith("qwen3") if qk_norm is None else qk_norm
    writer = gguf.GGUFWriter(path, arch)
    if tokenizer == "bytes":
        add_byte_tokenizer(writer, vocab)
    else:
        vocab = copy_tokenizer(writer, Path(tokenizer))
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    writer.add_name(f"random {arch} {quant}")
    writer.add_file_type(PRESETS[quant][2] if quant in PRESETS else FILE_TYPES[quant])
    writer.add_block_count(n_layers)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(ffn_dim)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope_base)
    writer.add_layer_norm_rms_eps(norm_eps)
    writer.add_vocab_size(vocab)
    if n_experts:
        writer.add_expert_count(n_experts)
        writer.add_expert_used_count(n_used)
        writer.add_expert_feed_forward_length(ffn_dim)
    is_hybrid = arch in HYBRIDS
    keys = _ssm_keys(arch, *delta_heads) if is_hybrid else {}
    keys |= {f"{arch}.nextn_predict_layers": 1} if drafts else {}
    for key, value in (keys | dict(metadata or {})).items():
        add_value(writer, key, value)

    shapes = dict(
        tensor_shapes(
            n_layers=n_layers, dim=dim, q_dim=n_heads * head_dim, kv_dim=n_kv_heads * head_dim,
            head_dim=head_dim, ffn_dim=ffn_dim, vocab=vocab, rope_freqs=rope_freqs, bias=bias,
            qk_norm=qk_norm, tied=tied, n_experts=n_experts,
            delta_heads=delta_heads if is_hybrid else None, drafts=drafts,
        )
    )  # fmt: skip
    types = {
        name: tensor_type(name, shape, quant, n_layers, tied) for name, shape in shapes.items()
    }
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType[types[name]]
        n_bytes = int(np.prod(shape)) // gguf.GGML_QUANT_SIZES[kind][0]
        n_bytes *= gguf.GGML_QUANT_SIZES[kind][1]
        stored = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), n_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    weights = RandomWeights(rng, sum(int(np.prod(shape)) for shape in shapes.values()))
    for name, shape in shapes.items():
        writer.write_tensor_data(weights.tensor(name, shape, types[name]))
    writer.close()
    return path


def tensor_shapes(
    *,
    n_layers: int,
    dim: int,
    q_dim: int,
    kv_dim: int,
    head_dim: int,
    ffn_dim: int,
    vocab: int,
    rope_freqs: bool,
    bias: bool,
    qk_norm: bool,
    tied: bool,
    n_experts: int,
    delta_heads: tuple[int, int, int] | None,
    drafts: bool = False,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and NumPy-order shapes of all tensors, in file order."""
    yield "token_embd.weight", (vocab, dim)
    if rope_freqs:
        yield "rope_freqs.weight", (head_dim // 2,)
    for i in range(n_layers):
        yield f"blk.{i}.attn_norm.weight", (dim,)
        if delta_heads and i % 4 != 3:
            yield from _delta_shapes(f"blk.{i}", dim, *delta_heads)
        else:
            n_q = 2 * q_dim if delta_heads else q_dim  # a gate for each
            for name, rows in (("attn_q", n_q), ("attn_k", kv_dim), ("attn_v", kv_dim)):
                yield f"blk.{i}.{name}.weight", (rows, dim)
                if bias:
                    yield f"blk.{i}.{name}.bias", (rows,)
            if qk_norm:
                yield f"blk.{i}.attn_q_norm.weight", (head_dim,)
                yield f"blk.{i}.attn_k_norm.weight", (head_dim,)
            yield f"blk.{i}.attn_output.weight", (dim, q_dim)
        yield f"blk.{i}.{'post_attention' if delta_heads else 'ffn'}_norm.weight", (dim,)
        stack, suffix = ((n_experts,), "_exps") if n_experts else ((), "")
        if n_experts:
            yield f"blk.{i}.ffn_gate_inp.weight", (n_experts, dim)
        yield f"blk.{i}.ffn_gate{suffix}.weight", (*stack, ffn_dim, dim)
        yield f"blk.{i}.ffn_up{suffix}.weight", (*stack, ffn_dim, dim)
        yield f"blk.{i}.ffn_down{suffix}.weight", (*stack, dim, ffn_dim)
    if drafts:
        yield f"blk.{n_layers - 1}.nextn.eh_proj.weight", (dim, 2 * dim)
        for name in ("enorm", "hnorm", "shared_head_norm"):
            yield f"blk.{n_layers - 1}.nextn.{name}.weight", (dim,)
    yield "output_norm.weight", (dim,)
    if not tied:
        yield "output.weight", (vocab, dim)


def _delta_shapes(
    blk: str, dim: int, n_k: int, n_v: int, size: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    n_channels, v_dim = (2 * n_k + n_v) * size, n_v * size
    yield f"{blk}.attn_qkv.weight", (n_channels, dim)
    yield f"{blk}.attn_gate.weight", (v_dim, dim)
    yield f"{blk}.ssm_conv1d.weight", (n_channels, N_TAPS)
    yield f"{blk}.ssm_dt.bias", (n_v,)
    yield f"{blk}.ssm_a", (n_v,)
    yield f"{blk}.ssm_alpha.weight", (n_v, dim)
    yield f"{blk}.ssm_beta.weight", (n_v, dim)
    yield f"{blk}.ssm_norm.weight", (size,)
    yield f"{blk}.ssm_out.weight", (dim, v_dim)


def _ssm_keys(arch: str, n_k: int, n_v: int, size: int) -> dict[str, Any]:
    keys = {
        "conv_kernel": N_TAPS, "inner_size": n_v * size, "state_size": size,
        "time_step_rank": n_v, "group_count": n_k,
    }  # fmt: skip
    return {
        f"{arch}.rope.dimension_sections": [1, 1, 1, 0],  # text has one position
        **{f"{arch}.ssm.{name}": value for name, value in keys.items()},
    }


def tensor_type(name: str, shape: tuple[int, ...], quant: str, n_layers: int, tied: bool) -> str:
    """The type that a tensor has in a file of this quantisation."""
    if len(shape) == 1 or "ffn_gate_inp" in name or "ssm_conv1d" in name:
        return "F32"
    is_head = name == "output.weight" or (tied and name == "token_embd.weight")
    kind, better, _ = PRESETS.get(quant, (quant, quant, 0))
    if name.endswith(("attn_v.weight", "ffn_down.weight", "ffn_down_exps.weight")):
        layer = int(name.split(".")[1])
        kind = better if has_more_bits(layer, n_layers) else kind
    if is_head:
        kind = "Q6_K" if quant in PRESETS or quant in Q6_K_HEADS else kind
        kind = "Q8_0" if quant == "MXFP4" else kind
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    return NARROW.get(kind, kind) if shape[-1] % block else kind


def has_more_bits(layer: int, n_layers: int) -> bool:
    """Whether a K-quant mix gives this layer's attn_v and ffn_down the better type."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


class RandomWeights:
    """Makes tensors: small models weight by weight, large ones out of a pool per type and width."""

    def __init__(self, rng: np.random.Generator, n_params: int) -> None:
        self._rng = rng
        # Drawing and quantising 1 B weights one by one takes minutes.
        self._pool_size = 1 << 22 if n_params > 1 << 25 else 0
        self._pools: dict[tuple[str, int, float], Bytes] = {}

    def tensor(self, name: str, shape: tuple[int, ...], kind: str) -> Bytes:
        """The stored bytes, (rows, bytes per row)."""
        if name.endswith(".bias"):
            values = 0.1 * self._normal(shape)
        elif name == "rope_freqs.weight":
            values = np.geomspace(1, 8, shape[0], dtype=np.float32)
        elif name.endswith(".ssm_a"):  # states fade
            values = -0.1 * (1 + 0.1 * self._normal(shape))
        elif len(shape) == 1:
            values = 1 + 0.1 * self._normal(shape)
        else:
            scale = 1.0 if name == "token_embd.weight" else shape[-1] ** -0.5
            return self._matrix(int(np.prod(shape[:-1])), shape[-1], kind, scale)
        return values.view(np.uint8)

    def _matrix(self, n_rows: int, width: int, kind: str, scale: float) -> Bytes:
        if not self._pool_size:
            return quantize(scale * self._normal((n_rows, width)), kind)
        n_pool = max(1, self._pool_size // width)
        key = (kind, width, scale)
        if key not in self._pools:
            self._pools[key] = quantize(scale * self._normal((n_pool, width)), kind)
        rows = (np.arange(n_rows) + self._rng.integers(n_pool)) % n_pool
        return self._pools[key][rows]

    def _normal(self, shape: tuple[int, ...]) -> Floats:
        return self._rng.standard_normal(shape, dtype=np.float32)


def quantize(values: Floats, kind: str) -> Bytes:
    """The blocks of `values` (rows, K) in a tensor type, as (rows, bytes per row)."""
    pack = _PACK.get(kind)
    if pack is None:
        packed = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        return np.ascontiguousarray(packed).view(np.uint8).reshape(len(values), -1)
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    parts = np.array_split(values.reshape(-1, block), 1 + (values.size >> 20))
    return np.concatenate([pack(part) for part in parts]).reshape(len(values), -1)


# The blocks' byte layouts are described in edgeinfer/dequantize.py.


def _pack_q2_k(x: Floats) -> Bytes:
    q, scale, low, d, dmin = _scale_and_min(x.reshape(-1, 16, 16), n_quants=3, n_scales=15)
    return np.concatenate([scale | low << 4, _pack_pairs(q), d, dmin], axis=1)


def _pack_q3_k(x: Floats) -> Bytes:
    q, scale, d = _scale_only(x.reshape(-1, 16, 16), half=4, half_scales=32)
    q, scale = (q + 4).astype(np.uint8), (scale + 32).astype(np.uint8)
    third = np.packbits((q >> 2).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    low = scale[:, :8] & 15 | (scale[:, 8:] & 15) << 4
    fields = (scale >> 4).reshape(-1, 4, 4)
    high = np.bitwise_or.reduce(fields << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=1)
    return np.concatenate([third, _pack_pairs(q & 3), low, high, d], axis=1)


def _pack_q4_k(x: Floats) -> Bytes:
    q, scale, low, d, dmin = _scale_and_min(x.reshape(-1, 8, 32), n_quants=15, n_scales=63)
    return np.concatenate([d, dmin, _pack_scales(scale, low), _pack_nibbles(q, 32)], axis=1)


def _pack_q5_k(x: Floats) -> Bytes:
    q, scale, low, d, dmin = _scale_and_min(x.reshape(-1, 8, 32), n_quants=31, n_scales=63)
    fifth = np.packbits((q >> 4).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    nibbles = _pack_nibbles(q & 15, 32)
    return np.concatenate([d, dmin, _pack_scales(scale, low), fifth, nibbles], axis=1)


def _pack_q6_k(x: Floats) -> Bytes:
    q, scale, d = _scale_only(x.reshape(-1, 16, 16), half=32, half_scales=128)
    q = (q + 32).astype(np.uint8)
    low, high = _pack_nibbles(q & 15, 64), _pack_pairs(q >> 4)
    return np.concatenate([low, high, scale.astype(np.int8).view(np.uint8), d], axis=1)


def _pack_iq4_nl(x: Floats) -> Bytes:
    d, d_bytes = _half(_largest(x) / -127)
    return np.concatenate([d_bytes, _pack_nibbles(_nearest(x, d, IQ4_VALUES), 16)], axis=1)


def _pack_iq4_xs(x: Floats) -> Bytes:
    sub_blocks = x.reshape(-1, 8, 32)
    step = _largest(sub_blocks)[:, :, 0] / -127
    d, d_bytes = _half(np.abs(step).max(axis=1, keepdims=True) / 31)
    scale = _ratio(step, d, 31, -32)
    nibbles = _nearest(sub_blocks, (d * scale)[:, :, None], IQ4_VALUES)
    fields = (scale + 32).astype(np.uint8)
    high = fields.reshape(-1, 2, 4) >> 4 << np.arange(0, 8, 2, dtype=np.uint8)
    low = fields[:, ::2] & 15 | (fields[:, 1::2] & 15) << 4
    return np.concatenate(
        [
            d_bytes,
            np.bitwise_or.reduce(high, axis=2),
            low,
            _pack_nibbles(nibbles.reshape(len(x), 256), 16),
        ],
        axis=1,
    )


def _pack_mxfp4(x: Floats) -> Bytes:
    largest = np.abs(_largest(x))
    # 6 is the largest element: the power of two that lets the largest weight be 4 to 8 of it.
    power = np.frexp(largest)[1] - 3
    exponent = np.where(largest > 0, np.clip(power + 127, 0, 254), 0).astype(np.uint8)
    d = np.ldexp(np.float32(1), exponent.astype(np.int32) - 128).astype(np.float32)
    return np.concatenate([exponent, _pack_nibbles(_nearest(x, d, E2M1_DOUBLED), 16)], axis=1)


_PACK: dict[str, Callable[[Floats], Bytes]] = {
    "Q2_K": _pack_q2_k,
    "Q3_K": _pack_q3_k,
    "Q4_K": _pack_q4_k,
    "Q5_K": _pack_q5_k,
    "Q6_K": _pack_q6_k,
    "IQ4_NL": _pack_iq4_nl,
    "IQ4_XS": _pack_iq4_xs,
    "MXFP4": _pack_mxfp4,
}


def _scale_and_min(
    x: Floats, n_quants: int, n_scales: int
) -> tuple[Bytes, Bytes, Bytes, Bytes, Bytes]:
    """q, scale, low, d, dmin with x about d * scale * q - dmin * low, per sub-block (axis 1)."""
    lowest = np.minimum(x.min(axis=2), 0)
    step = (x.max(axis=2) - lowest) / n_quants
    d, d_bytes = _half(step.max(axis=1, keepdims=True) / n_scales)
    dmin, dmin_bytes = _half(-lowest.min(axis=1, keepdims=True) / n_scales)
    scale, low = _ratio(step, d, n_scales), _ratio(-lowest, dmin, n_scales)
    shifted = x + (dmin * low)[:, :, None]
    q = _ratio(shifted, (d * scale)[:, :, None], n_quants)
    to_bytes = [array.astype(np.uint8) for array in (q.reshape(len(x), -1), scale, low)]
    return to_bytes[0], to_bytes[1], to_bytes[2], d_bytes, dmin_bytes


def _scale_only(x: Floats, half: int, half_scales: int) -> tuple[Floats, Floats, Bytes]:
    """q in [-half, half), scale in [-half_scales, half_scales) and d: x about d * scale * q."""
    step = np.abs(x).max(axis=2) / (half - 1)
    d, d_bytes = _half(step.max(axis=1, keepdims=True) / (half_scales - 1))
    scale = _ratio(step, d, half_scales - 1)
    q = _ratio(x, (d * scale)[:, :, None], half - 1, -half)
    return q.reshape(len(x), -1), scale, d_bytes


def _ratio(a: Floats, b: Floats, high: int, low: int = 0) -> Floats:
    """a / b rounded and clipped, 0 where b is 0."""
    rounded = np.rint(np.divide(a, b, out=np.zeros_like(a), where=b != 0))
    return np.clip(rounded, low, high)


def _largest(x: Floats) -> Floats:
    """The value farthest from 0 of every last axis, which stays as one of length 1."""
    at = np.abs(x).argmax(axis=-1, keepdims=True)
    return np.take_along_axis(x, at, axis=-1)


def _nearest(x: Floats, d: Floats, table: Sequence[int]) -> Bytes:
    """The place in a table of the value nearest to x / d; that of 0 or 1 where d is 0."""
    order = np.argsort(table, kind="stable")
    values = np.array(table, np.float32)[order]
    ratio = np.divide(x, d, out=np.zeros_like(x), where=d != 0)
    nearest = np.searchsorted((values[1:] + values[:-1]) / 2, ratio)
    places: Bytes = order.astype(np.uint8)[nearest]
    return places


def _half(values: Floats) -> tuple[Floats, Bytes]:
    """Values as float16 holds them, and the bytes."""
    halves = values.astype("<f2")
    return halves.astype(np.float32), halves.view(np.uint8)


def _pack_nibbles(q: Bytes, run: int) -> Bytes:
    runs = q.reshape(len(q), -1, 2, run)
    return (runs[:, :, 0] | runs[:, :, 1] << 4).reshape(len(q), -1)


def _pack_pairs(q: Bytes) -> Bytes:
    runs = q.reshape(len(q), -1, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(runs, axis=2).reshape(len(q), -1)


def _pack_scales(scale: Bytes, low: Bytes) -> Bytes:
    first = scale[:, :4] | scale[:, 4:] >> 4 << 6
    second = low[:, :4] | low[:, 4:] >> 4 << 6
    return np.concatenate([first, second, scale[:, 4:] & 15 | (low[:, 4:] & 15) << 4], axis=1)


def add_byte_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """A byte-level BPE: 256 bytes, two control tokens, a few merges, fillers up to `vocab`."""
    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "e r", "o n", "Ġa n"]
    tokens = [*byte_letters(), "<|bos|>", "<|eos|>"]
    tokens += [merge.replace(" ", "") for merge in merges]
    if vocab < len(tokens):
        raise ValueError(f"vocab is {vocab}, the byte tokenizer needs at least {len(tokens)}")
    tokens += [f"tok{i}" for i in range(len(tokens), vocab)]
    kinds = [gguf.TokenType.NORMAL] * vocab
    kinds[256 : 256 + N_CONTROL] = [gguf.TokenType.CONTROL] * N_CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(True)


def byte_letters() -> list[str]:
    """The character that stands for each byte in a byte-level BPE vocabulary."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, extra = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in printable else extra))
        extra += byte not in printable
    return letters


def copy_tokenizer(writer: gguf.GGUFWriter, source: Path) -> int:
    """Copy all tokenizer keys of a GGUF file; returns the number of tokens."""
    from edgeinfer.gguf import Array, GGUFFile

    with GGUFFile.open(source) as file:
        for key, value in file.metadata.items():
            if key.startswith("tokenizer."):
                if isinstance(value, Array):
                    kind = value.item_type.upper()
                    items = value.bytes() if kind == "STRING" else value.tolist()
                    sub_type = gguf.GGUFValueType[kind]
                    writer.add_key_value(key, items, gguf.GGUFValueType.ARRAY, sub_type=sub_type)
                else:
                    add_value(writer, key, value)
        return len(file.metadata.get_array("tokenizer.ggml.tokens"))


def add_value(
    writer: gguf.GGUFWriter, key: str, value: bool | int | float | str | Sequence[int]
) -> None:
    """Add one key with the GGUF type that fits the Python type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
    elif isinstance(value, float):
        is_far = 0 < abs(value) < 1e-37 or 3e38 < abs(value) < float("inf")  # of a float32
        writer.add_float64(key, value) if is_far else writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random GGUF model; default shape 1.10 B.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--arch", default="llama")
    parser.add_argument("--quant", default="Q4_0", choices=[*FILE_TYPES, *PRESETS])
    for name, default in LLAMA_1B.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--delta-heads", type=int, nargs=3, default=(16, 16, 128))
    for name in ("--n-experts", "--n-used"):
        parser.add_argument(name, type=int, default=0)
    parser.add_argument("--n-ctx", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rope-base", type=float, default=10000.0)
    for name in ("--rope-freqs", "--bias", "--qk-norm", "--tied", "--drafts"):
        default = None if name in ("--bias", "--qk-norm") else False
        parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default)
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or a GGUF file to copy from")
    options = vars(parser.parse_args())
    start = time.perf_counter()
    path = make_model(options.pop("path"), **options)
    seconds = time.perf_counter() - start
    print(f"{path}: {path.stat().st_size / 2**20:.0f} MiB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
