"""SmolLM3: a Llama whose every fourth layer knows no positions."""

from edgeinfer.graph import Graph


def forward(g: Graph) -> None:
    x = g.embed()  # (T, D)
    for i, blk in enumerate(g.layers()):
        heads = g.heads()
        rope = g.rope("norm", heads.k_dim)
        h = g.rms_norm(x, f"{blk}.attn_norm")
        q, k, v = g.qkv(h, blk, heads)  # (T, H * d), (T, K * d), (T, K * d)
        if i % 4 != 3:
            q, k = g.rotate(q, heads.n, rope), g.rotate(k, heads.n_kv, rope)
        a = g.attention(q, k, v, cache=heads.cache)
        x = x + g.linear(a, f"{blk}.attn_output", g.dim)
        h = g.rms_norm(x, f"{blk}.ffn_norm")
        gate, up = g.gate_up(h, blk)  # (T, F)
        x = g.layer_output(x + g.linear(g.silu(gate) * up, f"{blk}.ffn_down", g.dim))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))  # (wanted rows, V)
