"""The published tensor names and where each belongs in our layout: the one place that knows both.

Projections of one input are stacked into one matrix, so a table entry is a range of rows. These are the names of
an unquantised checkpoint; `engine.formats` derives a quantised one's from them. Knows no files and no torch.

Invariant: the entries of one of our tensors cover its rows without gap or overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import LayerConfig, ModelConfig, VisionConfig


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes: rows `start` to `start + shape[0]` of our tensor `name`."""

    name: str
    start: int
    shape: tuple[int, ...]


def tensor_table(config: ModelConfig) -> dict[str, Place]:
    """Stored name -> place in our layout, for every tensor of the text model.

    Ours: embedding, norm, self_conditioning.{pre_norm, gate_up, down} and, under layers.N.:
    input_norm, post_attention_norm, pre_mlp_norm, post_mlp_norm, pre_experts_norm, post_experts_norm, post_ffn_norm,
    qkv (q, k and, on sliding layers, v), out, q_norm, k_norm, gate_up, down, router, router_scale, expert_scale,
    expert_gate_up, expert_down, commit_scalar, denoise_scalar.
    """
    hidden, width = config.hidden_size, config.intermediate_size
    table = {
        "model.decoder.embed_tokens.weight": Place("embedding", 0, (config.vocab_size, hidden)),
        "model.decoder.norm.weight": Place("norm", 0, (hidden,)),
        "model.decoder.self_conditioning.pre_norm.weight": Place("self_conditioning.pre_norm", 0, (hidden,)),
    }
    table.update(_mlp_table("model.decoder.self_conditioning.", "self_conditioning.", hidden, width))
    for index, layer in enumerate(config.layers):
        source, ours = f"model.decoder.layers.{index}.", f"layers.{index}."
        table[f"model.encoder.language_model.layers.{index}.layer_scalar"] = Place(ours + "commit_scalar", 0, (1,))
        table[source + "layer_scalar"] = Place(ours + "denoise_scalar", 0, (1,))
        for stored, name in NORMS.items():
            table[f"{source}{stored}.weight"] = Place(ours + name, 0, (hidden,))
        table.update(_attention_table(source + "self_attn.", ours, config, layer))
        table.update(_mlp_table(source + "mlp.", ours, hidden, width))
        table.update(_expert_table(source, ours, config))
    return table


VISION = "model.encoder.vision_tower."
PROJECTION = "model.encoder.embed_vision.embedding_projection.weight"


def vision_table(vision: VisionConfig, hidden_size: int) -> dict[str, Place]:
    """The same for the vision tower and the projection of what it finds to the text model's `hidden_size`.

    Ours: vision.projection and, under vision.tower., transformers' own names, because the tower is transformers' own.
    """
    hidden, width, heads = vision.hidden_size, vision.intermediate_size, vision.heads * vision.head_dim
    kv_heads = vision.kv_heads * vision.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedder.input_proj.weight": (hidden, 3 * vision.patch_size**2),
        "patch_embedder.position_embedding_table": (2, vision.positions, hidden),
    }
    if vision.standardize:
        shapes |= {"std_bias": (hidden,), "std_scale": (hidden,)}
    for index in range(vision.layers):
        layer = f"encoder.layers.{index}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{layer}{norm}_layernorm.weight"] = (hidden,)
        shapes |= {
            f"{layer}self_attn.q_proj.linear.weight": (heads, hidden),
            f"{layer}self_attn.k_proj.linear.weight": (kv_heads, hidden),
            f"{layer}self_attn.v_proj.linear.weight": (kv_heads, hidden),
            f"{layer}self_attn.o_proj.linear.weight": (hidden, heads),
            f"{layer}self_attn.q_norm.weight": (vision.head_dim,),
            f"{layer}self_attn.k_norm.weight": (vision.head_dim,),
            f"{layer}mlp.gate_proj.linear.weight": (width, hidden),
            f"{layer}mlp.up_proj.linear.weight": (width, hidden),
            f"{layer}mlp.down_proj.linear.weight": (hidden, width),
        }
    table = {VISION + name: Place(f"vision.tower.{name}", 0, shape) for name, shape in shapes.items()}
    table[PROJECTION] = Place("vision.projection", 0, (hidden_size, hidden))
    return table


NORMS = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_mlp_norm",
    "post_feedforward_layernorm_1": "post_mlp_norm",
    "pre_feedforward_layernorm_2": "pre_experts_norm",
    "post_feedforward_layernorm_2": "post_experts_norm",
    "post_feedforward_layernorm": "post_ffn_norm",
}


def _attention_table(source: str, ours: str, config: ModelConfig, layer: LayerConfig) -> dict[str, Place]:
    query_rows, kv_rows = config.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
    table = {
        source + "q_proj.weight": Place(ours + "qkv", 0, (query_rows, config.hidden_size)),
        source + "k_proj.weight": Place(ours + "qkv", query_rows, (kv_rows, config.hidden_size)),
        source + "o_proj.weight": Place(ours + "out", 0, (config.hidden_size, query_rows)),
        source + "q_norm.weight": Place(ours + "q_norm", 0, (layer.head_dim,)),
        source + "k_norm.weight": Place(ours + "k_norm", 0, (layer.head_dim,)),
    }
    if layer.kind == "sliding":  # full layers have none: their values are the raw keys
        table[source + "v_proj.weight"] = Place(ours + "qkv", query_rows + kv_rows, (kv_rows, config.hidden_size))
    return table


def _mlp_table(source: str, ours: str, hidden: int, width: int) -> dict[str, Place]:
    return {
        source + "gate_proj.weight": Place(ours + "gate_up", 0, (width, hidden)),
        source + "up_proj.weight": Place(ours + "gate_up", width, (width, hidden)),
        source + "down_proj.weight": Place(ours + "down", 0, (hidden, width)),
    }


def _expert_table(source: str, ours: str, config: ModelConfig) -> dict[str, Place]:
    count, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    return {
        source + "router.proj.weight": Place(ours + "router", 0, (count, hidden)),
        source + "router.scale": Place(ours + "router_scale", 0, (hidden,)),
        source + "router.per_expert_scale": Place(ours + "expert_scale", 0, (count,)),
        source + "experts.gate_up_proj": Place(ours + "expert_gate_up", 0, (count, 2 * width, hidden)),
        source + "experts.down_proj": Place(ours + "expert_down", 0, (count, hidden, width)),
    }
