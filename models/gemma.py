"""Gemma 2 and 3: windows on most layers, and a norm before and behind every branch.

Gemma 2 caps its scores and logits. Gemma 3 norms each head of q and k instead, and rotates layers
with a window by a base of their own.
"""

from edgeinfer.graph import Graph

NAMES = {"gemma2": 2, "gemma3": 6}  # of so many layers the last one sees everything
# Models whose scores are scaled by dim / n_heads in place of the head width, by their layers.
_SCALED_BY_DIM = {("gemma2", 46), ("gemma3", 62)}


def forward(g: Graph) -> None:
    name, is_2 = g.hparams.architecture, g.hparams.architecture == "gemma2"
    score_cap = g.number("attn_logit_softcapping", 50.0 if is_2 else 0.0, low=0)
    logit_cap = g.number("final_logit_softcapping", 30.0 if is_2 else 0.0, low=0)
    x = g.scale(g.embed(), g.dim**0.5)  # (T, D)
    for blk in g.layers():
        window = g.window(NAMES[name], 4096 if is_2 else 0)
        heads = g.heads(window)
        is_local = window > 0 and not is_2
        rope = (g.window_rope if is_local else g.rope)("neox", heads.k_dim)
        h = g.rms_norm(x, f"{blk}.attn_norm")
        q, k, v = g.qkv(h, blk, heads)  # (T, H * d), (T, K * d), (T, K * d)
        if not is_2:
            q = g.rms_norm(q, f"{blk}.attn_q_norm", heads.n)
            k = g.rms_norm(k, f"{blk}.attn_k_norm", heads.n_kv)
        q, k = g.rotate(q, heads.n, rope), g.rotate(k, heads.n_kv, rope)
        is_scaled_by_dim = (name, g.hparams.n_layers) in _SCALED_BY_DIM
        scale = (g.dim / heads.n) ** -0.5 if is_scaled_by_dim else None
        a = g.attention(q, k, v, cache=heads.cache, scale=scale, soft_cap=score_cap)
        a = g.linear(a, f"{blk}.attn_output", g.dim)
        x = x + g.rms_norm(a, f"{blk}.post_attention_norm")
        h = g.rms_norm(x, f"{blk}.ffn_norm")
        gate, up = g.gate_up(h, blk)  # (T, F)
        f = g.linear(g.activation("gelu", gate) * up, f"{blk}.ffn_down", g.dim)
        x = g.layer_output(x + g.rms_norm(f, f"{blk}.post_ffw_norm"))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"), soft_cap=logit_cap)  # (wanted rows, V)
