"""What benches and tests mean by one name. It imports nothing: benches set tqext's environment before they import it."""

# Head dimension, query heads per KV head, KV heads: Gemma, Qwen3.8, Qwen3.5, Qwen3.8-Flash, gpt-oss.
TODAY = ((256, 4, 4), (256, 6, 4), (256, 8, 2), (256, 12, 2), (64, 8, 8))

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 262144,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
# Rows and columns of the matrices of one of its layers, those with one input joined; and of its head.
QWEN3_8B_LAYER = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
QWEN3_8B_HEAD = (151936, 4096)

# Presets for use, in the order of their tables.
PRESETS = ("tq3", "tq33", "tq4", "tq2")
