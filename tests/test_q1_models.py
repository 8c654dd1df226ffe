"""Checkpoints with 1-bit weights: MLX's affine form, native scale-only folders, the command line."""

import json
import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn
import mlx_lm.utils
import numpy as np
import pytest

import q1_models
import tqext
from support import assert_close, to_numpy
from tqext import nn, one_bit
from tqext.cache import TurboQuantKVCache
from tqext.commands import cli


@pytest.fixture(autouse=True)
def unhooked():
    before = mlx_lm.utils.load_model
    yield
    tqext.uninstall()
    one_bit.unhook()
    assert mlx_lm.utils.load_model is before


@pytest.fixture
def affine(tmp_path):
    """A stock 1-bit folder, and its logits by mlx-lm alone."""
    settings = q1_models.config()
    model = q1_models.make_affine(q1_models.make_model(settings))
    q1_models.write_affine(tmp_path / "affine", settings, model)
    return tmp_path / "affine", to_numpy(q1_models.logits(model))


@pytest.fixture
def native(affine, tmp_path):
    folder, want = affine
    model, tokenizer, config = tqext.load(str(folder), return_config=True)
    one_bit.save(tmp_path / "native", model, config, tokenizer)
    return tmp_path / "native", want


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensors(folder, change):
    weights = mx.load(str(folder / "model.safetensors"))
    weights = {name: mx.array(np.array(value)) for name, value in weights.items()}
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def test_load_takes_an_affine_checkpoint(affine):
    folder, want = affine
    model, _ = tqext.load(str(folder))
    assert len(nn.q1_paths(model)) == 3 * 7 + 2
    assert_close(q1_models.logits(model), want, 1e-4)


def test_load_keeps_affine_layers_that_are_not_q1(affine, capsys):
    folder, _ = affine

    def spoil(weights):
        weights["lm_head.biases"] = weights["lm_head.biases"] * 1.5

    change_tensors(folder, spoil)
    model, _ = tqext.load(str(folder))
    assert isinstance(model.lm_head, mlx.nn.QuantizedLinear) and isinstance(model.model.embed_tokens, nn.Q1Embedding)
    assert "lm_head: biases: expected -scales / 2" in capsys.readouterr().err


def test_native_checkpoint_round_trip(native):
    folder, want = native
    weights = mx.load(str(folder / "model.safetensors"))
    assert not any(name.endswith("biases") for name in weights)
    model, _ = tqext.load(str(folder))
    assert len(nn.q1_paths(model)) == 3 * 7 + 2
    assert_close(q1_models.logits(model), want, 1e-4)
    assert model.model.embed_tokens.dtype == mx.float32
    for name, value in q1_models.parameters(model):
        np.testing.assert_array_equal(to_numpy(value), to_numpy(weights[name]))


def test_native_checkpoint_with_tied_embeddings(tmp_path):
    settings = q1_models.config("llama", tie_word_embeddings=True)
    model = q1_models.make_model(settings)
    nn.quantize(model)
    one_bit.save(tmp_path / "native", model, settings)
    q1_models.write_tokenizer(tmp_path / "native")
    again, _ = tqext.load(str(tmp_path / "native"))
    assert_close(q1_models.logits(again), to_numpy(q1_models.logits(model)), 1e-6)


def test_native_checkpoint_is_loud_without_tqext(native):
    with pytest.raises(ValueError, match="scales"):
        mlx_lm.utils.load_model.__wrapped__(native[0])


def test_other_models_load_as_before(tmp_path):
    settings = q1_models.config()
    model = q1_models.make_model(settings)
    mlx_lm.utils.save_model(tmp_path / "plain", model)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(settings))
    q1_models.write_tokenizer(tmp_path / "plain")
    again, _ = tqext.load(str(tmp_path / "plain"))
    assert not nn.q1_paths(again)
    assert_close(q1_models.logits(again), to_numpy(q1_models.logits(model)), 1e-6)


@pytest.mark.parametrize("path", ["affine", "native"])
def test_hadamard_folded_weights_are_refused(path, affine, native, tmp_path):
    change_config(tmp_path / path, prism={"hadamard": {"block_size": 128}})
    with pytest.raises(ValueError, match=r"Hadamard-folded ones \('Bonsai 2'\).+rotated"):
        tqext.load(str(tmp_path / path))


def test_unknown_native_format_is_refused(native):
    change_config(native[0], tqext_weights={"format": "q1_1", "group_size": 64})
    with pytest.raises(ValueError, match=r"config\.tqext_weights: expected .+, got .+q1_1"):
        tqext.load(str(native[0]))


MISTAKES = {
    "no words": (lambda w: w.pop("lm_head.weight"), r"lm_head\.weight: expected uint32 .+, got none"),
    "words of another type": (
        lambda w: w.update({"lm_head.weight": w["lm_head.weight"].astype(mx.int32)}),
        r"lm_head\.weight: expected uint32",
    ),
    "scales of another type": (
        lambda w: w.update({"lm_head.scales": w["lm_head.scales"].astype(mx.float32)}),
        r"lm_head\.scales: expected float16",
    ),
    "scales of another shape": (
        lambda w: w.update({"lm_head.scales": w["lm_head.scales"][:, :1]}),
        r"lm_head\.scales: expected float16 \(258, 2",
    ),
    "biases": (lambda w: w.update({"lm_head.biases": w["lm_head.scales"]}), r"lm_head\.biases: expected none"),
    "scales of no layer": (
        lambda w: w.update({"nothing.scales": w["lm_head.scales"], "nothing.weight": w["lm_head.weight"]}),
        r"nothing: expected a linear or embedding layer",
    ),
    "other sizes than the model's": (
        lambda w: w.update({"lm_head.scales": w["lm_head.scales"][:9], "lm_head.weight": w["lm_head.weight"][:9]}),
        r"lm_head",
    ),
    "a layer missing": (lambda w: (w.pop("lm_head.scales"), w.pop("lm_head.weight")), r"lm_head"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_malformed_native_checkpoint_is_a_value_error(mistake, native):
    change, message = MISTAKES[mistake]
    change_tensors(native[0], change)
    with pytest.raises(ValueError, match=message):
        tqext.load(str(native[0]))


def test_truncated_native_checkpoint_is_an_error(native):
    file = native[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises((RuntimeError, ValueError)):
        tqext.load(str(native[0]))


def test_save_needs_one_bit_layers(tmp_path):
    settings = q1_models.config()
    with pytest.raises(ValueError, match=r"^\[save\] model: expected 1-bit layers, got none"):
        one_bit.save(tmp_path / "out", q1_models.make_model(settings), settings)


def run(*args):
    command = [sys.executable, "-m", "tqext", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


def test_quantize_1bit_makes_a_model_that_generates_on_a_compressed_cache(tmp_path):
    settings = q1_models.config(num_hidden_layers=10)
    plain = tmp_path / "plain"
    mlx_lm.utils.save_model(plain, q1_models.make_model(settings))
    (plain / "config.json").write_text(json.dumps(settings))
    q1_models.write_tokenizer(plain)
    made = run("quantize-1bit", "--model", plain, "--out", tmp_path / "one")
    assert made.returncode == 0, made.stderr
    assert "72 layers with 1-bit weights" in made.stdout and "rounded, not trained" in made.stderr
    model, _ = tqext.load(str(tmp_path / "one"))
    assert len(nn.q1_paths(model)) == 72
    again = run("quantize-1bit", "--model", plain, "--out", tmp_path / "one")
    assert again.returncode == 2 and "exists" in again.stderr
    text = ["--prompt", "Once upon a time there was", "--max-tokens", "40", "--ignore-chat-template"]
    done = run("generate", "--model", tmp_path / "one", "--kv", "bonsai", "--temp", "0", *text)
    assert done.returncode == 0, done.stderr
    assert "2 of 10" in done.stdout, done.stdout


def test_one_bit_weights_and_compressed_cache_in_one_process(native):
    from mlx_lm.generate import generate_step

    folder, _ = native
    model, _ = tqext.load(str(folder))
    prompt = mx.array(np.random.default_rng(0).integers(0, 250, 220))
    cache = tqext.make_prompt_cache(model, "tq3", guard=False)
    tokens = [token for token, _ in generate_step(prompt, model, max_tokens=20, prompt_cache=cache)]
    assert len(tokens) == 20 and all(isinstance(c, TurboQuantKVCache) and c.n_coded for c in cache)


def test_cli_usage_names_the_command(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    assert "quantize-1bit" in capsys.readouterr().out
