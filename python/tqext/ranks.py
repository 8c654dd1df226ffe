"""The processes that hold parts of one model, and have to do the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


class Ranks:
    """The processes of a model. Each of them has to make the same calls in the same order: all wait for each other.

    Attributes:
        group: Of all of them, None if the model is whole.
        split: Whether they have parts of the same layers (tensor parallelism), not other layers (a pipeline).
        n: How many.
        rank: Which of them this process is.
    """

    def __init__(self, model: Any) -> None:
        self.group: mx.distributed.Group | None = None
        self.split = False
        if getattr(getattr(model, "model", model), "pipeline_size", 1) > 1:
            self.group = mx.distributed.init()
        else:
            found = (x for _, m in model.named_modules() for x in vars(m).values() if isinstance(x, mx.distributed.Group))
            self.group = next((group for group in found if group.size() > 1), None)
            self.split = self.group is not None
        self.n = 1 if self.group is None else int(self.group.size())
        self.rank = 0 if self.group is None else int(self.group.rank())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def place(self) -> list[Any] | None:
        """What part of the model this process has, None if it has all."""
        return None if self.group is None else ["tensor" if self.split else "pipeline", self.rank, self.n]

    def all(self, flag: bool) -> bool:
        """Whether it holds on every rank: all of them run the model, or none."""
        return self.sums([int(flag)])[0] == self.n

    def sums(self, numbers: Any) -> list[int]:
        """The sums over all ranks of as many integers of each; they have to fit int32."""
        if self.group is None:
            return [int(n) for n in numbers]
        found: Any = mx.distributed.all_sum(mx.array(numbers, mx.int32), group=self.group).tolist()
        return list(found)

    def least(self, n: int) -> int:
        """The smallest of the ranks' numbers, which fit int32."""
        if self.group is None:
            return n
        found: Any = mx.distributed.all_min(mx.array(n, mx.int32), group=self.group).item()
        return int(found)

    def agree(self, numbers: Sequence[int]) -> bool:
        """Whether all ranks have the same numbers, which fit int32."""
        if self.group is None:
            return True
        own = mx.array(list(numbers), mx.int32)
        both = mx.distributed.all_max(mx.concatenate([own, -own]), group=self.group)
        largest, least = mx.split(both, 2)
        return bool(mx.array_equal(largest, -least).item())

    def largest(self, x: mx.array) -> mx.array:
        """Element by element."""
        return x if self.group is None else mx.distributed.all_max(x, group=self.group)
