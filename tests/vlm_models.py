"""Small vision-language models of mlx-vlm with random weights, and prompts with an image among text."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

IMAGE, START, END = 250, 251, 252
N_IMAGE = 16  # tokens of an image
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
}
QWEN: dict[str, Any] = {
    "vocab_size": 300,
    "image_token_id": IMAGE,
    "video_token_id": 253,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
VISION: dict[str, Any] = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": TEXT  # its text is at the top level
    | QWEN
    | {
        "model_type": "qwen2_5_vl",
        "hidden_size": 256,
        "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "vision_config": VISION | {"model_type": "qwen2_5_vl", "out_hidden_size": 256, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": QWEN
    | {
        "model_type": "qwen3_vl",
        "text_config": TEXT
        | {
            "model_type": "qwen3_vl_text",
            "head_dim": 64,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "rope_scaling": {"type": "mrope", "mrope_section": [12, 10, 10]},
        },
        "vision_config": VISION
        | {"model_type": "qwen3_vl", "out_hidden_size": 128, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    },
    "gemma3": {
        "model_type": "gemma3",
        "vocab_size": 300,
        "image_token_index": IMAGE,
        "hidden_size": 128,
        "text_config": TEXT
        | {
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window": 96,
            "sliding_window_pattern": 3,
            "mm_tokens_per_image": N_IMAGE,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "patch_size": 14,
            "image_size": 112,
        },
    },
}


def make(kind: str) -> Any:
    """A model as mlx-vlm's load_model makes it, with weights large enough that attention attends."""
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    mx.random.seed(0)
    config = dict(CONFIGS[kind])
    classes, _ = get_model_and_args(config=config)
    config.setdefault("text_config", {})
    config.setdefault("vision_config", {})
    model_config = update_module_configs(classes.ModelConfig.from_dict(config), classes, config, ["text", "vision"])
    model = classes.Model(model_config)
    text = model.language_model
    text.update(tree_map(lambda p: p * 2.5 if p.ndim == 2 else p, text.parameters()))
    mx.eval(model.parameters())
    return model


def with_image(kind: str, text: list[int], seed: int = 0) -> tuple[list[int], mx.array, dict[str, mx.array]]:
    """The tokens with those of an image after a third of them, its pixels, and what else the model is told about it."""
    third = len(text) // 3
    tokens = [*text[:third], START, *[IMAGE] * N_IMAGE, END, *text[third:]]
    key = mx.random.key(seed)
    if kind == "gemma3":
        return tokens, mx.random.normal((1, 3, 112, 112), key=key), {}
    return tokens, mx.random.normal((64, 3 * 2 * 14 * 14), key=key), {"image_grid_thw": mx.array([[1, 8, 8]])}


# Ids of the tokenizer's own tokens; the characters of a text are below, what no text needs is above.
NAMED = {IMAGE: "<|image_pad|>", START: "<|vision_start|>", END: "<|vision_end|>", 253: "<|video_pad|>", 254: "<end>"}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}PLACE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_with_processor(kind: str, folder: Any) -> Any:
    """A folder as mlx-vlm's server loads it: a token per character, and images of 112 x 112 pixels."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    model = make(kind)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind] | {"eos_token_id": 254}))
    vocab = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(IMAGE), strict=False))
    named = NAMED | ({START: "<start_of_image>"} if kind == "gemma3" else {})  # mlx-vlm writes it into gemma3's text
    added = [named.get(i, f"<{i}>") for i in range(IMAGE, 300)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab | {name: IMAGE + i for i, name in enumerate(added)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in added[: len(named)]])
    tokenizer.add_tokens(added[len(named) :])  # an answer shows them
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"image_token": named[IMAGE], "boi_token": named[START], "eoi_token": named[END]}
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "chat_template": TEMPLATE.replace("PLACE", named[START] + named[IMAGE] + named[END]),
        "extra_special_tokens": special if kind == "gemma3" else {},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    images = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 112, "width": 112}}
    if kind != "gemma3":
        images = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
                  "min_pixels": 3136, "max_pixels": 12544}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": N_IMAGE}))
    return folder
