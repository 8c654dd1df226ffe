"""What tqext asks of objects of other packages: models, caches, tokenizers. For the type checker.

mlx-lm's loaders return ``mlx.nn.Module``, which mypy takes for a `Model` and other type checkers do not: what users call takes
`tqext.mlx_lm.packages.AnyModel`. Lists of caches that users get are ``list[Any]``, as mlx-lm's are: users know their classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

if TYPE_CHECKING:  # commands import this module also where MLX cannot be loaded, and say so
    import mlx.core as mx

    from tqext.kv.prefix import Prefix
    from tqext.presets import Recipe


class Cache(Protocol):
    """The cache of one layer, whatever its class: mlx-lm's, mlx-vlm's or tqext's."""

    @property
    def state(self) -> Any:
        """Its arrays, nested as the class likes: what has to be evaluated after a step."""

    def is_trimmable(self) -> bool:
        """Whether its last tokens can be taken back."""


class SizedCache(Cache, Protocol):
    """One that says what it takes, as all do that hold tokens."""

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""


class CompressedCache(SizedCache, Protocol):
    """A cache of tqext's, of one sequence or of a batch, as reports see it."""

    recipe: Recipe
    max_size: int | None

    @property
    def n_coded(self) -> int:
        """Coded tokens."""

    @property
    def n_exact(self) -> int:
        """Tokens as the model made them."""

    @property
    def used_nbytes(self) -> int:
        """Bytes of the tokens that it holds."""

    @property
    def prefixes(self) -> Sequence[Prefix | None]:
        """What each of its sequences shares with others, None for nothing."""

    @property
    def fp16_nbytes(self) -> int:
        """What the same tokens take in fp16."""

    def size(self) -> int:
        """Tokens of the longest sequence."""


class CompressedSequence(CompressedCache, Protocol):
    """One of a single sequence."""

    n_first: int
    n_tail: int

    @property
    def offset(self) -> int:
        """Tokens of the sequence so far."""


def is_compressed(cache: object) -> TypeGuard[CompressedCache]:
    """Whether a cache is one of tqext's, without an import of their classes."""
    return hasattr(cache, "n_coded")


class CacheGroup(Protocol):
    """A layer's caches in one: ``CacheList`` of mlx-lm and of mlx-vlm."""

    @property
    def caches(self) -> Sequence[Cache]:
        """They, in order."""


class ModuleTree(Protocol):
    """What ``mlx.nn.Module`` has, which is without annotations."""

    def parameters(self) -> Any:
        """Its arrays, nested as its modules are."""

    def modules(self) -> Any:
        """Itself and all modules in it."""

    def named_modules(self) -> Any:
        """The same, with their places."""


class Model(ModuleTree, Protocol):
    """A language model of mlx-lm, or the text model of one of mlx-vlm."""

    @property
    def layers(self) -> Sequence[Any]:
        """What a model without a ``make_cache`` needs a cache for, each of them."""

    def __call__(self, inputs: mx.array, /, *, cache: Sequence[Cache] | None = None) -> Any:
        """Logits ``[B, n_tokens, vocabulary]`` of tokens ``[B, n_tokens]``; mlx-vlm's models return an object with them."""


class Tokenizer(Protocol):
    """A tokenizer of transformers, or mlx-lm's wrapper of one."""

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text."""

    def decode(self, token_ids: Sequence[int], /) -> str:
        """The text of tokens."""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Any:
        """The prompt of messages: text, or tokens."""

    def get_vocab(self) -> Mapping[str, int]:
        """The number of each token."""


class SavedTokenizer(Protocol):
    """What can be written into a checkpoint."""

    def save_pretrained(self, folder: str, /) -> Any:
        """Write its files."""
