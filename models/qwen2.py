"""Qwen 2 and 2.5: Llama's block with half-split rotary pairs and biases on q, k and v.

The biases take part because the file holds them.
"""

from edgeinfer.graph import KV, Graph


def forward(g: Graph) -> None:
    hp, rope = g.hparams, g.rope("neox")
    q_dim, kv_dim = hp.n_heads * hp.head_dim, hp.n_kv_heads * hp.head_dim
    cache = KV(hp.n_kv_heads, hp.head_dim, hp.head_dim)
    x = g.embed()  # (T, D)
    for blk in g.layers():
        h = g.rms_norm(x, f"{blk}.attn_norm")
        q = g.linear(h, f"{blk}.attn_q", q_dim)  # (T, H * d)
        k = g.linear(h, f"{blk}.attn_k", kv_dim)  # (T, K * d)
        v = g.linear(h, f"{blk}.attn_v", kv_dim)
        q, k = g.rotate(q, hp.n_heads, rope), g.rotate(k, hp.n_kv_heads, rope)
        a = g.attention(q, k, v, cache=cache)
        x = x + g.linear(a, f"{blk}.attn_output", hp.dim)
        h = g.rms_norm(x, f"{blk}.ffn_norm")
        gate = g.linear(h, f"{blk}.ffn_gate", hp.ffn_dim)  # (T, F)
        up = g.linear(h, f"{blk}.ffn_up", hp.ffn_dim)
        x = g.layer_output(x + g.linear(g.silu(gate) * up, f"{blk}.ffn_down", hp.dim))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))  # (wanted rows, V)
