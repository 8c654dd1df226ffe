"""No generation waits for a compiler: its pipelines are asked for when the model's first cache is made."""

import ctypes
import json

import metal_ops
import mlx.core as mx
import pytest

import tqext
import tqext.mlx_lm
from covering import FULL
from tiny import greedy, make_llama, prompt
from tqext.kv import codec, latent
from tqext.mlx_lm import first_use
from zoo import LATENT, make

N_CORES = 16


def keys(dispatches):
    """What makes a pipeline: the kernel and its constants."""
    return {(d["kernel"], tuple(sorted(d.get("constants", {}).items()))) for d in dispatches}


def prepared_for(
    *, n_q_heads, n_kv_heads, head_dim, value_dim, query_dtype, token_dtype, key_bits, value_bits, value_coding, rotation,
    means, balance, qjl, sinks, window, latent,
):  # fmt: skip
    """What `prepare_pipelines` compiles on Metal, by the same plan."""
    assert rotation == "hadamard"
    lloyd = metal_ops.ENUM["kValueLloyd" if value_coding == "lloyd" else "kValueGroups"]
    shape = metal_ops.AttentionShape(
        type=metal_ops.TYPES.index(query_dtype), batch=1, n_q_heads=n_q_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        value_dim=value_dim, key_bits=key_bits, value_bits=value_bits, value_coding=lloyd, hadamard=1, has_balance=balance,
        has_residual=qjl, has_sinks=sinks, latent=latent, n_cores=N_CORES, scale=1.0,
    )  # fmt: skip
    token_type = metal_ops.TYPES.index(token_dtype)
    text = metal_ops.plans().tq_pipelines_of_a_layer(ctypes.byref(shape), means, token_type, window)
    return keys(json.loads(text))


@pytest.fixture
def used(monkeypatch):
    """The pipelines that caches launch on Metal: their calls are noted, and computed on the CPU."""
    found, lib = set(), metal_ops.plans()

    class Noted:
        def __init__(self, **packed):
            self.packed, self.native = packed, history(**packed)

        def attend(self, q, tail_keys, tail_values, scale, mask, sinks, lengths, left_padding=None, lse=False):
            p, n_coded = self.packed, self.packed["key_codes"].shape[2]
            lloyd = metal_ops.ENUM["kValueLloyd" if p["value_coding"] == "lloyd" else "kValueGroups"]
            assert lengths is None
            is_latent = p.get("latent", False)
            array_kind = "kMaskFloat" if is_latent else "kMaskBool"
            if is_latent and not metal_ops.has_latent_kernel(q):
                noted_decoding(q.dtype if q.dtype == mx.float16 else mx.float32, q.shape[3], p["key_bits"])
                return self.native.attend(q, tail_keys, tail_values, scale, mask, sinks, lengths, left_padding)
            is_array = isinstance(mask, mx.array)
            shape = metal_ops.AttentionShape(
                type=metal_ops.TYPES.index(q.dtype), batch=q.shape[0], n_q_heads=q.shape[1], n_kv_heads=tail_keys.shape[1],
                n_queries=q.shape[2], head_dim=q.shape[3], value_dim=tail_values.shape[3],
                n_first=0 if p["first"] is None else p["first"][0].shape[2], n_coded=n_coded, n_tail=tail_keys.shape[2],
                key_bits=p["key_bits"], value_bits=p["value_bits"], value_coding=lloyd, hadamard=p["rotation"] == "hadamard",
                causal=not is_array and mask == "causal" and q.shape[2] > 1, has_left_padding=left_padding is not None,
                latent=is_latent,
                mask_kind=metal_ops.ENUM[array_kind] if is_array else 0, has_balance=p["balance"] is not None,
                means_kind=metal_ops.ENUM["kMeansHalf"] if p["means"] is not None and n_coded else 0,
                has_residual=p["signs"] is not None, has_sinks=sinks is not None, n_cores=N_CORES, scale=scale,
            )  # fmt: skip
            found.update(keys(metal_ops.plan_attention(lib, shape)[0]["dispatches"]))
            return self.native.attend(q, tail_keys, tail_values, scale, mask, sinks, lengths, left_padding)

    def noted_decoding(dtype, dim, bits):
        shape = metal_ops.EncodeShape(
            type=metal_ops.TYPES.index(dtype), batch=1, n_heads=1, n_tokens=1, head_dim=dim, bits=bits
        )
        found.update(keys([metal_ops.plan_encode(lib, "dequantize_levels", shape)[0]]))

    def decode(packed, *, dtype):
        noted_decoding(dtype, packed.head_dim, packed.bits)
        return tqext.dequantize(packed, dtype=dtype)

    def noted(op, function):
        def run(x, bits, *rest):
            if x.shape[2]:
                kind = "quantize_keys" if op is None else "quantize_values_" + rest[0]
                shape = metal_ops.EncodeShape(
                    type=metal_ops.TYPES.index(x.dtype), batch=1, n_heads=1, n_tokens=1, head_dim=x.shape[3], bits=bits
                )
                found.update(keys([metal_ops.plan_encode(lib, kind, shape)[0]]))
            return function(x, bits, *rest)

        return run

    history = codec.ExtHistory
    monkeypatch.setattr(codec, "ExtHistory", Noted)
    monkeypatch.setattr(codec, "quantize_keys", noted(None, codec.quantize_keys))
    monkeypatch.setattr(codec, "quantize_blocks", noted(None, codec.quantize_blocks))
    monkeypatch.setattr(codec, "quantize_values", noted("values", codec.quantize_values))
    monkeypatch.setattr(latent, "quantize_keys", noted(None, latent.quantize_keys))
    monkeypatch.setattr(latent, "quantize_blocks", noted(None, latent.quantize_blocks))
    monkeypatch.setattr(latent, "dequantize", decode)
    return found


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"balance": False}, {"value_coding": "lloyd", "value_bits": 3}, {"key_bits": 4, "means": False}, {"qjl": True}],
)
def test_a_generation_launches_what_its_first_cache_prepared(monkeypatch, used, options, dtype):
    """A prompt, steps over the end of blocks, a long and a short follow-up, one of a draft's length."""
    model = make_llama(num_hidden_layers=2)
    model.set_dtype(dtype)
    asked = []
    monkeypatch.setattr(first_use, "prepare_pipelines", lambda **shapes: asked.append(shapes) or 1)
    tqext.attach(model, "tq3", guard=False, **options)
    cache = model.make_cache()
    assert len(asked) == 1, "layers of the same shapes share their pipelines"
    prepared = prepared_for(**asked[0])
    used.clear()  # the calibration's

    first = prompt(300)
    greedy(model, first[:7], 3, cache)
    greedy(model, first, 130, cache, prefill_step_size=200)
    for n in (2, 40, 65, 170):
        greedy(model, prompt(n, seed=n), 2, cache)
    for _ in range(70):  # a block is encoded within some of these
        model(mx.array([first[:3]]), cache=cache)
    model.make_cache()

    assert len(asked) == 1 and cache[0].n_coded > 400
    kinds = {name.split("_float")[0].split("_bfloat")[0] for name, _ in used}
    assert {"turboquant_attention_split", "turboquant_attention_combine", "quantize_keys"} <= kinds and len(kinds) >= 5
    assert used <= prepared
    # What another balance or type would have needed is not what is used.
    other = asked[0] | {"balance": not asked[0]["balance"]}
    assert not used <= prepared_for(**other)


def test_a_window_launches_what_its_first_cache_prepared(monkeypatch, used):
    asked = []
    monkeypatch.setattr(first_use, "prepare_pipelines", lambda **shapes: asked.append(shapes) or 1)
    model = make("gemma3_text", {"sliding_window": 200})
    model = tqext.attach(model, "tq3", guard=False, windows=True, balance=False)
    cache = model.make_cache()
    assert [shapes["window"] for shapes in asked] == [True, False]
    prepared = set().union(*(prepared_for(**shapes) for shapes in asked))
    used.clear()
    tokens = [1 + t % 120 for t in prompt(300)]
    greedy(model, tokens, 80, cache, prefill_step_size=150)
    for n in (2, 40, 65, 170):
        greedy(model, tokens[:n], 2, cache)
    assert cache[0].n_dropped > 0
    assert used <= prepared
    assert not used <= prepared_for(**asked[1]), "full windows launch others"


@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize("kind", list(LATENT) if FULL else ["deepseek_v32", "mistral4"])
def test_latents_launch_what_their_first_cache_prepared(monkeypatch, used, kind, means):
    """A prompt in pieces and in the absorbed form, single tokens, a draft, follow-ups of 9 to 64 tokens and of more."""
    asked = []
    monkeypatch.setattr(first_use, "prepare_pipelines", lambda **shapes: asked.append(shapes) or 1)
    model = make(kind, {**LATENT[kind][1], "kv_lora_rank": 256, "first_k_dense_replace": 4, "index_topk": 340})
    tqext.attach(model, "tq3", guard=False, means=means, tail=20)
    cache = model.make_cache()
    assert len(asked) == 1 and asked[0]["latent"] and asked[0]["head_dim"] == asked[0]["value_dim"] == 256
    prepared = prepared_for(**asked[0])
    used.clear()
    tokens = [1 + t % 120 for t in prompt(300)]
    greedy(model, tokens[:7], 3, cache)
    greedy(model, tokens, 3, cache, prefill_step_size=150)
    for n in (2, 9, 40, 64, 90):
        greedy(model, tokens[:n], 2, cache)
    kinds = {name.split("_float")[0] for name, _ in used}
    assert kinds == {"latent_attention", "latent_attention_combine", "quantize_keys", "dequantize_levels"}
    assert len({constants for name, constants in used if name.startswith("latent")}) == 1 + means
    assert used <= prepared
    assert not used <= prepared_for(**(asked[0] | {"key_bits": 4}))


def test_nothing_is_prepared_on_the_cpu():
    model = tqext.attach(make_llama(), "tq3", guard=False, balance=False)
    report = tqext.mlx_lm.report(model)
    assert report.compressed and all(x.queries == ((4, "float32", False),) for x in report.compressed)
    with mx.stream(mx.cpu):
        assert first_use.prepare(report) == 0


def test_make_prompt_cache_prepares(monkeypatch):
    asked = []
    monkeypatch.setattr(first_use, "prepare_pipelines", lambda **shapes: asked.append(shapes) or 1)
    tqext.make_prompt_cache(make_llama(), "tq3", guard=False, balance=False)
    assert len(asked) == 1


def test_sinks_and_heads_are_what_the_model_attends_with(monkeypatch):
    """gpt-oss attends with sinks; its sliding layers are not compressed."""
    asked = []
    monkeypatch.setattr(first_use, "prepare_pipelines", lambda **shapes: asked.append(shapes) or 1)
    tqext.make_prompt_cache(make("gpt_oss", {}), "tq3", guard=False, balance=False)
    assert asked and all(x["sinks"] for x in asked)
