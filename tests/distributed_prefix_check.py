"""What distributed_check.py asks of two ranks that share a prefix store, each with its part of the model."""

import copy

import mlx.core as mx
import mlx_lm.models.cache as stock
import pytest

import tqext
from tiny import prompt
from tqext.mlx_lm.prefix_store import _chain, _Kinds
from tqext.ranks import Ranks

TOKENS, MORE = prompt(600), prompt(20, seed=9)


def wait():
    mx.eval(mx.distributed.all_sum(mx.array(1)))


def computed(model):
    cache = stock.make_prompt_cache(model)
    for begin in range(0, len(TOKENS), 300):
        model(mx.array([TOKENS[begin : begin + 300]]), cache=cache)
        mx.eval([c.state for c in cache])
    return cache


def keys_of(store, model, ranks):
    """The keys of this rank's parts of the tokens."""
    kinds = _Kinds("test", stock.make_prompt_cache(model))
    begins = kinds.begins(len(TOKENS) - 1)
    return begins, _chain(kinds.space(store._known(model)[0], ranks.place), TOKENS, begins)


def goes_on(model, store, kept, n_expected):
    """All ranks have so many tokens, and go on as the kept cache would after it was trimmed."""
    got, n = store.fetch(model, TOKENS + MORE)
    assert n == n_expected, (n, n_expected)
    expected = copy.deepcopy(kept)
    for c in expected:
        c.trim(len(TOKENS) - n)
    rest = mx.array([(TOKENS + MORE)[n:]])
    assert mx.array_equal(model(rest, cache=got), model(rest, cache=expected)), n


def check(model, name, folder, n_whole, *, more):
    """An attached model in two parts; ``n_whole``: tokens in blocks that both have; ``more``: also damage and refusals."""
    ranks = Ranks(model)
    rank = ranks.rank
    assert ranks.place == [name, rank, 2]
    with tqext.PrefixStore(folder) as store:
        assert store.fetch(model, TOKENS) == (None, 0)
        wait()
        kept = computed(model)
        assert store.save(model, TOKENS, kept) == len(TOKENS)
        store.flush()
        wait()
        goes_on(model, store, kept, len(TOKENS))
        begins, keys = keys_of(store, model, ranks)
        kinds = _Kinds("test", stock.make_prompt_cache(model))
        assert len({kinds.space("of both", place) for place in (None, [name, 0, 2], [name, 1, 2], [name, 1, 4])}) == 4

        # The end is damaged on one rank, and the blocks are left.
        if rank == 0:
            ((end, _, _),) = store._entries.ends(keys)
            path = store._entries._path(end)
            path.write_bytes(path.read_bytes()[:-1])
        wait()
        goes_on(model, store, kept, n_whole)

        # A block is missing on one rank, and another is damaged on the other.
        if rank == 1:
            store._entries._drop([keys[begins.index(448)]])
        wait()
        goes_on(model, store, kept, 448)
        if not more:
            wait()
            return
        if rank == 0:
            path = store._entries._path(keys[begins.index(192)])
            path.write_bytes(path.read_bytes()[:-1])
        wait()
        goes_on(model, store, kept, 192)
        assert store.fetch(model, TOKENS, beyond=192) == (None, 0)
        hits = store.stats()["hits"]

        # Ranks that do not do the same say so, all of them.
        with pytest.raises(ValueError, match=r"^\[PrefixStore.fetch\] tokens: expected the same on all ranks, got others"):
            store.fetch(model, TOKENS if rank else TOKENS[:-1])
        like = [stock.QuantizedKVCache() for _ in range(3)] if rank else None
        message = "compressed caches or mlx-lm's, got Quantized" if rank else "that can be stored on all ranks, got another"
        with pytest.raises(ValueError, match=rf"^\[PrefixStore.fetch\] cache: expected .*{message}"):
            store.fetch(model, TOKENS, like=like)

        # Nothing on one rank is nothing on all of them.
        if rank == 1:
            store._entries._drop(keys[:1])
        wait()
        assert store.fetch(model, TOKENS) == (None, 0)
        assert store.stats()["hits"] == hits
        wait()
