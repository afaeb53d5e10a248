"""Qwen 3.5 and 3.6, dense and of experts, and Qwen 3 Next: most layers are gated delta nets.

Such a layer keeps a matrix for each head in place of keys and values. The others are attention
whose result is weighed by a gate that comes out of the queries' matrix.
"""

from edgeinfer.graph import Graph, Pairing, Value

NAMES: dict[str, Pairing] = {"qwen35": "tiled", "qwen35moe": "tiled", "qwen3next": "interleaved"}


def forward(g: Graph) -> None:
    x = g.embed()  # (T, D)
    for blk in g.layers():
        h = g.rms_norm(x, f"{blk}.attn_norm")
        x = x + (delta_net(g, h, blk) if g.is_recurrent(4) else attention(g, h, blk))
        x = g.layer_output(x + feed_forward(g, x, blk))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))  # (wanted rows, V)
    for blk, read in g.drafts():
        draft(g, read, blk)
    g.skip_drafts()


def draft(g: Graph, read: Value, blk: str) -> None:
    """The token after next, from the next one and what the head read before it."""
    own = f"{blk}.nextn"
    e = g.rms_norm(g.embed(g.first(f"{own}.embed_tokens", "token_embd")), f"{own}.enorm")
    h = g.rms_norm(read, f"{own}.hnorm")
    x = g.linear_of((e, h), f"{own}.eh_proj", g.dim)
    x = x + attention(g, g.rms_norm(x, f"{blk}.attn_norm"), blk)
    x = g.select_rows(x + feed_forward(g, x, blk))
    norm = g.first(f"{own}.shared_head_norm", "output_norm")
    g.head(g.rms_norm(x, norm), name=g.first(f"{own}.shared_head_head", "output"))


def feed_forward(g: Graph, x: Value, blk: str) -> Value:
    h = g.rms_norm(x, f"{blk}.post_attention_norm")
    if g.hparams.architecture == "qwen35":
        gate, up = g.gate_up(h, blk)  # (T, F)
        return g.linear(g.silu(gate) * up, f"{blk}.ffn_down", g.dim)
    width = g.count("feed_forward_length", 0, low=0) // g.count("expert_used_count")
    return g.experts(h, blk, width)


def attention(g: Graph, h: Value, blk: str) -> Value:
    heads = g.heads()
    rope = g.rope("neox", heads.k_dim)
    q, gate = g.linears_by_head(h, f"{blk}.attn_q", heads.n, (heads.k_dim, heads.v_dim))
    k = g.linear(h, f"{blk}.attn_k", heads.n_kv * heads.k_dim)
    v = g.linear(h, f"{blk}.attn_v", heads.n_kv * heads.v_dim)
    q = g.rms_norm(q, f"{blk}.attn_q_norm", heads.n)
    k = g.rms_norm(k, f"{blk}.attn_k_norm", heads.n_kv)
    q, k = g.rotate(q, heads.n, rope), g.rotate(k, heads.n_kv, rope)
    scale = g.number("attention.scale", 0.0) or None
    a = g.attention(q, k, v, cache=heads.cache, scale=scale)  # (T, H * d)
    return g.linear(a * g.activation("sigmoid", gate), f"{blk}.attn_output", g.dim)


def delta_net(g: Graph, h: Value, blk: str) -> Value:
    n_k, n_v, dim, n_taps = g.delta_heads()
    r = n_v // n_k
    if g.has(f"{blk}.ssm_in.weight"):  # as files of 2025 have it
        parts = dim, dim, r * dim, r * dim
        q, k, v, z = g.linears_by_head(h, f"{blk}.ssm_in", n_k, parts)
    else:
        widths = {"q": n_k * dim, "k": n_k * dim, "v": n_v * dim}
        named = {f"{blk}.attn_{name}": width for name, width in widths.items()}
        q, k, v = g.linears(h, f"{blk}.attn_qkv", named)
        z = g.linear(h, f"{blk}.attn_gate", n_v * dim)
    if g.hparams.architecture == "qwen3next":
        beta, alpha = g.linears_by_head(h, f"{blk}.ssm_ba", n_k, (r, r))
    else:
        beta, alpha = g.linear(h, f"{blk}.ssm_beta", n_v), g.linear(h, f"{blk}.ssm_alpha", n_v)
    q, k, v = map(g.silu, g.convs((q, k, v), f"{blk}.ssm_conv1d", n_taps))
    # x / sqrt(sum(x^2) + eps) is an RMS norm times 1 / sqrt(dim); q is scaled by as much again.
    eps = g.number("attention.layer_norm_rms_epsilon") / dim
    q = g.scale(g.rms_norm(q, None, n_k, eps), 1 / dim)
    k = g.scale(g.rms_norm(k, None, n_k, eps), dim**-0.5)
    rate = g.activation("softplus", g.add_vector(alpha, f"{blk}.ssm_dt.bias"))
    o = g.delta_net(
        q, k, v, decay=g.mul_vector(rate, f"{blk}.ssm_a"), beta=g.activation("sigmoid", beta),
        n_k_heads=n_k, pairing=NAMES[g.hparams.architecture],
    )  # fmt: skip
    return g.linear(g.rms_norm(o, f"{blk}.ssm_norm", n_v) * g.silu(z), f"{blk}.ssm_out", g.dim)
