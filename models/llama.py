"""Llama 2 and 3, SmolLM2, Mistral, Mixtral, Qwen 2 and 2.5: grouped-query attention and SwiGLU.

Adjacent or half-split rotary pairs, by name. Llama 3's rope factors, Qwen's biases on q, k and v,
a tied head and Mixtral's experts follow from the file's tensors.
"""

from edgeinfer.graph import Graph, RopeKind

NAMES: dict[str, RopeKind] = {"llama": "norm", "qwen2": "neox"}


def forward(g: Graph) -> None:
    x = g.embed()  # (T, D)
    for blk in g.layers():
        heads = g.heads()
        rope = g.rope(NAMES[g.hparams.architecture], heads.k_dim)
        h = g.rms_norm(x, f"{blk}.attn_norm")
        q, k, v = g.qkv(h, blk, heads)  # (T, H * d), (T, K * d), (T, K * d)
        q, k = g.rotate(q, heads.n, rope), g.rotate(k, heads.n_kv, rope)
        a = g.attention(q, k, v, cache=heads.cache)
        x = x + g.linear(a, f"{blk}.attn_output", g.dim)
        h = g.rms_norm(x, f"{blk}.ffn_norm")
        if g.has(f"{blk}.ffn_gate_inp.weight"):
            f = g.experts(h, blk, g.count("feed_forward_length"))
        else:
            gate, up = g.gate_up(h, blk)  # (T, F)
            f = g.linear(g.silu(gate) * up, f"{blk}.ffn_down", g.dim)
        x = g.layer_output(x + f)
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))  # (wanted rows, V)
