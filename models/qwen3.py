"""Qwen 3, dense and of experts: half-split rotary pairs, and before them an RMSNorm of every head.

The head width is its own number, not dim / n_heads.
"""

from edgeinfer.graph import Graph

NAMES = ("qwen3", "qwen3moe")


def forward(g: Graph) -> None:
    x = g.embed()  # (T, D)
    for blk in g.layers():
        heads = g.heads()
        rope = g.rope("neox", heads.k_dim)
        h = g.rms_norm(x, f"{blk}.attn_norm")
        q, k, v = g.qkv(h, blk, heads)  # (T, H * d), (T, K * d), (T, K * d)
        q = g.rms_norm(q, f"{blk}.attn_q_norm", heads.n)
        k = g.rms_norm(k, f"{blk}.attn_k_norm", heads.n_kv)
        q, k = g.rotate(q, heads.n, rope), g.rotate(k, heads.n_kv, rope)
        a = g.attention(q, k, v, cache=heads.cache)
        x = x + g.linear(a, f"{blk}.attn_output", g.dim)
        h = g.rms_norm(x, f"{blk}.ffn_norm")
        if g.hparams.architecture == "qwen3moe":
            f = g.experts(
                h, blk, g.count("feed_forward_length", 0, low=0) // g.count("expert_used_count")
            )
        else:
            gate, up = g.gate_up(h, blk)  # (T, F)
            f = g.linear(g.silu(gate) * up, f"{blk}.ffn_down", g.dim)
        x = g.layer_output(x + f)
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))  # (wanted rows, V)
