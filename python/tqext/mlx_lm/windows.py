"""Whether it pays to compress layers with a sliding window: mlx-lm's own cache of them does not grow with the context."""

from __future__ import annotations

from dataclasses import replace

from mlx.utils import tree_reduce

from tqext.calibration import known_context
from tqext.mlx_lm.reports import Layer, Report
from tqext.protocols import Model, ModuleTree

# What a client holds, for the rule of the policy's `windows`.
CLIENT_TOKENS = 4096
# The share of the memory that compressed windows have to save.
LEAST_SAVING = 0.2


def weight_bytes(model: ModuleTree) -> int:
    """Bytes of a model's weights."""
    return int(tree_reduce(lambda n, x: n + x.nbytes, model.parameters(), 0))


def saving(model: Model, report: Report) -> float:
    """The share of the memory that the compressed windows of a report save: of the weights and of the caches of all clients.

    Each client holds `CLIENT_TOKENS` tokens, or as many as the model was trained for. The other layers are as the report says.
    """
    n = min(CLIENT_TOKENS, known_context(model) or CLIENT_TOKENS)
    plain = sum(layer.stock_nbytes_at(n) if _is_window(layer) else _nbytes_at(layer, n) for layer in report.layers)
    packed = sum(_nbytes_at(layer, n) for layer in report.layers)
    clients = report.policy.clients
    return clients * (plain - packed) / max(1, weight_bytes(model) + clients * plain)


def without_windows(report: Report, share: float) -> Report:
    """The report of a model whose windows stay, as compressed ones would save no more than this share."""
    clients = "one client" if report.policy.clients == 1 else f"{report.policy.clients} clients"
    reason = f"a sliding window is small already: windows=True would save {share:.0%} of the memory of {clients}"
    layers = (replace(x, recipe=None, reason=reason) if _is_window(x) else x for x in report.layers)
    return Report(report.policy, tuple(layers))


def _is_window(layer: Layer) -> bool:
    return layer.window is not None and layer.recipe is not None


def _nbytes_at(layer: Layer, n_tokens: int) -> int:
    return layer.stock_nbytes_at(n_tokens) if layer.recipe is None else layer.nbytes_at(n_tokens)
