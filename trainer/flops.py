"""What a training step has to compute: the FLOPs that a model's mathematics needs, for MFU.

Model FLOPs in the sense of PaLM (Chowdhery et al., 2022, appendix B): products of matrices only, a multiplication and
an addition counted as two, and nothing that an implementation computes again, so that a reversible stack, which runs
every layer a second time, gets no credit for it. Attention is counted by the keys that the rounds let a token see,
whether or not a causal mask hides some of them (PaLM counts so too), and never more than there are tokens.

    projections       query, key, value and output of local layers; shared query and key, value and output of others
    feed_forward      two products, d_model by d_ff
    head              both streams side by side with the vocabulary; tied, with d_model columns and the embedding
    local_attention   scores and weighted values with 2 chunks of keys a token, 3 when bidirectional
    lsh_attention     the same in n_hashes rounds, with no more keys in all of them together than there are tokens: all
                      rounds are one softmax (so counted too with attn_dropout or without attend_across_buckets)
    dense_attention   the same with all tokens as keys
    hashing           one product with the rotations, sum(factors) / 2 columns a round; it has no gradient
"""

from reformer.config import AttentionKind, ReformerConfig
from reformer.lsh.hashing import bucket_factors

FLOPS_OF_PRODUCT = 2
"""A multiplication and an addition."""
PROJECTIONS: dict[AttentionKind, int] = {"local": 4, "lsh": 3, "dense": 3}
"""Products d_model by n_heads * d_head in a layer, the output's included."""


def training_flops(config: ReformerConfig, seq_len: int) -> int:
    """FLOPs of the forward and the backward of one sequence of seq_len tokens, each of which has a label.

    A product costs three times its forward, for the gradients of both its factors; hashing its forward alone.

    Raises:
        ValueError: seq_len outside [1, max_seq_len].
    """
    forward = forward_flops(config, seq_len)
    return 3 * sum(forward.values()) - 2 * forward["hashing"]


def forward_flops(config: ReformerConfig, seq_len: int) -> dict[str, int]:
    """The same of the forward alone, by the parts named at the file's top. Raises ValueError like `training_flops`."""
    if not 1 <= seq_len <= config.max_seq_len:
        raise ValueError(f"seq_len={seq_len} must be from 1 to max_seq_len={config.max_seq_len}: change one of them")
    assert config.d_head is not None and config.d_ff is not None  # filled in by the config
    kinds = [config.attention_kind(layer) for layer in range(config.n_layers)]
    heads_width = config.n_heads * config.d_head
    factors = bucket_factors(config.n_buckets, seq_len, config.lsh_chunk_len)
    lsh_keys = visible_keys(config, seq_len, config.n_hashes * config.lsh_chunk_len)
    local_keys = visible_keys(config, seq_len, config.local_chunk_len)
    products_per_token = {
        "projections": sum(PROJECTIONS[kind] for kind in kinds) * config.d_model * heads_width,
        "feed_forward": config.n_layers * 2 * config.d_model * config.d_ff,
        "head": config.d_model
        * (2 * config.d_model + config.vocab_size if config.tie_embeddings else 2 * config.vocab_size),
        "local_attention": kinds.count("local") * 2 * local_keys * heads_width,
        "lsh_attention": kinds.count("lsh") * 2 * lsh_keys * heads_width,
        "dense_attention": kinds.count("dense") * 2 * seq_len * heads_width,
        "hashing": kinds.count("lsh") * config.n_hashes * heads_width * (sum(factors) // 2),
    }
    return {part: FLOPS_OF_PRODUCT * seq_len * products for part, products in products_per_token.items()}


def visible_keys(config: ReformerConfig, seq_len: int, chunks_len: int) -> int:
    """Keys that a token finds in the chunks that it sees: its own (in each round), those before, those after."""
    return min(seq_len, (2 if config.causal else 3) * chunks_len)
