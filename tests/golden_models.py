"""Small random models, one or more of each family, that show every feature of its forward pass.

`make_goldens.py` runs them through llama.cpp, `test_families.py` compares. Knows neither.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
from numpy.typing import NDArray

from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Activation, DeltaNet, Op, RmsNorm, Rotate, Scale
from edgeinfer.model import Model

from .bench.blocks import quantize
from .bench.tokenizers import add_byte_tokenizer, add_value

Floats: TypeAlias = NDArray[np.float32]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

VOCAB, DIM, FFN, HEAD, N_HEADS, N_KV = 96, 64, 96, 16, 4, 2
N_PROMPT, N_CTX = 56, 256  # llama.cpp pads a context to 256
PROMPT = [(i * i * 7 + i * 31 + 5) % VOCAB for i in range(N_PROMPT)]
ROWS = [*range(3, N_PROMPT, 4)]  # whose logits are kept
WINDOW = 20


@dataclass
class Draft:
    """A model that is about to be written; edits change it in place."""

    arch: str
    keys: dict[str, Any]  # without the architecture's prefix
    tensors: dict[str, Floats]
    rewrites: list[Callable[[Op], Op]] = field(default_factory=list)  # of what was recorded

    @contextmanager
    def loaded(self, folder: Path, quant: str = "F32") -> Iterator[Model]:
        """The model, whose file is open meanwhile."""
        with GGUFFile.open(self.write(folder / f"{self.arch}.gguf", quant)) as file:
            yield Model.load(file)

    def write(self, path: Path, quant: str = "F32", *, has_tokenizer: bool = False) -> Path:
        """The file, its matrices of a type where rows are whole blocks of 32.

        A tokenizer takes a larger vocabulary than ours.
        """
        writer = gguf.GGUFWriter(path, self.arch)
        if has_tokenizer:
            add_byte_tokenizer(writer, self.keys["vocab_size"])
        else:
            writer.add_tokenizer_model("no_vocab")
        for key, value in self.keys.items():
            add_value(writer, f"{self.arch}.{key}", value)
        for name, values in self.tensors.items():
            if values.ndim == 1 or values.shape[-1] % 32 or quant == "F32":
                writer.add_tensor(name, values)
            else:
                rows = quantize(values.reshape(-1, values.shape[-1]), quant)
                blocks = rows.reshape(*values.shape[:-1], -1)
                writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[quant])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def digest(self) -> str:
        """Of all that the model consists of, however a file holds it."""
        sha = hashlib.sha256(repr((self.arch, sorted(self.keys.items()))).encode())
        for name in sorted(self.tensors):
            sha.update(f"{name} {self.tensors[name].shape}".encode())
            sha.update(self.tensors[name].astype("<f4").tobytes())
        return sha.hexdigest()


Edit: TypeAlias = Callable[[Draft], None]


@dataclass(frozen=True)
class Golden:
    """A model of a family, and the edits that each leave out one feature of it."""

    name: str
    arch: str
    keys: Mapping[str, Any]
    shapes: Shapes  # as NumPy has them
    without: Mapping[str, Edit]

    def draft(self) -> Draft:
        tensors = {name: _values(name, shape) for name, shape in self.shapes.items()}
        return Draft(self.arch, dict(self.keys), tensors)


def _values(name: str, shape: tuple[int, ...]) -> Floats:
    """Weights by which every feature shows: norms far from 1, scores that differ."""
    kind = name.split(".")[-2] if "." in name else name
    x = _normal(name, shape)
    if kind.startswith("rope_"):
        spread = 8 if kind.endswith("long") else 3
        factors: Floats = np.geomspace(1, spread, shape[0]).astype(np.float32)
        return factors
    if name.endswith(".bias"):
        return x * np.float32(0.5)
    if name.endswith(".ssm_a"):  # all states fade, each head's at its own pace
        return np.float32(-0.2) * (1 + x * np.float32(0.3))
    if len(shape) == 1:
        return 1 + x * np.float32(0.3)
    gain = {"token_embd": 2.5, "attn_q": 2.0, "attn_k": 2.0, "attn_qkv": 1.5, "ffn_gate_inp": 2.0}
    scale = gain.get(kind, 1.0) / shape[-1] ** 0.5
    scaled: Floats = x * np.float32(scale)
    return scaled


@cache
def _normal(name: str, shape: tuple[int, ...]) -> Floats:
    """About normal: sums of four of a generator's raw 16 bits, the same with any NumPy."""
    n = int(np.prod(shape))
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(n)
    sums = np.asarray(raw, "<u8").view("<u2").reshape(n, 4).sum(axis=1, dtype=np.int64)
    values: Floats = ((sums - 131070) / 37837.0).astype(np.float32).reshape(shape)
    return values


# -- edits ---------------------------------------------------------------------------------------


def key(name: str, value: Any) -> Edit:
    return lambda draft: draft.keys.update({name: value})


def no_key(name: str) -> Edit:
    return lambda draft: (draft.keys.pop(name), None)[1]


def filled(value: float, *kinds: str) -> Edit:
    """All tensors of these kinds become one number."""

    def edit(draft: Draft) -> None:
        names = [name for name in draft.tensors if name.split(".", 2)[-1] in kinds or name in kinds]
        assert names, kinds
        for name in names:
            draft.tensors[name] = np.full_like(draft.tensors[name], value)

    return edit


def each_filled(value: float, *kinds: str) -> dict[str, Edit]:
    """An edit for every kind of tensor."""
    return {kind: filled(value, kind) for kind in kinds}


def no_tensor(name: str) -> Edit:
    return lambda draft: (draft.tensors.pop(name), None)[1]


def read_as(arch: str) -> Edit:
    """The same file of another architecture, which differs in one thing."""
    return lambda draft: setattr(draft, "arch", arch)


def rewritten(change: Callable[[Op], Op]) -> Edit:
    """What was recorded, op by op."""
    return lambda draft: draft.rewrites.append(change)


def _other_pairs(op: Op) -> Op:
    if not isinstance(op, Rotate):
        return op
    kind = "norm" if op.rope.kind == "neox" else "neox"
    return op._replace(rope=op.rope._replace(kind=kind))  # type: ignore[arg-type]


def _no_magnitude(op: Op) -> Op:
    return op._replace(rope=op.rope._replace(magnitude=1.0)) if isinstance(op, Rotate) else op


def _silu(op: Op) -> Op:
    return op._replace(kind="silu") if isinstance(op, Activation) else op


def _unscaled_embedding(op: Op) -> Op:
    return op._replace(factor=1.0) if isinstance(op, Scale) and op.layer < 0 else op


def _raw_weights(op: Op) -> Op:
    """The weights of chosen experts as the router gives them."""
    return op._replace(norm=False) if "norm" in op._fields else op  # type: ignore[call-arg]


def _scaled_in_windows(op: Op) -> Op:
    """The scaling of other layers' rotation in those with a window, too."""
    if not isinstance(op, Rotate) or op.rope.scale != 1:
        return op
    return op._replace(rope=op.rope._replace(scale=1 / _FACTOR))


def _norms_by_head(op: Op) -> Op:
    """The norm of a whole row of q or k, as one over each head with the first head's weight."""
    if not isinstance(op, RmsNorm) or op.weight is None or "attn_" not in op.weight.name:
        return op
    name = op.weight.name
    if "q_norm" not in name and "k_norm" not in name:
        return op
    first = replace(op.weight, shape=(HEAD,), data=op.weight.data[: 4 * HEAD])
    return op._replace(n_heads=op.x.dim // HEAD, weight=first)


# -- the families --------------------------------------------------------------------------------


def _keys(n_layers: int, **more: Any) -> dict[str, Any]:
    keys = {
        "block_count": n_layers, "context_length": 8192, "embedding_length": DIM,
        "feed_forward_length": FFN, "vocab_size": VOCAB, "attention.head_count": N_HEADS,
        "attention.head_count_kv": N_KV, "attention.layer_norm_rms_epsilon": 2.0**-5,
        "rope.freq_base": 1000.0,
    }  # fmt: skip
    return {**keys, **{name.replace("__", "."): value for name, value in more.items()}}


def _shapes(
    n_layers: int, *parts: Callable[[int], Shapes], tied: bool = False
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, DIM)}
    for i in range(n_layers):
        for part in parts:
            shapes.update({f"blk.{i}.{name}": shape for name, shape in part(i).items()})
    shapes["output_norm.weight"] = (DIM,)
    return shapes if tied else {**shapes, "output.weight": (VOCAB, DIM)}


def _attention(head: int = HEAD) -> Callable[[int], Shapes]:
    n_rows = {"q": N_HEADS * head, "k": N_KV * head, "v": N_KV * head}
    matrices = {f"attn_{name}.weight": (n, DIM) for name, n in n_rows.items()}
    return lambda i: {**matrices, "attn_output.weight": (DIM, N_HEADS * head)}


def _biases(i: int) -> Shapes:
    widths = {"q": N_HEADS * HEAD, "k": N_KV * HEAD, "v": N_KV * HEAD}
    return {f"attn_{name}.bias": (width,) for name, width in widths.items()}


def _more_biases(i: int) -> Shapes:
    widths = {"attn_output": DIM, "ffn_gate": FFN, "ffn_up": FFN, "ffn_down": DIM}
    return {f"{name}.bias": (width,) for name, width in widths.items()}


def _head_norms(head: int) -> Callable[[int], Shapes]:
    return lambda i: {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}


def _norms(*names: str) -> Callable[[int], Shapes]:
    return lambda i: {f"{name}.weight": (DIM,) for name in names}


def _ffn(i: int) -> Shapes:
    return {"ffn_gate.weight": (FFN, DIM), "ffn_up.weight": (FFN, DIM), **_down(i)}


def _down(i: int) -> Shapes:
    return {"ffn_down.weight": (DIM, FFN)}


def _experts(n: int, width: int, shared: int = 0) -> Callable[[int], Shapes]:
    shapes: dict[str, tuple[int, ...]] = {
        "ffn_gate_inp.weight": (n, DIM),
        "ffn_gate_exps.weight": (n, width, DIM),
        "ffn_up_exps.weight": (n, width, DIM),
        "ffn_down_exps.weight": (n, DIM, width),
    }
    if shared:
        shapes |= {f"ffn_{name}_shexp.weight": (shared, DIM) for name in ("gate", "up")}
        shapes["ffn_down_shexp.weight"] = (DIM, shared)
    return lambda i: shapes


_PRE = _norms("attn_norm", "ffn_norm")
_POST = _norms("post_attention_norm", "post_ffw_norm")
_LLAMA = (_PRE, _attention(), _ffn)
_END: dict[str, Edit] = {
    **each_filled(1, "output_norm.weight"),
    "epsilon": key("attention.layer_norm_rms_epsilon", 1e-6),
}
_NORMS = {**_END, **each_filled(1, "attn_norm.weight", "ffn_norm.weight")}
_POST_NORMS = each_filled(1, "post_attention_norm.weight", "post_ffw_norm.weight")
_QK_NORMS = each_filled(1, "attn_q_norm.weight", "attn_k_norm.weight")
_QKV_BIASES = each_filled(0, "attn_q.bias", "attn_k.bias", "attn_v.bias")
_ROPE: dict[str, Edit] = {
    "base": key("rope.freq_base", 500.0),
    "pairs": rewritten(_other_pairs),
}
_WINDOW: dict[str, Edit] = {
    "window": key("attention.sliding_window", 8192),
    "its width": key("attention.sliding_window", WINDOW + 1),
}
_FACTOR = 4.0
_YARN = {
    "rope__scaling__type": "yarn",
    "rope__scaling__factor": _FACTOR,
    "rope__scaling__original_context_length": 32,
}
_YARN_PARTS: dict[str, Edit] = {
    "yarn": key("rope.scaling.type", "none"),
    "yarn's blend": key("rope.scaling.type", "linear"),
    "yarn's length": key("rope.scaling.original_context_length", 8192),
    "yarn's magnitude": rewritten(_no_magnitude),
}


def _llamas() -> Iterator[Golden]:
    yield Golden(
        "llama", "llama", _keys(2),
        _shapes(2, *_LLAMA, _biases, _more_biases) | {"rope_freqs.weight": (HEAD // 2,)},
        {
            **_NORMS, **_ROPE, **_QKV_BIASES,
            **each_filled(0, "attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
            "rope factors": no_tensor("rope_freqs.weight"),
            "head": no_tensor("output.weight"),
        },
    )  # fmt: skip
    yield Golden(
        "llama-linear", "llama",
        _keys(2, rope__scaling__type="linear", rope__scaling__factor=_FACTOR), _shapes(2, *_LLAMA),
        {"linear scaling": key("rope.scaling.type", "none")},
    )  # fmt: skip
    yield Golden(
        "llama-yarn", "llama", _keys(2, **_YARN, rope__scaling__attn_factor=1.25),
        _shapes(2, *_LLAMA, tied=True),
        {**_YARN_PARTS, "attention factor": key("rope.scaling.attn_factor", 1.0)},
    )  # fmt: skip
    yield Golden(
        "llama-experts", "llama", _keys(2, expert_count=8, expert_used_count=2),
        _shapes(2, _PRE, _attention(), _experts(8, FFN)),
        {**_NORMS, **_ROPE, **_EXPERTS},
    )  # fmt: skip
    yield Golden(
        "qwen2", "qwen2", _keys(2), _shapes(2, *_LLAMA, _biases, tied=True),
        {**_NORMS, **_ROPE, **_QKV_BIASES},
    )  # fmt: skip


_EXPERTS: dict[str, Edit] = {
    "how many experts": key("expert_used_count", 3),
    **each_filled(0, "ffn_gate_inp.weight"),
    "norm of their weights": rewritten(_raw_weights),
}


def _qwen3s() -> Iterator[Golden]:
    wide = 24
    keys = dict(attention__key_length=wide, attention__value_length=wide)
    attention = (_PRE, _attention(wide), _head_norms(wide))
    yield Golden(
        "qwen3", "qwen3", _keys(2, **keys), _shapes(2, *attention, _ffn, tied=True),
        {**_NORMS, **_ROPE, **_QK_NORMS},
    )  # fmt: skip
    yield Golden(
        "qwen3moe", "qwen3moe",
        _keys(2, **keys, expert_count=8, expert_used_count=2, expert_feed_forward_length=48),
        _shapes(2, *attention, _experts(8, 48)),
        {**_NORMS, **_ROPE, **_QK_NORMS, **_EXPERTS},
    )  # fmt: skip


def _granites() -> Iterator[Golden]:
    scales = dict(embedding_scale=0.6, residual_scale=1.5, attention__scale=0.5, logit_scale=0.7)
    multipliers = {
        "embedding multiplier": no_key("embedding_scale"),
        "residual multiplier": no_key("residual_scale"),
        "scale of attention": no_key("attention.scale"),
        "scale of logits": key("logit_scale", 1.0),
    }
    yield Golden(
        "granite", "granite", _keys(2, **scales), _shapes(2, *_LLAMA),
        {**_NORMS, **_ROPE, **multipliers, "rope": key("rope.scaling.finetuned", False)},
    )  # fmt: skip
    yield Golden(
        "granite-without-rope", "granite", _keys(2, **scales, rope__scaling__finetuned=False),
        _shapes(2, *_LLAMA), {"no rope": no_key("rope.scaling.finetuned")},
    )  # fmt: skip
    keys = dict(expert_count=8, expert_used_count=2, expert_shared_feed_forward_length=48)
    yield Golden(
        "granitemoe", "granitemoe", _keys(2, **scales, **keys),
        _shapes(2, _PRE, _attention(), _experts(8, FFN, shared=48)),
        {
            **_NORMS, **_ROPE, **multipliers, **_EXPERTS,
            **each_filled(0, "ffn_down_shexp.weight"),
        },
    )  # fmt: skip


def _others() -> Iterator[Golden]:
    yield Golden(
        "smollm3", "smollm3", _keys(4), _shapes(4, *_LLAMA, tied=True),
        {**_NORMS, **_ROPE, "a layer without rope": read_as("llama")},
    )  # fmt: skip
    wide, temperature = 24, "attention.temperature_scale"
    keys = dict(
        attention__key_length=wide, attention__value_length=wide, **_YARN,
        rope__scaling__yarn_log_multiplier=0.5, rope__scaling__yarn_beta_fast=2.0,
        rope__scaling__yarn_beta_slow=0.5, attention__temperature_scale=0.5,
    )  # fmt: skip
    yield Golden(
        "mistral3", "mistral3", _keys(2, **keys), _shapes(2, _PRE, _attention(wide), _ffn),
        {
            **_NORMS, **_ROPE, **_YARN_PARTS,
            "yarn's log multiplier": no_key("rope.scaling.yarn_log_multiplier"),
            "yarn's fast turns": no_key("rope.scaling.yarn_beta_fast"),
            "yarn's slow turns": no_key("rope.scaling.yarn_beta_slow"),
            "q by its position": no_key(temperature),
        },
    )  # fmt: skip
    for name, length in (("phi3-short", 4096), ("phi3-long", 100)):
        yield _phi3(name, length)


def _phi3(name: str, length: int) -> Golden:
    n_rotated, n_qkv = 12, (N_HEADS + 2 * N_KV) * HEAD
    keys = dict(
        rope__dimension_count=n_rotated, rope__scaling__original_context_length=length,
        rope__scaling__attn_factor=1.25, attention__sliding_window=WINDOW,
    )  # fmt: skip
    fused: Shapes = {
        "attn_qkv.weight": (n_qkv, DIM), "attn_output.weight": (DIM, N_HEADS * HEAD),
        "ffn_up.weight": (2 * FFN, DIM),
    }  # fmt: skip
    factors: Shapes = {f"rope_factors_{each}.weight": (n_rotated // 2,) for each in _FACTORS}
    return Golden(
        name, "phi3", _keys(2, **keys), _shapes(2, _PRE, lambda i: fused, _down) | factors,
        {
            **_NORMS, **_ROPE,
            "part of a head": _whole_heads,
            "magnitude": no_key("rope.scaling.attn_factor"),
            "factors": filled(1, f"rope_factors_{_FACTORS[length > N_CTX]}.weight"),
            "the length that chooses factors":
                key("rope.scaling.original_context_length", 4196 - length),
        },
    )  # fmt: skip


_FACTORS = ("long", "short")


def _whole_heads(draft: Draft) -> None:
    """All of a head is rotated, by factors of 1 where the file has none."""
    del draft.keys["rope.dimension_count"]
    for name in [name for name in draft.tensors if name.startswith("rope_factors")]:
        ones = np.ones(HEAD // 2 - len(draft.tensors[name]), np.float32)
        draft.tensors[name] = np.append(draft.tensors[name], ones)


def _olmos() -> Iterator[Golden]:
    norms = _attention_row_norms
    parts = (_POST, _attention(), norms, _ffn)
    whole = {
        **_POST_NORMS,
        **_QK_NORMS,
        **_END,
        "norms of whole rows": rewritten(_norms_by_head),
    }
    yield Golden("olmo2", "olmo2", _keys(2), _shapes(2, *parts), {**whole, **_ROPE})
    yield Golden(
        "olmo3", "olmo2", _keys(4, **_YARN, attention__sliding_window=WINDOW), _shapes(4, *parts),
        {
            **whole, **_ROPE, **_YARN_PARTS,
            **_WINDOW,
            "which layers have it": key("attention.sliding_window_pattern", 2),
            "their own rope": rewritten(_scaled_in_windows),
        },
    )  # fmt: skip


def _attention_row_norms(i: int) -> Shapes:
    return {"attn_q_norm.weight": (N_HEADS * HEAD,), "attn_k_norm.weight": (N_KV * HEAD,)}


def _gemmas() -> Iterator[Golden]:
    wide = 24
    sizes = dict(attention__key_length=wide, attention__value_length=wide)
    parts = (_PRE, _POST, _attention(wide), _ffn)
    common: dict[str, Edit] = {
        **_NORMS, **_POST_NORMS, **_ROPE,
        "embedding multiplier": rewritten(_unscaled_embedding),
        "gelu": rewritten(_silu),
        **_WINDOW,
    }  # fmt: skip
    yield Golden(
        "gemma2", "gemma2",
        _keys(
            3, **sizes, attention__sliding_window=WINDOW, attn_logit_softcapping=3.0,
            final_logit_softcapping=4.0,
        ),
        _shapes(3, *parts, tied=True),
        {
            **common,
            "cap of scores": key("attn_logit_softcapping", 1e4),
            "cap of logits": key("final_logit_softcapping", 1e4),
            "which layers have it": key("attention.sliding_window_pattern", 3),
        },
    )  # fmt: skip
    keys = dict(rope__freq_base=1e5, rope__scaling__type="linear", rope__scaling__factor=_FACTOR)
    yield Golden(
        "gemma3", "gemma3", _keys(7, **sizes, attention__sliding_window=WINDOW) | _keys(7, **keys),
        _shapes(7, *parts, _head_norms(wide), tied=True),
        {
            **common,
            **_QK_NORMS,
            "scaling of other layers": key("rope.scaling.type", "none"),
            "base of windows": key("rope.freq_base_swa", 100.0),
            "their own rope": rewritten(_scaled_in_windows),
            "which layers have it": key("attention.sliding_window_pattern", 3),
        },
    )  # fmt: skip


# A key head for two value heads, so that each pairing shows.
N_K, N_V, DELTA, TAPS = 2, 4, 16, 4
_SSM = dict(
    ssm__conv_kernel=TAPS, ssm__inner_size=N_V * DELTA, ssm__state_size=DELTA,
    ssm__time_step_rank=N_V, ssm__group_count=N_K, rope__dimension_count=8,
)  # fmt: skip


def _hybrid(mixers: str, *ffn: Callable[[int], Shapes]) -> dict[str, tuple[int, ...]]:
    """Layers of delta nets (d), of old files (o), and attention (a)."""
    gated: Shapes = {**_attention()(0), "attn_q.weight": (2 * N_HEADS * HEAD, DIM)}
    q_and_k, v = 2 * N_K * DELTA, N_V * DELTA
    delta: dict[str, tuple[int, ...]] = {
        "ssm_conv1d.weight": (q_and_k + v, TAPS), "ssm_dt.bias": (N_V,), "ssm_a": (N_V,),
        "ssm_norm.weight": (DELTA,), "ssm_out.weight": (DIM, v),
    }  # fmt: skip
    apart: Shapes = {"attn_qkv.weight": (q_and_k + v, DIM), "attn_gate.weight": (v, DIM)}
    kinds: dict[str, Shapes] = {
        "a": {**gated, **_head_norms(HEAD)(0)},
        "d": {
            **delta, **apart, "ssm_alpha.weight": (N_V, DIM), "ssm_beta.weight": (N_V, DIM)
        },
        "n": {**delta, **apart, "ssm_ba.weight": (2 * N_V, DIM)},
        "o": {**delta, "ssm_in.weight": (q_and_k + 2 * v, DIM), "ssm_ba.weight": (2 * N_V, DIM)},
    }  # fmt: skip
    norms = _norms("attn_norm", "post_attention_norm")
    return _shapes(len(mixers), norms, lambda i: kinds[mixers[i]], *ffn)


def _other_heads(op: Op) -> Op:
    if not isinstance(op, DeltaNet):
        return op
    return op._replace(pairing="tiled" if op.pairing == "interleaved" else "interleaved")


def _unscaled_queries(op: Op) -> Op:
    is_of_q = isinstance(op, Scale) and op.factor == 1 / DELTA
    return op._replace(factor=DELTA**-0.5) if is_of_q else op  # type: ignore[call-arg]


def _epsilon_of_means(op: Op) -> Op:
    """The epsilon beside a sum of squares, as if it stood beside their mean."""
    if not isinstance(op, RmsNorm) or op.weight is not None:
        return op
    return op._replace(eps=op.eps * DELTA)


def _gates_behind_queries(draft: Draft) -> None:
    """As if the gates of all heads followed the queries of all."""
    for name in [name for name in draft.tensors if name.endswith("attn_q.weight")]:
        rows = draft.tensors[name].reshape(2, N_HEADS, HEAD, DIM)
        draft.tensors[name] = np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(-1, DIM)


def _sigmoid_once(op: Op) -> Op:
    """Of the first that is met: the beta of a delta net, or a gate."""
    is_gate = isinstance(op, Activation) and op.kind == "sigmoid"
    return op._replace(kind="relu2") if is_gate else op  # type: ignore[call-arg]


_DELTA: dict[str, Edit] = {
    **_END, **_QK_NORMS, **_ROPE,
    **each_filled(1, "attn_norm.weight", "post_attention_norm.weight", "ssm_norm.weight"),
    **each_filled(0, "ssm_dt.bias", "ssm_a"),
    "convolution": filled(0.5, "ssm_conv1d.weight"),
    "part of a head": no_key("rope.dimension_count"),
    "pairing of heads": rewritten(_other_heads),
    "scale of queries": rewritten(_unscaled_queries),
    "epsilon of heads": rewritten(_epsilon_of_means),
    "gates by head": _gates_behind_queries,
    "sigmoids": rewritten(_sigmoid_once),
}  # fmt: skip


def _deltas() -> Iterator[Golden]:
    draft: dict[str, tuple[int, ...]] = {
        "nextn.eh_proj.weight": (DIM, 2 * DIM), "nextn.enorm.weight": (DIM,),
        "nextn.hnorm.weight": (DIM,),
    }  # fmt: skip
    sections = dict(rope__dimension_sections=[2, 1, 1, 0])
    keys = dict(full_attention_interval=3, nextn_predict_layers=1, **_SSM, **sections)
    guessing = {f"blk.3.{name}": shape for name, shape in draft.items()}
    yield Golden("qwen35", "qwen35", _keys(4, **keys), _hybrid("ddaa", _ffn) | guessing, _DELTA)
    shared_gate: Shapes = {"ffn_gate_inp_shexp.weight": (DIM,)}
    experts = (_experts(8, 32, 48), lambda i: shared_gate)
    numbers = dict(
        expert_count=8, expert_used_count=3, expert_feed_forward_length=32,
        expert_shared_feed_forward_length=48, **_SSM,
    )  # fmt: skip
    of_experts: dict[str, Edit] = {
        **_DELTA,
        "norm of weights": rewritten(_raw_weights),
        **each_filled(0, "ffn_gate_inp_shexp.weight"),
        "shared expert": filled(0, "ffn_down_shexp.weight"),
    }
    yield Golden(
        "qwen35moe", "qwen35moe",
        _keys(3, attention__recurrent_layers=[True, False, True], **numbers, **sections),
        _hybrid("dad", *experts), of_experts,
    )  # fmt: skip
    for name, mixers in (("qwen3next", "nnna"), ("qwen3next-fused", "oooa")):
        yield Golden(name, "qwen3next", _keys(4, **numbers), _hybrid(mixers, *experts), of_experts)


def _exchanged_gates(draft: Draft) -> None:
    """The gate behind the convolution and one before it, each in the other's place."""
    for name in [name for name in draft.tensors if name.endswith("in_proj.weight")]:
        b, c, x = np.split(draft.tensors[name], 3)
        draft.tensors[name] = np.concatenate([c, b, x])


def _convolutions() -> Iterator[Golden]:
    conv: Shapes = {
        "shortconv.in_proj.weight": (3 * DIM, DIM), "shortconv.conv.weight": (DIM, 3),
        "shortconv.out_proj.weight": (DIM, DIM),
    }  # fmt: skip
    heads: Shapes = {**_attention()(0), **_head_norms(HEAD)(0)}

    def shapes(kinds: str, *ffn: Callable[[int], Shapes]) -> dict[str, tuple[int, ...]]:
        mixers = [heads if kind == "a" else conv for kind in kinds]
        found = _shapes(len(kinds), _PRE, lambda i: mixers[i], *ffn, tied=True)
        found["token_embd_norm.weight"] = found.pop("output_norm.weight")
        return found

    common: dict[str, Edit] = {
        **_NORMS, **_QK_NORMS, **_ROPE,
        **each_filled(1, "token_embd_norm.weight"),
        "convolution": filled(0.5, "shortconv.conv.weight"),
        "gates": _exchanged_gates,
    }  # fmt: skip
    del common["output_norm.weight"]
    keys: dict[str, Any] = dict(shortconv__l_cache=3, attention__head_count_kv=[0, N_KV, 0])
    yield Golden("lfm2", "lfm2", _keys(3) | _keys(3, **keys), shapes("cac", _ffn), common)
    bias: Shapes = {"exp_probs_b.bias": (8,)}
    experts = {**_experts(8, 32)(0), **bias}
    keys |= dict(
        leading_dense_block_count=1, expert_count=8, expert_used_count=3, expert_gating_func=2,
        expert_feed_forward_length=32,
    )  # fmt: skip
    yield Golden(
        "lfm2moe", "lfm2moe", _keys(3) | _keys(3, **keys),
        shapes("cac", lambda i: experts if i else _ffn(i)),
        {
            **common,
            "norm of weights": rewritten(_raw_weights),
            "gating": key("expert_gating_func", 1),
            "bias of a choice": filled(0, "exp_probs_b.bias"),
        },
    )  # fmt: skip


GOLDENS = {
    golden.name: golden
    for family in (_llamas, _qwen3s, _granites, _others, _olmos, _gemmas, _deltas, _convolutions)
    for golden in family()
}
