"""Small models with random weights."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models import llama, qwen2

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}


def sharpen(model: nn.Module, seed: int = 0, gain: float = 2.5) -> nn.Module:
    """Random weights large enough that attention attends and that the next token is a decision."""
    mx.random.seed(seed)
    model.update(tree_map(lambda p: p * gain if p.ndim == 2 else p, model.parameters()))
    mx.eval(model.parameters())
    return model


def make_llama(seed: int = 0, **changes: Any) -> nn.Module:
    mx.random.seed(seed)
    return sharpen(llama.Model(llama.ModelArgs.from_dict(CONFIG | changes)), seed)


def make_qwen2(seed: int = 0, **changes: Any) -> nn.Module:
    """A model that mlx-lm can split into pipeline stages (llama it cannot)."""
    mx.random.seed(seed)
    args = qwen2.ModelArgs.from_dict(CONFIG | {"model_type": "qwen2", "rope_theta": 1e4} | changes)
    return sharpen(qwen2.Model(args), seed)


def make_biased_qwen2(bias_norm: float, gain: float = 1.6) -> nn.Module:
    """Keys with a large constant part, as Qwen2.5 has them; all else is the same for every `bias_norm`.

    The biases lie in the slow quarter of the rotary pairs, where they stay a constant after the rotation: a bias that turns
    within the context is no constant, and no mean can take it out.

    `gain` sets how far a change of the keys moves the logits. Beyond some change they are those of another text, and KL
    cannot grow any more: 0.5 nats at a gain of 1.6, 1.9 at 2.5. At 1.6 `tq3` without any bias costs 0.027 nats, as it does on
    a trained model (SmolLM2: 0.022), so that a ratio of 10 can be seen; at 2.5 it costs 0.28, and none could be.
    """
    mx.random.seed(3)
    args = qwen2.ModelArgs.from_dict(CONFIG | {"model_type": "qwen2", "rope_theta": 1e6, "hidden_size": 256})
    model = sharpen(qwen2.Model(args), 3, gain)
    for layer in model.layers:
        bias = mx.random.normal((2, 64)) * (mx.arange(64) % 32 >= 24)
        bias = bias * (bias_norm / mx.linalg.norm(bias, axis=1, keepdims=True))
        layer.self_attn.k_proj.bias = bias.flatten()
    mx.eval(model.parameters())
    return model


def save_folder(model: nn.Module, folder: Any, config: dict[str, Any] = CONFIG) -> Any:
    """A folder that mlx-lm's load_model takes."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prompt(n: int, seed: int = 0, vocab: int = 299) -> list[int]:
    return [(7919 * i * (i + seed + 3) + 31 * seed) % vocab + 1 for i in range(n)]


def greedy(model: nn.Module, tokens: list[int], n: int, cache: Any = None, **kwargs: Any) -> list[int]:
    steps = generate_step(mx.array(tokens), model, max_tokens=n, prompt_cache=cache, **kwargs)
    return [int(token) for token, _ in steps]


def logits_after(model: nn.Module, cache: list[Any], tokens: list[int], chunk: int = 10**9) -> mx.array:
    """fp32 logits ``[n_tokens, vocab]`` of tokens fed in chunks."""
    out = [model(mx.array([tokens[i : i + chunk]]), cache=cache)[0] for i in range(0, len(tokens), chunk)]
    return mx.concatenate(out).astype(mx.float32)


def kl(expected: mx.array, got: mx.array) -> float:
    """Mean KL(expected || got) of logits."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (expected, got))
    return float((mx.exp(p) * (p - q)).sum(axis=-1).mean().item())


TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def save_chat_folder(model: nn.Module, folder: Any, config: dict[str, Any] = CONFIG) -> Any:
    """A folder with a tokenizer of one token per byte, for the commands and the server."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    save_folder(model, folder, config | {"eos_token_id": 256})
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<end>", *(f"<{i}>" for i in range(43)))])
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


class Words:
    """As much of a tokenizer as batch_generate asks for."""

    eos_token_ids = ()

    def decode(self, tokens):
        return " ".join(str(t) for t in tokens)
