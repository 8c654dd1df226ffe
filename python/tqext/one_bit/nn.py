"""Layers with 1-bit weights (Q1_0: sign bits) and ternary ones (codes of two bits), and the ways to get them.

Both have one float16 scale per 128 weights.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import distributed
from mlx.utils import tree_flatten, tree_unflatten

from tqext._ext import format as _format
from tqext._ext import q1_dequantize, q1_matmul, q1_quantize, ternary_matmul

GROUP_SIZE = _format.Q1_GROUP
# float16 keeps 11 bits: a scale that needs more, or is out of its range, is not one of this format.
_SCALE_TOLERANCE = 2.0**-11
# What MLX's shard_linear cuts.
_AFFINE_PARAMETERS = ("weight", "scales", "biases", "bias")
# mlx-lm's layers whose weights have a rotation of their inputs folded in; the module is there when such a model is.
_FOLDED_MODULE = "mlx_lm.models.prism_hadamard_qwen35"


class _Q1Module(nn.Module):
    """Sign bits and scales, with the attributes by which mlx-lm counts quantised parameters.

    There is no ``to_quantized``: ``mlx.nn.quantize`` leaves these layers alone.
    """

    def __init__(self, weight: mx.array, scales: mx.array) -> None:
        super().__init__()
        self.group_size = GROUP_SIZE
        self.bits = 1
        # MLX's code for its own quantised layers does not know the mode, and says so instead of computing nonsense.
        self.mode = "q1_0"
        self.weight = weight
        self.scales = scales

    def _extra_repr(self) -> str:
        rows, words = self.weight.shape
        return f"input_dims={words * 32}, output_dims={rows}, bias={'bias' in self}, bits=1, group_size={GROUP_SIZE}"


class Q1Linear(_Q1Module):
    """Linear layer with 1-bit weights: ``y = x @ W.T + bias``, with ``W`` never decoded.

    Args:
        weight: uint32 ``[output_dims, input_dims / 32]``, bit 1 for ``+scale``, low bit first.
        scales: float16 ``[output_dims, input_dims / 128]``.
        bias: ``[output_dims]`` or None.
    """

    def __init__(self, weight: mx.array, scales: mx.array, bias: mx.array | None = None) -> None:
        super().__init__(weight, scales)
        if bias is not None:
            self.bias = bias
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        y = q1_matmul(x, self["weight"], self["scales"])
        return y + self["bias"] if "bias" in self else y

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Q1Linear:
        """Round-to-nearest 1-bit weights; good results need weights that were trained for it.

        Raises:
            ValueError: input_dims is not a multiple of 128.
        """
        weight, scales = q1_quantize(linear.weight)
        return cls(weight, scales, linear.get("bias"))


class Q1Embedding(_Q1Module):
    """Embedding with 1-bit weights.

    Args:
        weight: uint32 ``[num_embeddings, dims / 32]``.
        scales: float16 ``[num_embeddings, dims / 128]``.
        dtype: Of the vectors that come out.
    """

    def __init__(self, weight: mx.array, scales: mx.array, dtype: mx.Dtype = mx.float16) -> None:
        super().__init__(weight, scales)
        self.dtype = dtype
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return q1_dequantize(self["weight"][x], self["scales"][x], dtype=self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """``x`` times the transposed embedding: the logits of a model with tied embeddings."""
        return q1_matmul(x, self["weight"], self["scales"])

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Q1Embedding:
        """Round-to-nearest 1-bit weights.

        Raises:
            ValueError: dims is not a multiple of 128.
        """
        weight, scales = q1_quantize(embedding.weight)
        return cls(weight, scales, embedding.weight.dtype)


class _TernaryModule(nn.Module):
    """Codes of two bits and scales, with the rotation that is folded into them, if there is one."""

    def __init__(self, weight: mx.array, scales: mx.array, block: int = 0, signs: mx.array | None = None) -> None:
        super().__init__()
        self.group_size = GROUP_SIZE
        self.bits = 2
        self.mode = "ternary"  # as that of Q1 layers: unknown to MLX
        self.block = block
        self.weight = weight
        self.scales = scales
        if block:
            self.signs = signs if signs is not None else mx.ones(self._columns(), mx.float32)

    def _columns(self) -> int:
        return int(self["weight"].shape[1]) * 16

    def _product(self, x: mx.array) -> mx.array:
        if self.block:
            x = _rotated(x.astype(mx.float32) * self["signs"], self.block).astype(x.dtype)
        return ternary_matmul(x, self["weight"], self._half_scales())

    def _half_scales(self) -> mx.array:
        """``set_dtype`` of a model makes other types of them."""
        scales = self["scales"]
        return scales if scales.dtype == mx.float16 else scales.astype(mx.float16)

    def _extra_repr(self) -> str:
        fold = f", block={self.block}" if self.block else ""
        return f"input_dims={self._columns()}, output_dims={self.weight.shape[0]}, bias={'bias' in self}, ternary{fold}"


def _rotated(x: mx.array, block: int) -> mx.array:
    """Normalised Walsh-Hadamard matrix times each block of the last axis."""
    return mx.hadamard_transform(x.reshape(-1, block), scale=1 / math.sqrt(block)).reshape(x.shape)


class TernaryLinear(_TernaryModule):
    """Linear layer with ternary weights: ``y = x @ W.T + bias``, with ``W`` never decoded: 2.125 bits per weight.

    Args:
        weight: uint32 ``[output_dims, input_dims / 16]``, codes 0, 1, 2 for ``-scale``, 0, ``+scale``, low bits first.
        scales: float16 ``[output_dims, input_dims / 128]``.
        bias: ``[output_dims]`` or None.
        block: Inputs that are rotated together before the product (a power of two; by the normalised Walsh-Hadamard matrix),
            for weights that have this rotation folded in. 0: none.
        signs: float32 ``[input_dims]`` of -1 and 1, which multiply the inputs before the rotation; None: all 1.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        bias: mx.array | None = None,
        *,
        block: int = 0,
        signs: mx.array | None = None,
    ) -> None:
        super().__init__(weight, scales, block, signs)
        if bias is not None:
            self.bias = bias
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        y = self._product(x)
        return y + self["bias"] if "bias" in self else y


class TernaryEmbedding(_TernaryModule):
    """Embedding with ternary weights.

    Args:
        weight: uint32 ``[num_embeddings, dims / 16]``.
        scales: float16 ``[num_embeddings, dims / 128]``.
        dtype: Of the vectors that come out.
        block: As for `TernaryLinear`; a row is rotated back.
        signs: As for `TernaryLinear`.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        dtype: mx.Dtype = mx.float16,
        *,
        block: int = 0,
        signs: mx.array | None = None,
    ) -> None:
        super().__init__(weight, scales, block, signs)
        self.dtype = dtype
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        scales = self._half_scales()[x]
        if self.dtype != mx.float16:  # which holds the scales; a bf16 row is rounded once, at the end
            scales = scales.astype(mx.float32)
        rows = mx.dequantize(self["weight"][x], scales, -scales, group_size=GROUP_SIZE, bits=2)
        if self.block:
            rows = _rotated(rows.astype(mx.float32), self.block) * self["signs"]
        return rows.astype(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """``x`` times the transposed embedding: the logits of a model with tied embeddings."""
        return self._product(x)


class Q1AllToShardedLinear(Q1Linear):
    """Q1Linear whose output rows are split over a group (see ``mlx.nn.AllToShardedLinear``)."""

    def __init__(self, weight: mx.array, scales: mx.array, bias: mx.array | None, group: mx.distributed.Group) -> None:
        super().__init__(weight, scales, bias)
        self.group = group


class Q1ShardedToAllLinear(Q1Linear):
    """Q1Linear whose input columns are split over a group, with the sum taken over it (``mlx.nn.ShardedToAllLinear``)."""

    def __init__(self, weight: mx.array, scales: mx.array, bias: mx.array | None, group: mx.distributed.Group) -> None:
        super().__init__(weight, scales, bias)
        self.group = group

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(q1_matmul(x, self["weight"], self["scales"]), group=self.group)
        return y + self["bias"] if "bias" in self else y


class TernaryAllToShardedLinear(TernaryLinear):
    """TernaryLinear whose output rows are split over a group (see ``mlx.nn.AllToShardedLinear``)."""

    def __init__(self, weight: mx.array, scales: mx.array, bias: mx.array | None, group: mx.distributed.Group) -> None:
        super().__init__(weight, scales, bias)
        self.group = group


class TernaryShardedToAllLinear(TernaryLinear):
    """TernaryLinear whose input columns are split over a group, with the sum over it (``mlx.nn.ShardedToAllLinear``)."""

    def __init__(self, weight: mx.array, scales: mx.array, bias: mx.array | None, group: mx.distributed.Group) -> None:
        super().__init__(weight, scales, bias)
        self.group = group

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(self._product(x), group=self.group)
        return y + self["bias"] if "bias" in self else y


def _support_shard_linear() -> None:
    """Let ``mlx.nn``'s shard_linear, which knows Linear and takes the rest for affine, split the layers here too.

    Models hold shard_linear by name, so the two constructors that it looks up when it is called are the place to hook in.
    """

    def extend(affine: Any, one_bit: Any, ternary: Any, columns: bool) -> None:
        previous = affine.from_quantized_linear

        def from_quantized_linear(
            layer: nn.Module, *, segments: int | list[int] = 1, group: mx.distributed.Group | None = None
        ) -> nn.Module:
            if not isinstance(layer, (Q1Linear, TernaryLinear)):
                if unknown := sorted(set(layer.parameters()) - set(_AFFINE_PARAMETERS)):
                    # MLX would drop it without a word; mlx-lm's Hadamard-folded layers rotate their inputs by it.
                    raise ValueError(
                        f"[shard_linear] module: expected a layer of {', '.join(_AFFINE_PARAMETERS)}, got a "
                        f"{type(layer).__name__} with {unknown[0]}: split the model's layers (a pipeline) and not its heads"
                    )
                return previous(layer, segments=segments, group=group)
            if isinstance(layer, TernaryLinear) and layer.block:
                raise ValueError(
                    f"[shard_linear] layer: expected weights without a rotation of their inputs, got blocks of {layer.block}, "
                    "which may not be cut"
                )
            group = group or mx.distributed.init()
            ours = one_bit if isinstance(layer, Q1Linear) else ternary
            return ours(**_shard_parameters(layer, columns, segments, group), group=group)

        affine.from_quantized_linear = staticmethod(from_quantized_linear)

    extend(distributed.QuantizedAllToShardedLinear, Q1AllToShardedLinear, TernaryAllToShardedLinear, columns=False)
    extend(distributed.QuantizedShardedToAllLinear, Q1ShardedToAllLinear, TernaryShardedToAllLinear, columns=True)


def _shard_parameters(
    layer: Q1Linear | TernaryLinear, columns: bool, segments: int | list[int], group: mx.distributed.Group
) -> dict[str, mx.array | None]:
    size, rank = group.size(), group.rank()
    n = layer.scales.shape[1] if columns else layer.scales.shape[0]
    unit = f"input groups of {GROUP_SIZE}" if columns else "output rows"
    if n % size:
        raise ValueError(f"[shard_linear] group: expected a size that divides {n} {unit}, got {size}")

    # In units, so that weight and scales are cut at the same groups; lists hold fractions, as MLX has them.
    inner = [n * i // segments for i in range(1, segments)] if isinstance(segments, int) else [int(at * n) for at in segments]
    lengths = [end - begin for begin, end in pairwise([0, *inner, n])]
    if any(length % size for length in lengths) or (isinstance(segments, int) and n % segments):
        raise ValueError(f"[shard_linear] segments: expected parts of {n} {unit} that divide by {size}, got {segments}")

    def part(x: mx.array, axis: int) -> mx.array:
        scale = x.shape[axis] // n
        pieces = mx.split(x, [scale * at for at in inner], axis=axis)
        return mx.contiguous(mx.concatenate([mx.split(piece, size, axis=axis)[rank] for piece in pieces], axis=axis))

    axis = 1 if columns else 0
    bias = layer.get("bias")
    if bias is not None and not columns:
        bias = part(bias, 0)
    return {"weight": part(layer.weight, axis), "scales": part(layer.scales, axis), "bias": bias}


_support_shard_linear()


# Conversion


@dataclass
class Swap:
    """What a conversion did.

    Attributes:
        swapped: Paths of the layers that are 1-bit now.
        kept: Paths of the candidates that were left as they were, with the reason.
        ternary: Paths of the layers that are ternary now.
    """

    swapped: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    ternary: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{len(self.swapped)} layers with 1-bit weights"
        if self.ternary:
            text += f", {len(self.ternary)} with ternary ones"
        if self.kept:
            path, reason = next(iter(self.kept.items()))
            text += f", {len(self.kept)} left as they were ({path}: {reason})"
        return text


_AFFINE_LINEAR = (nn.QuantizedLinear, distributed.QuantizedAllToShardedLinear, distributed.QuantizedShardedToAllLinear)


def from_quantized(model: nn.Module, *, strict: bool = True) -> Swap:
    """Replace MLX's affine 1-bit layers by Q1 layers, and 2-bit ones with ternary weights by ternary layers, in place.

    An affine weight is ``scale * code + bias``. With one bit it is ``+-scale / 2`` where the bias is ``-scale / 2``, which is
    checked: 1.125 instead of 1.25 bits per weight. With two bits it is ternary where the bias is ``-scale``: 2.125 instead of
    2.25 bits (2.5 with float32 scales); layers with other biases, or scales that float16 does not hold, stay. mlx-lm's folded
    layers ('Bonsai 2') keep their rotation. Works before and after ``model.shard``, with two bits before it.

    Args:
        model: Any module; layers that are not affine with groups of 128 stay.
        strict: Raise where biases of one bit are not ``-scales / 2``, else leave the layer.

    Returns:
        What was replaced and what was not.

    Raises:
        ValueError: see `strict`.
    """
    swap = Swap()
    replaced: list[tuple[str, nn.Module]] = []
    for path, layer in _leaves(model):
        if ternary := _ternary_layer(layer):
            replaced.append((path, ternary))
            swap.ternary.append(path)
            continue
        affine = isinstance(layer, (*_AFFINE_LINEAR, nn.QuantizedEmbedding))
        if not affine or layer.bits != 1 or getattr(layer, "mode", "affine") != "affine":
            continue
        problem = _why_not_q1(layer)
        if problem and strict:
            raise ValueError(f"[from_quantized] {path}.{problem}")
        if problem:
            swap.kept[path] = problem
            continue
        scales = _halved(layer.scales)
        mx.eval(scales)
        replaced.append((path, _q1_layer(layer, scales)))
        swap.swapped.append(path)
    _replace(model, replaced)
    return swap


def quantize(model: nn.Module) -> Swap:
    """Replace every Linear and Embedding by a Q1 layer, in place, by rounding to the nearest 1-bit weights.

    Layers whose input is not a multiple of 128 wide are kept. A model that was not trained for 1-bit weights answers
    nonsense afterwards; this is for tests, for timing, and for weights that are 1-bit already.
    """
    swap = Swap()
    replaced: list[tuple[str, nn.Module]] = []
    for path, layer in _leaves(model):
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            continue
        if layer.weight.shape[1] % GROUP_SIZE:
            swap.kept[path] = f"weight: expected a multiple of {GROUP_SIZE} columns, got {layer.weight.shape[1]}"
            continue
        ours = Q1Linear.from_linear(layer) if isinstance(layer, nn.Linear) else Q1Embedding.from_embedding(layer)
        replaced.append((path, ours))
        mx.eval(replaced[-1][1].parameters())
        swap.swapped.append(path)
    _replace(model, replaced)
    return swap


def insert_empty(model: nn.Module, paths: set[str], dtype: mx.Dtype = mx.float16) -> None:
    """Put Q1 layers without contents in the place of Linear and Embedding layers, for ``load_weights`` to fill.

    Raises:
        ValueError: A path that is neither, or whose width is not a multiple of 128.
    """
    leaves = dict(_leaves(model))
    replaced: list[tuple[str, nn.Module]] = []
    for path in sorted(paths):
        layer = leaves.get(path)
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            raise ValueError(f"[load] {path}: expected a linear or embedding layer of the model, got {type(layer).__name__}")
        rows, columns = layer.weight.shape
        if columns % GROUP_SIZE:
            raise ValueError(f"[load] {path}: expected a multiple of {GROUP_SIZE} columns, got {columns}")
        weight = mx.zeros((rows, columns // 32), mx.uint32)
        scales = mx.zeros((rows, columns // GROUP_SIZE), mx.float16)
        if isinstance(layer, nn.Linear):
            replaced.append((path, Q1Linear(weight, scales, layer.get("bias"))))
        else:
            replaced.append((path, Q1Embedding(weight, scales, dtype)))
    _replace(model, replaced)


def q1_paths(model: nn.Module) -> list[str]:
    """Paths of the Q1 layers of a model."""
    return [path for path, layer in _leaves(model) if isinstance(layer, _Q1Module)]


def ternary_paths(model: nn.Module) -> list[str]:
    """Paths of the ternary layers of a model."""
    return [path for path, layer in _leaves(model) if isinstance(layer, _TernaryModule)]


def _leaves(model: nn.Module) -> list[tuple[str, Any]]:
    return tree_flatten(model.leaf_modules(), is_leaf=lambda m: isinstance(m, nn.Module))  # type: ignore[return-value]


def _replace(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> None:
    if layers:
        model.update_modules(tree_unflatten(layers))


def _halved(scales: mx.array) -> mx.array:
    return (scales.astype(mx.float32) / 2).astype(mx.float16)


def _why_not_q1(layer: Any) -> str | None:
    """The part of an affine 1-bit layer that keeps it from being a Q1 layer, None if nothing does."""
    if layer.group_size != GROUP_SIZE:
        return f"group_size: expected {GROUP_SIZE}, got {layer.group_size}"
    if layer.get("biases") is None:
        return "biases: expected -scales / 2, got none"
    scales = layer.scales.astype(mx.float32)
    biases = layer.biases.astype(mx.float32)
    # As a negated <=, so that NaN counts as a difference.
    wrong = mx.logical_not(mx.abs(biases + scales / 2) <= _SCALE_TOLERANCE / 2 * mx.abs(scales)).sum().item()
    if wrong:
        return f"biases: expected -scales / 2, got others in {wrong} of {scales.size} groups"
    lost = mx.abs(_halved(layer.scales).astype(mx.float32) - scales / 2) > _SCALE_TOLERANCE * mx.abs(scales / 2)
    if n := lost.sum().item():
        return f"scales: expected halves that float16 holds, got others in {n} of {scales.size} groups"
    return None


def _ternary_layer(layer: Any) -> nn.Module | None:
    """The ternary layer that computes what an affine 2-bit layer does, None if there is none."""
    folded: Any = sys.modules.get(_FOLDED_MODULE)
    is_folded = folded is not None and isinstance(layer, folded.HadamardQuantizedLinear)  # the embedding is one too
    if not is_folded and type(layer) not in (nn.QuantizedLinear, nn.QuantizedEmbedding):
        return None
    if (layer.bits, layer.group_size, getattr(layer, "mode", "affine")) != (2, GROUP_SIZE, "affine"):
        return None
    if layer.get("biases") is None:
        return None
    given = layer.scales.astype(mx.float32)
    scales = layer.scales.astype(mx.float16)
    same = mx.all(scales.astype(mx.float32) == given) & mx.all(layer.biases.astype(mx.float32) == -given)
    if not same.item():
        return None
    mx.eval(scales)
    block = layer.block if is_folded else 0
    signs = layer.signs if block else None
    if isinstance(layer, folded.HadamardQuantizedEmbedding if is_folded else nn.QuantizedEmbedding):
        return TernaryEmbedding(layer.weight, scales, layer.scales.dtype, block=block, signs=signs)
    return TernaryLinear(layer.weight, scales, layer.get("bias"), block=block, signs=signs)


def _q1_layer(layer: Any, scales: mx.array) -> nn.Module:
    if isinstance(layer, nn.QuantizedEmbedding):
        return Q1Embedding(layer.weight, scales, layer.scales.dtype)
    bias = layer.get("bias")
    if isinstance(layer, distributed.QuantizedAllToShardedLinear):
        return Q1AllToShardedLinear(layer.weight, scales, bias, layer.group)
    if isinstance(layer, distributed.QuantizedShardedToAllLinear):
        return Q1ShardedToAllLinear(layer.weight, scales, bias, layer.group)
    return Q1Linear(layer.weight, scales, bias)
