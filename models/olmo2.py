"""OLMo 2 and 3: norms behind attention and feed-forward network, and over the whole of q and of k.

OLMo 3 has windows on three of four layers, which are rotated without the scaling of the others.
"""

from edgeinfer.graph import Graph


def forward(g: Graph) -> None:
    x = g.embed()  # (T, D)
    for blk in g.layers():
        heads = g.heads(g.window(4))
        is_local = heads.window > 0
        rope = (
            g.window_rope("neox", heads.k_dim, is_alike=True)
            if is_local
            else g.rope("neox", heads.k_dim)
        )
        q, k, v = g.qkv(x, blk, heads)  # (T, H * d), (T, K * d), (T, K * d)
        q, k = g.rms_norm(q, f"{blk}.attn_q_norm"), g.rms_norm(k, f"{blk}.attn_k_norm")
        q, k = g.rotate(q, heads.n, rope), g.rotate(k, heads.n_kv, rope)
        a = g.linear(g.attention(q, k, v, cache=heads.cache), f"{blk}.attn_output", g.dim)
        x = x + g.rms_norm(a, f"{blk}.post_attention_norm")
        gate, up = g.gate_up(x, blk)  # (T, F)
        f = g.linear(g.silu(gate) * up, f"{blk}.ffn_down", g.dim)
        x = g.layer_output(x + g.rms_norm(f, f"{blk}.post_ffw_norm"))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))  # (wanted rows, V)
