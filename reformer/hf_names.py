"""What the fields of our configuration and the tensors of our models are called in Hugging Face's Reformer."""

from typing import Any

from reformer.config import MEMORY_ONLY, ReformerConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "d_head": "attention_head_size",
    "d_ff": "feed_forward_size",
    "activation": "hidden_act",
    "causal": "is_decoder",
    "n_hashes": "num_hashes",
    "n_buckets": "num_buckets",
    "lsh_chunk_len": "lsh_attn_chunk_length",
    "local_chunk_len": "local_attn_chunk_length",
    "axial_shape": "axial_pos_shape",
    "axial_dims": "axial_pos_embds_dim",
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
}
"""Fields of ReformerConfig and their names in config.json; attn_pattern and n_layers are `attn_layers` there."""

ATTN_DROPOUT = {kind: f"{kind}_attention_probs_dropout_prob" for kind in ("local", "lsh")}
"""What attn_dropout is called there, for each kind of attention."""

CARRIED = (*MEMORY_ONLY, "seed")
"""Fields that Hugging Face has no use for. They travel under the key "longhand", which transformers keeps."""

DEFAULTS: dict[str, Any] = {
    "attention_head_size": 64,
    "attn_layers": ["local", "lsh", "local", "lsh", "local", "lsh"],
    "axial_pos_embds": True,
    "axial_pos_embds_dim": [64, 192],
    "axial_pos_shape": [64, 64],
    "feed_forward_size": 512,
    "hash_seed": None,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.05,
    "hidden_size": 256,
    "is_decoder": False,
    "layer_norm_eps": 1e-12,
    "local_attention_probs_dropout_prob": 0.05,
    "local_attn_chunk_length": 64,
    "local_num_chunks_after": 0,
    "local_num_chunks_before": 1,
    "longhand": {},
    "lsh_attention_probs_dropout_prob": 0.0,
    "lsh_attn_chunk_length": 64,
    "lsh_num_chunks_after": 0,
    "lsh_num_chunks_before": 1,
    "max_position_embeddings": 4096,
    "model_type": "reformer",
    "num_attention_heads": 12,
    "num_buckets": None,
    "num_hashes": 1,
    "tie_word_embeddings": False,
    "vocab_size": 320,
}
"""What transformers takes for a key that config.json leaves out, for every key that is read here."""

TENSORS = {
    "embedding.tokens.weight": "reformer.embeddings.word_embeddings.weight",
    "embedding.positions.rows": "reformer.embeddings.position_embeddings.weights.0",
    "embedding.positions.columns": "reformer.embeddings.position_embeddings.weights.1",
    "head.norm_weight": "reformer.encoder.layer_norm.weight",
    "head.norm_bias": "reformer.encoder.layer_norm.bias",
    "head.weight": "lm_head.decoder.weight",
    "head.bias": "lm_head.bias",
}
BLOCK_TENSORS = {
    "attention.norm_weight": "attention.layer_norm.weight",
    "attention.norm_bias": "attention.layer_norm.bias",
    "attention.value_weight": "attention.self_attention.value.weight",
    "attention.out_weight": "attention.output.dense.weight",
    "feed_forward.norm_weight": "feed_forward.layer_norm.weight",
    "feed_forward.norm_bias": "feed_forward.layer_norm.bias",
    "feed_forward.in_weight": "feed_forward.dense.dense.weight",
    "feed_forward.in_bias": "feed_forward.dense.dense.bias",
    "feed_forward.out_weight": "feed_forward.output.dense.weight",
    "feed_forward.out_bias": "feed_forward.output.dense.bias",
}
KIND_TENSORS = {
    "local": {
        "attention.query_weight": "attention.self_attention.query.weight",
        "attention.key_weight": "attention.self_attention.key.weight",
    },
    "lsh": {"attention.qk_weight": "attention.self_attention.query_key.weight"},
}


def tensor_names(config: ReformerConfig) -> dict[str, str]:
    """For every tensor of our state_dict its name in model.safetensors."""
    names = dict(TENSORS)
    for layer in range(config.n_layers):
        in_block = {**BLOCK_TENSORS, **KIND_TENSORS[config.attention_kind(layer)]}
        names.update(
            {f"blocks.{layer}.{ours}": f"reformer.encoder.layers.{layer}.{theirs}" for ours, theirs in in_block.items()}
        )
    return names
