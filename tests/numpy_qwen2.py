"""Qwen2 on a compressed cache in NumPy float64, from the specification: nothing of tqext or MLX computes anything here.

The model sees a text in chunks. A chunk's queries attend to the exact first tokens, to codes (`reference.py`'s, decoded), and
to the exact rest, which includes the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import reference


@dataclass(frozen=True)
class Scheme:
    """How a layer stores its tokens."""

    key_bits: int
    value_bits: int
    coding: str
    first: int
    tail: int
    balance: np.ndarray | None = None

    def n_coded(self, n_stored: int) -> int:
        """Coded tokens when the next chunk comes."""
        return max(0, n_stored - self.first - self.tail) // reference.BLOCK * reference.BLOCK

    def decoded(self, keys, values):
        """What attention sees of whole blocks of keys and values ``[n_kv_heads, n, head_dim]``."""
        means = reference.block_means(keys)
        packed = reference.encode_keys(keys, self.key_bits, means=means, balance=self.balance)
        if self.coding == "lloyd":
            stored = reference.encode_values_lloyd(values, self.value_bits)
        else:
            stored = reference.encode_values(values, self.value_bits)
        return reference.decode_keys(packed), reference.decode_values(stored)


class Qwen2:
    """A model with the weights of mlx-lm's `qwen2.Model`, as a dictionary of arrays."""

    def __init__(self, args, weights):
        self.args = args
        self.weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.head_dim = args.hidden_size // args.num_attention_heads
        self.frequencies = args.rope_theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)

    def log_probabilities(self, tokens, chunk, schemes=None):
        """``[n_tokens, n_vocab]``, of a cache that stores what each layer's scheme says, exact tokens where it is None."""
        n_layers = self.args.num_hidden_layers
        stored = [None] * n_layers
        out = []
        for begin in range(0, len(tokens), chunk):
            x = self.weights["model.embed_tokens.weight"][tokens[begin : begin + chunk]]
            for layer in range(n_layers):
                x = self._layer(x, layer, begin, stored, schemes[layer] if schemes else None)
            x = self._norm(x, "model.norm")
            head = "model.embed_tokens.weight" if self.args.tie_word_embeddings else "lm_head.weight"
            logits = x @ self.weights[head].T
            peak = logits.max(-1, keepdims=True)
            out.append(logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True)))
        return np.concatenate(out)

    def _layer(self, x, layer, begin, stored, scheme):
        path = f"model.layers.{layer}"
        attention = self._attention(self._norm(x, f"{path}.input_layernorm"), f"{path}.self_attn", layer, begin, stored, scheme)
        x = x + attention
        y = self._norm(x, f"{path}.post_attention_layernorm")
        gate, up = (self._linear(y, f"{path}.mlp.{name}") for name in ("gate_proj", "up_proj"))
        return x + self._linear(gate / (1 + np.exp(-gate)) * up, f"{path}.mlp.down_proj")

    def _attention(self, x, path, layer, begin, stored, scheme):
        n = len(x)
        heads = {"q": self.args.num_attention_heads, "k": self.args.num_key_value_heads, "v": self.args.num_key_value_heads}
        q, k, v = (
            self._linear(x, f"{path}.{name}_proj").reshape(n, count, self.head_dim).swapaxes(0, 1)
            for name, count in heads.items()
        )
        positions = np.arange(begin, begin + n)
        q, k = self._rope(q, positions), self._rope(k, positions)
        if stored[layer] is not None:
            k, v = (np.concatenate(pair, axis=1) for pair in zip(stored[layer], (k, v), strict=True))
        stored[layer] = k, v
        if scheme is not None and (n_coded := scheme.n_coded(begin)):
            place = slice(scheme.first, scheme.first + n_coded)
            seen = scheme.decoded(k[:, place], v[:, place])
            k, v = k.copy(), v.copy()
            k[:, place], v[:, place] = seen
        k, v = (np.repeat(part, heads["q"] // heads["k"], axis=0) for part in (k, v))
        scores = q @ k.swapaxes(1, 2) * self.head_dim**-0.5
        scores = np.where(np.arange(begin + n) <= positions[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True)) @ v
        return self._linear(out.swapaxes(0, 1).reshape(n, -1), f"{path}.o_proj")

    def _rope(self, x, positions):
        angle = positions[:, None] * self.frequencies
        cos, sin = np.cos(angle), np.sin(angle)
        half = self.head_dim // 2
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def _norm(self, x, path):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.args.rms_norm_eps) * self.weights[f"{path}.weight"]

    def _linear(self, x, path):
        out = x @ self.weights[f"{path}.weight"].T
        return out + self.weights[f"{path}.bias"] if f"{path}.bias" in self.weights else out


def mean_kl(expected, got, n):
    """Mean KL(expected || got) of the first `n` rows of log-probabilities."""
    return float((np.exp(expected[:n]) * (expected[:n] - got[:n])).sum(-1).mean())
