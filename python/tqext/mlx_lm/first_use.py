"""What a model's kernels need before its first prompt, so that no generation waits for a compiler."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from tqext._ext import prepare_pipelines
from tqext.mlx_lm.reports import Report


def prepare(report: Report) -> int:
    """Compile the Metal kernels of a model's compressed layers; returns how many there are, 0 on the CPU and on CUDA.

    These are the kernels of generations of one sequence, with prompts, drafts and contexts of any length. What is compiled
    already costs nothing. Batches need others, and so do dense rotations: those are compiled at their first use.
    """
    return sum(prepare_pipelines(**dict(shapes)) for shapes in dict.fromkeys(_shapes(report)))


def _shapes(report: Report) -> list[tuple[tuple[str, Any], ...]]:
    """The arguments of `prepare_pipelines` for every layer and kind of query."""
    all_shapes = []
    for layer in report.compressed:
        recipe = layer.recipe
        assert recipe is not None
        for queries in layer.queries:
            shapes = {
                "n_q_heads": queries.n_heads,
                "n_kv_heads": layer.n_kv_heads,
                "head_dim": layer.head_dim,
                "value_dim": layer.head_dim if layer.is_latent else layer.value_dim,
                "query_dtype": getattr(mx, queries.dtype),
                "token_dtype": getattr(mx, str(layer.dtype)),
                "key_bits": recipe.key_bits,
                "value_bits": recipe.value_bits,
                "value_coding": recipe.value_coding,
                "rotation": recipe.rotation,
                "means": recipe.means,
                "balance": layer.calibration is not None and layer.calibration.balance is not None,
                "qjl": recipe.qjl,
                "sinks": queries.has_sinks,
                "window": layer.window is not None,
                "latent": layer.is_latent,
            }
            all_shapes.append(tuple(shapes.items()))
    return all_shapes
