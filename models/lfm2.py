"""LFM2 and 2.5, dense and of experts: most layers are short convolutions between two gates.

A layer that has no key and value heads is one of them. Names of tensors are the family's own.
"""

from edgeinfer.graph import Graph, Value

NAMES = ("lfm2", "lfm2moe")


def forward(g: Graph) -> None:
    x = g.embed()  # (T, D)
    is_moe = g.hparams.architecture == "lfm2moe"
    for i, blk in enumerate(g.layers()):
        has_heads = g.count("attention.head_count_kv", low=0) > 0
        h = g.rms_norm(x, f"{blk}.attn_norm")
        x = x + (attention(g, h, blk) if has_heads else short_conv(g, h, blk))
        h = g.rms_norm(x, f"{blk}.ffn_norm")
        if is_moe and i >= g.count("leading_dense_block_count", 0, low=0):
            f = g.experts(h, blk, g.count("expert_feed_forward_length"), gating="sigmoid")
        else:
            gate, up = g.gate_up(h, blk)  # (T, F)
            f = g.linear(g.silu(gate) * up, f"{blk}.ffn_down", g.dim)
        x = g.layer_output(x + f)
    g.head(g.rms_norm(g.select_rows(x), "token_embd_norm"))  # (wanted rows, V)


def attention(g: Graph, h: Value, blk: str) -> Value:
    heads = g.heads(g.window(0))  # where there is one, all these layers have it
    rope = g.rope("neox", heads.k_dim)
    q, k, v = g.qkv(h, blk, heads)  # (T, H * d), (T, K * d), (T, K * d)
    q = g.rms_norm(q, f"{blk}.attn_q_norm", heads.n)
    k = g.rms_norm(k, f"{blk}.attn_k_norm", heads.n_kv)
    q, k = g.rotate(q, heads.n, rope), g.rotate(k, heads.n_kv, rope)
    a = g.attention(q, k, v, cache=heads.cache)
    return g.linear(a, f"{blk}.attn_output", g.dim)


def short_conv(g: Graph, h: Value, blk: str) -> Value:
    b, c, x = g.linears_by_head(h, f"{blk}.shortconv.in_proj", 1, (g.dim, g.dim, g.dim))
    (y,) = g.convs([b * x], f"{blk}.shortconv.conv", g.count("shortconv.l_cache", low=2))
    return g.linear(c * y, f"{blk}.shortconv.out_proj", g.dim)
