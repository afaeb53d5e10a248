"""Granite 3 and 4, dense and of experts: a Llama with multipliers, some of it without rotation."""

from edgeinfer.graph import Graph

NAMES = ("granite", "granitemoe")


def forward(g: Graph) -> None:
    residual, logits = g.number("residual_scale", 0.0) or 1.0, g.number("logit_scale", low=1e-6)
    is_rotated = g.flag("rope.scaling.finetuned", True)
    x = g.scale(g.embed(), g.number("embedding_scale", 0.0) or 1.0)  # (T, D)
    for blk in g.layers():
        heads = g.heads()
        rope = g.rope("norm", heads.k_dim)
        h = g.rms_norm(x, f"{blk}.attn_norm")
        q, k, v = g.qkv(h, blk, heads)  # (T, H * d), (T, K * d), (T, K * d)
        if is_rotated:
            q, k = g.rotate(q, heads.n, rope), g.rotate(k, heads.n_kv, rope)
        scale = g.number("attention.scale", 0.0) or None
        a = g.attention(q, k, v, cache=heads.cache, scale=scale)
        x = x + g.scale(g.linear(a, f"{blk}.attn_output", g.dim), residual)
        h = g.rms_norm(x, f"{blk}.ffn_norm")
        if g.has(f"{blk}.ffn_gate_inp.weight"):
            f = g.experts(h, blk, g.count("feed_forward_length"))
        else:
            gate, up = g.gate_up(h, blk)  # (T, F)
            f = g.linear(g.silu(gate) * up, f"{blk}.ffn_down", g.dim)
        x = g.layer_output(x + g.scale(f, residual))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"), scale=1 / logits)  # (wanted rows, V)
