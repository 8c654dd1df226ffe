"""One tiny configuration for each of mlx-lm's kinds of model: common sizes, and what a kind needs beside them."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

MAX_PARAMETERS = 5_000_000  # some kinds ignore a size and take gigabytes

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "hidden_dim", "n_embd"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"), 1e-5),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_global_base_freq"), 1e4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 1024),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "n_group", "topk_group", "decoder_sparse_step"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"), False),
    **dict.fromkeys(("logits_scaling", "attention_multiplier", "embedding_multiplier", "residual_multiplier"), 1.0),
    **dict.fromkeys(("logit_scale", "routed_scaling_factor", "rotary_pct", "partial_rotary_factor"), 1.0),
    **dict.fromkeys(("head_dim", "rotary_dim", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "query_pre_attn_scalar"), 32),
    **dict.fromkeys(("ssm_state_size", "state_size", "mamba_d_state", "mamba_head_dim", "qk_rope_head_dim"), 16),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "mamba_dt_rank", "mamba_num_heads", "time_step_rank"), 4),
    **dict.fromkeys(("linear_num_value_heads", "linear_conv_kernel_dim"), 4),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "first_k_dense_replace", "n_groups"), 1),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "full_attention_interval", "mamba_expand"), 2),
    **dict.fromkeys(("linear_num_key_heads", "num_experts_per_tok", "sliding_window_pattern"), 2),
    "vocab_size": 128,
    "tie_word_embeddings": True,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "sliding_window": 16,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "mamba_conv_bias": True,
    "use_conv_bias": True,
    "time_step_limit": (0.001, 100.0),
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
# Two layers that keep keys and values, one of them in a window, and two that attend to theirs.
SHARED_KV: dict[str, Any] = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 32,
}
GEMMA3N: dict[str, Any] = {
    **SIZES,
    **SHARED_KV,
    "model_type": "gemma3n",
    "activation_sparsity_pattern": [0.5] * 4,
    "altup_num_inputs": 4,
    "altup_coef_clip": 1.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
}
GEMMA4: dict[str, Any] = {**SHARED_KV, "model_type": "gemma4_text", "global_head_dim": 64}
MLA = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}

# Kind: (compressed layers, what the config needs beside SIZES).
PLAIN: dict[str, tuple[int, dict[str, Any]]] = {
    "llama": (4, {}),
    "qwen2": (4, {}),
    "qwen3": (4, {}),
    "qwen3_moe": (4, {}),
    "mixtral": (4, {}),
    "cohere": (4, {}),
    "gemma": (4, {}),
    "glm4": (4, {}),
    "gpt2": (4, {}),
    "gpt_neox": (4, {"rotary_emb_base": 10000}),
    "gpt_bigcode": (4, {"n_inner": 128}),
    "granite": (4, {}),
    "internlm2": (4, {}),
    "minicpm": (4, {"dim_model_base": 64, "scale_depth": 1.0, "scale_emb": 1.0}),
    "nemotron": (4, {"hidden_act": "relu2"}),
    "olmo2": (4, {}),
    "phi": (4, {}),
    "phi3": (4, {}),
    "smollm3": (4, {}),
    "starcoder2": (4, {}),
}
# What is special: hybrids, windows, shared keys and values, sinks, other head dimensions for values, and refusals.
SPECIAL: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen3_next": (2, {}),
    "qwen3_5": (2, {}),
    "jamba": (2, {}),
    "falcon_h1": (4, {}),
    "nemotron_h": (1, {"hybrid_override_pattern": "M*-M", "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2"}),
    "plamo2": (2, {}),
    "lfm2": (
        2,
        {
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": 64,
            "block_ff_dim": 128,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "full_attn_idxs": [1, 3],
        },
    ),
    "gemma3_text": (2, {}),
    "gemma3n": (1, {"text_config": GEMMA3N}),
    "gemma4_text": (1, GEMMA4),
    "gemma4": (1, {"text_config": {**SIZES, **GEMMA4}}),
    "cohere2": (2, {"head_dim": 16}),
    "exaone4": (2, {"rope_scaling": None, "sliding_window_pattern": "LG"}),
    "olmo3": (1, {}),
    "gpt_oss": (2, {}),
    "iquestloopcoder": (4, {}),
    "afm7": (2, {"num_kv_reuse_layers": 2}),
    "deepseek_v2": (4, {"rope_scaling": {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 1024}}),
    "youtu_llm": (4, {}),
    "mamba2": (0, {}),
    "gemma2": (0, {}),
    "deepseek_v3": (0, MLA),
    "deepseek_v32": (0, {**MLA, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 8}),
    "glm4_moe_lite": (0, MLA),
}


def make(kind: str, changes: dict[str, Any]) -> nn.Module:
    """A model of that kind with random weights."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({**SIZES, "model_type": kind, **changes}))
    n_parameters = sum(p.size for _, p in tree_flatten(model.parameters()))
    assert n_parameters < MAX_PARAMETERS, f"{kind}: {n_parameters} parameters"
    mx.eval(model.parameters())
    return model
