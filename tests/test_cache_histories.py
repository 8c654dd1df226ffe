"""One sequence under random operations: its attention, counts and bytes are those of the specification told again."""

import copy
import os
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

import tqext.mlx_lm
from cache_support import RECIPES, D, make, make_reference, step, tokens
from sequence import BLOCK
from tqext import TurboQuantKVCache

# TQEXT_FUZZ=100000 tries as many other histories; without it the same are tried every time.
EXAMPLES = int(os.environ.get("TQEXT_FUZZ", 0))
MOST_COPIES = 3
lengths = st.sampled_from([0, 1, 2, 9, 31, 63, 64, 65, 90, 170, 280])
windows = st.sampled_from([None, None, 30])


def frozen(snapshot):
    """What a snapshot answers, and the answer."""
    q = mx.array(tokens(1, 5)[2])[None]
    return snapshot, q, np.array(snapshot.attend(q, D**-0.5))


class Histories(RuleBasedStateMachine):
    """A cache and its `Sequence`, with copies of both that go their own ways."""

    @initialize(recipe=st.sampled_from(list(RECIPES.values())), bounded=st.booleans(), seed=st.integers(0, 999))
    def begin(self, recipe, bounded, seed):
        max_size = recipe.first + recipe.tail + 2 * BLOCK + 11 if bounded else None
        self.cache, self.reference = make(recipe, max_size), make_reference(recipe, max_size)
        self.others = []
        self.held = []
        self.seed = 1000 * seed

    def next_seed(self):
        self.seed += 1
        return self.seed

    @rule(n=st.integers(1, 70), window=windows)
    def decode(self, n, window):
        for _ in range(n):
            step(self.cache, self.reference, 1, self.next_seed(), window)

    @rule(n=lengths.filter(bool), window=windows)
    def append(self, n, window):
        step(self.cache, self.reference, n, self.next_seed(), window)

    @precondition(lambda self: self.reference.n_tokens)
    @rule()
    def append_nothing(self):
        k, v, _ = tokens(0, 0)
        self.cache.update_and_fetch(mx.array(k)[None], mx.array(v)[None])
        self.reference.flush()

    @rule(n=st.integers(2, 64), data=st.data())
    def draft(self, n, data):
        """Of which the last ones are wrong."""
        step(self.cache, self.reference, n, self.next_seed())
        self.trimmed(data.draw(st.integers(0, n)))

    @precondition(lambda self: self.reference.n_tokens)
    @rule(share=st.floats(0, 1), whole=st.booleans())
    def trim(self, share, whole):
        r = self.reference
        # What was dropped cannot be trimmed into.
        most = r.n_tokens - max(r.n_first, 1) if r.n_dropped else r.n_tokens
        self.trimmed(r.n_tokens + r.n_dropped if whole else int(share * most))

    def trimmed(self, n):
        r = self.reference
        if r.n_dropped and r.n_tokens - max(r.n_first, 1) < n < r.n_tokens + r.n_dropped:
            before = [np.array(x) for x in self.cache.state]
            with pytest.raises(ValueError, match=r"^\[trim\] n: expected at most"):
                self.cache.trim(n)
            self.same_bytes(before)
            return
        assert self.cache.trim(n) == n
        r.trim(n)

    @rule(what=st.sampled_from(["longer", "shorter", "heads", "dimension", "integers", "rank"]), n=st.integers(2, 80))
    def refused(self, what, n):
        """Nothing is changed then."""
        k, v, _ = (mx.array(x)[None] for x in tokens(n, 1))
        wrong = {
            "longer": (k[:, :, 1:], v),
            "shorter": (k, v[:, :, 1:]),
            "heads": (k, v[:, :1]),
            "dimension": (k[..., : D // 2], v) if self.cache.keys is not None else (k, v[:, :, :0]),
            "integers": (k.astype(mx.int32), v),
            "rank": (k[0], v[0]),
        }[what]
        before = [np.array(x) for x in self.cache.state]
        with pytest.raises(ValueError, match=r"^\[update_and_fetch\] "):
            self.cache.update_and_fetch(*wrong)
        self.same_bytes(before)

    def same_bytes(self, before):
        for a, b in zip(self.cache.state, before, strict=True):
            assert np.array_equal(np.array(a), b)

    @precondition(lambda self: len(self.others) < MOST_COPIES)
    @rule()
    def copy(self):
        self.others.append((copy.deepcopy(self.cache), copy.deepcopy(self.reference)))

    @precondition(lambda self: self.others)
    @rule(data=st.data())
    def go_on_with_a_copy(self, data):
        i = data.draw(st.integers(0, len(self.others) - 1))
        here = self.cache, self.reference
        self.cache, self.reference = self.others[i]
        self.others[i] = here

    @rule(how=st.sampled_from(["arrays", "numpy", "file", "batch"]))
    def save_and_load(self, how):
        before = [np.array(x) for x in self.cache.state]
        if how == "arrays":
            self.cache = TurboQuantKVCache.from_state(self.cache.state)
        elif how == "numpy":
            self.cache = TurboQuantKVCache.from_state([mx.array(np.array(x)) for x in self.cache.state])
        elif how == "file":
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "cache.safetensors")
                save_prompt_cache(path, [self.cache])
                (self.cache,) = load_prompt_cache(path)
        elif self.reference.n_tokens:
            self.cache = TurboQuantKVCache.merge([self.cache]).extract(0)
        self.same_bytes(before)

    @precondition(lambda self: self.reference.n_tokens)
    @rule()
    def hold_a_snapshot(self):
        self.held.append(frozen(self.cache.keys_and_values()[0]))
        self.cache.shared = False

    @invariant()
    def counts_are_those_of_the_sequence(self):
        if hasattr(self, "cache"):
            assert [self.cache.n_first, self.cache.n_coded, self.cache.n_tail] == self.reference.counts
            assert self.cache.offset == self.reference.n_tokens + self.reference.n_dropped

    def teardown(self):
        """Nobody changed what the copies and the snapshots hold, and the copies go on."""
        for snapshot, q, answer in getattr(self, "held", ()):
            assert np.array_equal(np.array(snapshot.attend(q, D**-0.5)), answer)
        for cache, reference in getattr(self, "others", ()):
            step(cache, reference, 3, 1)


Histories.TestCase.settings = settings(
    max_examples=EXAMPLES or 40,
    stateful_step_count=14,
    deadline=None,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.fixture(autouse=True, scope="module")
def cache_classes():
    """mlx-lm's load_prompt_cache finds the class."""
    tqext.mlx_lm.install()
    yield
    tqext.mlx_lm.uninstall()


test_cache_histories = Histories.TestCase
