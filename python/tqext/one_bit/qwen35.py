"""GGUF files of Qwen 3.5's architecture, and of PrismML's 'Bonsai 2': ternary weights behind a rotation of their inputs.

llama.cpp keeps the value heads of the linear-attention layers tiled: value head j of every key head, then value head j + 1.
mlx-lm, as the published checkpoints, has the value heads of one key head side by side. Going back is a permutation of rows.

A folded matrix W is stored as W S H: H is the normalised Walsh-Hadamard matrix of consecutive blocks of the input, S a sign per
input. The product needs H (S x) in the place of x. A folded embedding stores rows H (S e), and S (H z) gives them back.

Sources: mlx-lm's models/prism_hadamard_qwen35.py, which computes it; independent readers of such files that cite llama.cpp's
conversion/qwen.py for the order, and PrismML-Eng/llama.cpp's llama-model.cpp for the metadata prism.hadamard.*.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata as packages
from typing import Any

import numpy as np

from tqext.one_bit.checkpoint import Config
from tqext.one_bit.gguf_file import Metadata, Tensor

ARCHITECTURE = "qwen35"
MODEL_TYPE = "qwen3_5"
FOLDED_MODEL_TYPE = "prism_hadamard_qwen35"
GROUP_SIZE = 128  # of mlx-lm's folded layers
_TRANSFORM, _AXIS = "normalized-sylvester-walsh-hadamard", "input-last-dimension"
_PREFIX = "prism.hadamard."
BLOCK_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
# Tensors that are parameters of a layer themselves: the whole name within a block.
PARAMETERS = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
# Metadata that `settings` reads. The sections are those of images; for text all are one position.
KNOWN = {
    "full_attention_interval",
    "rope.dimension_sections",
    "ssm.conv_kernel",
    "ssm.group_count",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.time_step_rank",
}


def settings(get: Any) -> dict[str, Any]:
    """mlx-lm's settings that other architectures do not have; `get` reads the architecture's metadata."""
    n_keys, n_values, inner = (int(get(f"ssm.{key}")) for key in ("group_count", "time_step_rank", "inner_size"))
    if n_keys <= 0 or n_values <= 0 or n_values % n_keys or inner % n_values:
        raise ValueError(
            f"[gguf] qwen35.ssm.time_step_rank: expected value heads that {n_keys} key heads share and that divide {inner}, "
            f"got {n_values}"
        )
    rotary, head_dim = int(get("rope.dimension_count")), int(get("attention.key_length"))
    if not 0 < rotary <= head_dim:
        raise ValueError(f"[gguf] qwen35.rope.dimension_count: expected 1 to {head_dim}, got {rotary}")
    if (interval := int(get("full_attention_interval", 4))) < 1:
        raise ValueError(f"[gguf] qwen35.full_attention_interval: expected 1 or more, got {interval}")
    return {
        "linear_num_key_heads": n_keys,
        "linear_num_value_heads": n_values,
        "linear_key_head_dim": int(get("ssm.state_size")),
        "linear_value_head_dim": inner // n_values,
        "linear_conv_kernel_dim": int(get("ssm.conv_kernel")),
        "full_attention_interval": interval,
        "rope_parameters": {
            "type": "default",
            "rope_theta": float(get("rope.freq_base", 10000.0)),
            "partial_rotary_factor": rotary / head_dim,
        },
    }


def ungrouped_rows(x: np.ndarray, part: str, config: Config) -> np.ndarray:
    """The rows of a tensor `part` of a block (or its values, if it has one axis) in mlx-lm's order."""
    n_keys, n_values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    begin = 2 * n_keys * config["linear_key_head_dim"] if part in ("attn_qkv", "ssm_conv1d") else 0
    if part not in ("attn_qkv", "ssm_conv1d", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"):
        return x
    return np.concatenate([x[:begin], _regroup(x[begin:], n_keys, n_values, part)])


def ungrouped_columns(x: np.ndarray, config: Config) -> np.ndarray:
    """The columns of an ``ssm_out`` that is not folded, or the groups' scales of such a matrix, in mlx-lm's order."""
    return np.ascontiguousarray(_regroup(x.T, config["linear_num_key_heads"], config["linear_num_value_heads"], "ssm_out").T)


def _regroup(x: np.ndarray, n_keys: int, n_values: int, part: str) -> np.ndarray:
    if len(x) % n_values:
        raise ValueError(f"[gguf] {part}: expected the values of {n_values} heads, got {len(x)}")
    heads = x.reshape(n_values // n_keys, n_keys, len(x) // n_values, *x.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(x.shape)


@dataclass(frozen=True)
class Fold:
    """What a file says of its rotations.

    Attributes:
        block_size: Inputs that are rotated together.
        names: Folded tensors.
        signs: By the number of inputs; empty if all are +1.
    """

    block_size: int
    names: frozenset[str]
    signs: dict[int, np.ndarray]

    def signs_of(self, name: str, width: int) -> np.ndarray:
        """A sign per input of a folded tensor, fp32."""
        if width % self.block_size:
            raise ValueError(f"[gguf] {name}: expected whole blocks of {self.block_size} inputs, got {width}")
        if not self.signs:
            return np.ones(width, np.float32)
        if width not in self.signs:
            raise ValueError(f"[gguf] {_PREFIX}sign_widths: expected the {width} inputs of {name}, got {sorted(self.signs)}")
        return self.signs[width]


def read_fold(metadata: Metadata, tensors: dict[str, Tensor]) -> Fold | None:
    """The rotations of a file, None if it has none.

    Raises:
        ValueError: They are not those that mlx-lm undoes.
    """
    if not any(name.startswith(_PREFIX) for name in metadata):
        return None
    if importlib.util.find_spec(f"mlx_lm.models.{FOLDED_MODEL_TYPE}") is None:
        raise ValueError(
            f"[gguf] {_PREFIX}*: expected an mlx-lm with the model {FOLDED_MODEL_TYPE} to rotate the inputs of Hadamard-folded "
            f"weights, got mlx-lm {packages.version('mlx-lm')}"
        )

    def value(key: str, *allowed: Any) -> Any:
        got = metadata.get(f"{_PREFIX}{key}")
        if allowed and got not in allowed:
            raise ValueError(f"[gguf] {_PREFIX}{key}: expected {' or '.join(map(repr, allowed))}, got {got!r:.100}")
        return got

    version = value("version", 1, 2)
    value("transform", _TRANSFORM)
    value("axis", _AXIS)
    tied = bool(value("tied_output"))
    if tied != (version == 2) or (tied and "output.weight" in tensors):
        raise ValueError(
            f"[gguf] {_PREFIX}tied_output: expected true in version 2 without output.weight, else false, got {tied}"
        )
    block_size = value("block_size")
    if not isinstance(block_size, int) or block_size <= 0 or block_size & (block_size - 1):
        raise ValueError(f"[gguf] {_PREFIX}block_size: expected a power of two, got {block_size!r:.100}")
    forward, inverse = value("weight_names"), value("inverse_weight_names") or []
    if not forward or not set(inverse) <= {"token_embd.weight"} or "token_embd.weight" in forward:
        raise ValueError(
            f"[gguf] {_PREFIX}weight_names: expected matrices there and no other than token_embd.weight in "
            f"inverse_weight_names, got {forward!r:.100} and {inverse!r:.100}"
        )
    if missing := (set(forward) | set(inverse)) - tensors.keys():
        raise ValueError(f"[gguf] {_PREFIX}weight_names: expected names of tensors, got {min(missing)}")
    value("gdn_v_grouped", *([True] if any(name.endswith(".ssm_out.weight") for name in forward) else [True, False, None]))
    signs = _signs(metadata) if value("sign_mode", "identity", "explicit") == "explicit" else {}
    return Fold(block_size, frozenset(forward) | frozenset(inverse), signs)


def _signs(metadata: Metadata) -> dict[int, np.ndarray]:
    widths = metadata.get(f"{_PREFIX}sign_widths") or []
    values = np.asarray(metadata.get(f"{_PREFIX}sign_values") or [], np.float32)
    if not widths or min(widths) <= 0 or len(set(widths)) < len(widths) or sum(widths) != values.size:
        raise ValueError(f"[gguf] {_PREFIX}sign_widths: expected different widths of {values.size} signs, got {widths!r:.100}")
    if not np.all(np.abs(values) == 1):
        raise ValueError(f"[gguf] {_PREFIX}sign_values: expected -1 and 1 only, got other numbers")
    return dict(zip(widths, np.split(values, np.cumsum(widths)[:-1]), strict=True))


def finish(config: Config, fold: Fold | None, modules: list[dict[str, Any]]) -> dict[str, Any]:
    """config.json from the settings of the text model."""
    outer: dict[str, Any] = {
        key: config[key] for key in ("torch_dtype", "bos_token_id", "eos_token_id", "quantization") if key in config
    }
    text = {key: value for key, value in config.items() if key not in ("quantization", "architectures")}
    if fold is None:
        return {"model_type": MODEL_TYPE, "architectures": config["architectures"], "text_config": text, **outer}
    return {
        "model_type": FOLDED_MODEL_TYPE,
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "gdn_activation_layout": "grouped",
        "modules": modules,
        "text_config": text,
        **outer,
    }
