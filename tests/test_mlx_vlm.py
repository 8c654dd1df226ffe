"""Compressed caches in the models of mlx-vlm, where it is installed: pip install mlx-vlm."""

import base64
import io
import json
import socket
import subprocess
import sys
import time
import types
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import mlx_vlm.models.cache as vlm_cache
import mlx_vlm.utils
from mlx_vlm.generate.ar import BatchGenerator, generate_step
from mlx_vlm.models.base import LanguageModelOutput
from PIL import Image

import tqext
import tqext.mlx_lm
from tiny import make_llama, prompt, save_chat_folder
from tqext.mlx_lm import hooks
from vlm_models import CONFIGS, make, save_with_processor, with_image

N_COMPRESSED = {"qwen2_5_vl": 4, "qwen3_vl": 4, "gemma3": 2}


@pytest.fixture(scope="module", params=list(CONFIGS))
def vlm(request):
    model = make(request.param)
    return types.SimpleNamespace(kind=request.param, model=model, text=model.language_model)


@pytest.fixture(autouse=True)
def _taken_back():
    yield
    tqext.uninstall()


def text(n, seed=0):
    return prompt(n, seed, vocab=240)


def steps(vlm, tokens, pixels, extra, cache, n=30, **options):
    """Logarithms of probabilities ``[n, vocabulary]`` and the tokens that mlx-vlm generates."""
    ids = mx.array([tokens])
    found = generate_step(
        ids, vlm.model, pixels, mx.ones_like(ids), max_tokens=n, prompt_cache=cache, temperature=0.0, **extra, **options
    )
    chosen, logprobs = zip(*found, strict=True)
    return mx.stack(logprobs), [int(x) for x in chosen]


def kinds(cache):
    return [type(c).__name__ for c in cache]


# One sequence


def test_probe_and_verify_take_the_model_or_its_text_model(vlm):
    for model in (vlm.model, vlm.text):
        assert len(tqext.probe(model).compressed) == N_COMPRESSED[vlm.kind]
    assert tqext.verify(vlm.model).compressed == tqext.verify(vlm.text).compressed


def test_the_other_caches_are_mlx_vlms_own(vlm):
    plain = vlm_cache.make_prompt_cache(vlm.text)
    cache = tqext.make_prompt_cache(vlm.model, "tq3")
    assert kinds(cache).count("TurboQuantKVCache") == N_COMPRESSED[vlm.kind]
    for ours, theirs in zip(cache, plain, strict=True):
        assert type(ours) is tqext.TurboQuantKVCache or type(ours) is type(theirs)


def test_an_image_among_text_is_answered_as_without_compression_while_all_is_exact(vlm):
    inputs = with_image(vlm.kind, text(200))
    want, chosen = steps(vlm, *inputs, vlm_cache.make_prompt_cache(vlm.text))
    got, same = steps(vlm, *inputs, tqext.make_prompt_cache(vlm.model, "tq3", tail=512))
    assert same == chosen
    assert mx.allclose(got, want, rtol=1e-4, atol=1e-4)
    _, other = steps(vlm, *with_image(vlm.kind, text(200), seed=1), vlm_cache.make_prompt_cache(vlm.text))
    assert other != chosen  # the image matters


def test_codes_of_text_and_image_are_nearer_than_those_of_mlx_vlm(vlm):
    """Of as many bits; mlx-vlm leaves the last layer exact."""
    tokens, pixels, extra = with_image(vlm.kind, text(400))
    want, _ = steps(vlm, tokens, pixels, extra, vlm_cache.make_prompt_cache(vlm.text), n=1)
    # In two chunks: the tokens of a chunk find each other exact.
    cache = tqext.make_prompt_cache(vlm.model, "tq4")
    ours, _ = steps(vlm, tokens, pixels, extra, cache, n=1, prefill_step_size=256)
    theirs, _ = steps(
        vlm,
        tokens,
        pixels,
        extra,
        vlm_cache.make_prompt_cache(vlm.text),
        n=1,
        prefill_step_size=256,
        kv_bits=4,
        kv_quant_scheme="turboquant",
        quantized_kv_start=0,
    )
    coded = [c.n_coded for c in cache if isinstance(c, tqext.TurboQuantKVCache)]
    assert len(coded) == N_COMPRESSED[vlm.kind] and min(coded) >= 256
    assert 0 < mx.abs(ours - want).max() < mx.abs(theirs - want).max()


def test_what_the_model_remembers_of_a_prompt_survives_the_calibration(vlm):
    """Qwen's models keep the places of the last prompt's tokens, of which an image takes fewer than it has tokens."""
    inputs = with_image(vlm.kind, text(100))
    steps(vlm, *inputs, vlm_cache.make_prompt_cache(vlm.text), n=2)
    before = {name: getattr(vlm.text, name, None) for name in ("_position_ids", "_rope_deltas")}
    tqext.verify(vlm.model, "tq4")
    for name, x in before.items():
        assert getattr(vlm.text, name, None) is x


def test_upgrade_compresses_in_the_middle_of_a_generation(vlm):
    inputs = with_image(vlm.kind, text(300))
    for options in ({}, {"model": vlm.model}):
        cache = vlm_cache.make_prompt_cache(vlm.text)
        _, chosen = steps(vlm, *inputs, cache, n=5)
        tqext.upgrade(cache, "tq4", **options)
        changed = [c for c in cache if type(c) is tqext.TurboQuantKVCache]
        assert len(changed) == N_COMPRESSED[vlm.kind]
        assert min(c.n_coded for c in changed) >= 128
        out = vlm.text(mx.array([[chosen[-1]]]), cache=cache)
        assert isinstance(out, LanguageModelOutput) and mx.isfinite(out.logits).all()


def test_upgrade_says_why_a_window_stays():
    with pytest.warns(UserWarning, match="RotatingKVCache stays: a sliding window"):
        tqext.upgrade([vlm_cache.RotatingKVCache(64)], "tq3")


# All models


def test_attach_and_detach(vlm):
    assert tqext.attach(vlm.model, "tq3") is vlm.model
    assert kinds(vlm_cache.make_prompt_cache(vlm.text)).count("TurboQuantKVCache") == N_COMPRESSED[vlm.kind]
    assert len(tqext.mlx_lm.report(vlm.model).compressed) == N_COMPRESSED[vlm.kind]
    tqext.detach(vlm.model)
    assert "TurboQuantKVCache" not in kinds(vlm_cache.make_prompt_cache(vlm.text))
    del vars(vlm.text)["_tqext_attachment"]  # the next test's install takes it again


def save(kind, folder):
    model = make(kind)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    return folder


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_install_reaches_the_loader(kind, tmp_path):
    stock = mlx_vlm.utils.load_model
    folder = save(kind, tmp_path)
    tqext.install("tq4")
    loaded = mlx_vlm.utils.load_model(folder)
    cache = vlm_cache.make_prompt_cache(loaded.language_model)
    assert [c.recipe.key_bits for c in cache if type(c) is tqext.TurboQuantKVCache] == [4] * N_COMPRESSED[kind]
    tqext.uninstall()
    assert mlx_vlm.utils.load_model is stock
    assert "TurboQuantKVCache" not in kinds(vlm_cache.make_prompt_cache(loaded.language_model))


def test_install_reaches_models_that_are_loaded_already(vlm):
    tqext.install("tq3")
    assert kinds(vlm_cache.make_prompt_cache(vlm.text)).count("TurboQuantKVCache") == N_COMPRESSED[vlm.kind]


def test_install_before_mlx_vlm_is_imported(tmp_path):
    folder = save("gemma3", tmp_path)
    script = f"""
import sys
import tqext
tqext.install("tq3")
assert "mlx_vlm" not in sys.modules
import mlx_vlm.utils, mlx_vlm.models.cache, pathlib
model = mlx_vlm.utils.load_model(pathlib.Path({str(folder)!r}))
from mlx_vlm.models.cache import make_prompt_cache
assert [type(c).__name__ for c in make_prompt_cache(model.language_model)].count("TurboQuantKVCache") == 2
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("tqext.")]
tqext.uninstall()
assert not hasattr(mlx_vlm.utils.load_model, "__wrapped__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_hook_that_still_waits_is_taken_back():
    hook = hooks.Hook("mlx_vlm.no_such_module", "name", print)
    hook.put()
    assert hook.owner is None
    hook.take_back()
    assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("tqext.")]


# Batches


class Words:
    """Of a tokenizer, what mlx-vlm's batches ask for: nothing ends a sequence but its length."""

    class stopping_criteria:
        @staticmethod
        def add_eos_token_ids(ids):
            pass

        def __new__(cls, token):
            return False


def batch(vlm, prompts, n, **options):
    """The tokens of each prompt, of which each is ``(tokens, pixels, extra)``."""
    generator = BatchGenerator(vlm.text, Words, max_tokens=n, compute_logprobs=False, **options)
    kwargs = []
    for tokens, pixels, extra in prompts:
        ids = mx.array([tokens])
        found = vlm.model.get_input_embeddings(ids, pixels, mask=mx.ones_like(ids), **extra).to_dict()
        kwargs.append({name: x for name, x in found.items() if x is not None})
    uids = generator.insert([tokens for tokens, _, _ in prompts], n, prompt_kwargs=kwargs)
    out = {uid: [] for uid in uids}
    classes = set()
    while generator.has_work:
        for response in generator.next()[1]:
            out[response.uid].append(response.token)
        classes.update(kinds(generator._generation_batch.prompt_cache))
    generator.close()
    return [out[uid] for uid in uids], classes


@pytest.mark.parametrize("preset", ["tq3", "tq4"])
def test_each_sequence_of_a_batch_says_what_it_says_alone(vlm, preset):
    tqext.attach(vlm.model, preset)
    prompts = [(text(n, seed), None, {}) for n, seed in ((260, 0), (5, 1), (190, 2))]
    alone = [batch(vlm, [p], 40, prefill_batch_size=1)[0][0] for p in prompts]
    for size in (1, 3):  # sequences that come one by one, or together
        together, classes = batch(vlm, prompts, 40, prefill_batch_size=size)
        assert together == alone
        assert "BatchTurboQuantKVCache" in classes


def test_images_in_a_batch(vlm):
    tqext.attach(vlm.model, "tq3")
    prompts = [with_image(vlm.kind, text(260), 0), with_image(vlm.kind, text(140, 1), 1)]
    alone = [batch(vlm, [p], 30, prefill_batch_size=1)[0][0] for p in prompts]
    together, classes = batch(vlm, prompts, 30, prefill_batch_size=1)
    assert together == alone
    assert "BatchTurboQuantKVCache" in classes


def test_a_cache_with_tokens_makes_no_empty_batch():
    cache = tqext.TurboQuantKVCache()
    x = mx.zeros((1, 2, 3, 64))
    cache.update_and_fetch(x, x)
    with pytest.raises(ValueError, match=r"\[to_batch\] cache: expected an empty cache, got 3 tokens"):
        cache.to_batch([0])


def test_the_quantisation_of_mlx_vlm_and_ours_are_not_mixed_in_a_batch(vlm):
    tqext.attach(vlm.model, "tq3")
    with pytest.raises(NotImplementedError, match="TurboQuantKVCache does not support quantized"):
        batch(vlm, [(text(20), None, {})] * 2, 2, prefill_batch_size=2, kv_bits=4)


# Its server

SERVE = """
import sys
import tqext, tqext.mlx_lm
tqext.install("tq3")
tqext.mlx_lm.on_cache(lambda report, cache: print("made:", str(report).split(",")[0], flush=True))
from mlx_vlm.server import main
main()
"""


class Server:
    """mlx-vlm's, with compressed caches. It holds the model that a request names."""

    def __init__(self, folder, log):
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-c", SERVE, "--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, log.read_text()
                time.sleep(0.5)
        raise AssertionError(log.read_text())

    def ask(self, folder, messages, n=30):
        body = {"model": str(folder), "max_tokens": n, "temperature": 0, "messages": messages}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("server")
    server = Server(save_chat_folder(make_llama(), place / "text"), place / "log")
    yield types.SimpleNamespace(ask=server.ask, folder=place / "text", log=server.log)
    server.process.kill()
    server.process.wait()


def test_the_server_answers_together_as_one_by_one(server):
    """A model that has no processor of images."""

    def ask(i):
        return server.ask(server.folder, [{"role": "user", "content": "abc " * (20 + 30 * i)}])

    one_by_one = [ask(i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, range(3))) == one_by_one
    assert "made: tq3: 3 of 3 layers compressed" in server.log.read_text()


def picture(seed):
    """A PNG of random colours, as a part of a message."""
    image, file = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (112, 112, 3), np.uint8)), io.BytesIO()
    image.save(file, "PNG")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_server_answers_about_images(server, kind, tmp_path):
    """One by one and two at once, and then a second question about the first image."""
    folder = save_with_processor(kind, tmp_path / kind)

    def question(i):
        return [{"role": "user", "content": [picture(i), {"type": "text", "text": "What do you see in this picture? " * 9}]}]

    one_by_one = [server.ask(folder, question(i)) for i in range(2)]
    assert one_by_one[0] and one_by_one[0] != one_by_one[1], "the picture does not matter, so this shows nothing"
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda i: server.ask(folder, question(i)), range(2))) == one_by_one
    turns = [*question(0), {"role": "assistant", "content": one_by_one[0]}, {"role": "user", "content": "Which colour is it?"}]
    assert server.ask(folder, turns)
    _, found, text = server.log.read_text().partition(f"Loading model: {folder}")
    n_layers = CONFIGS[kind].get("text_config", CONFIGS[kind])["num_hidden_layers"]
    assert found and f"made: tq3: {N_COMPRESSED[kind]} of {n_layers} layers compressed" in text
    assert "Traceback" not in text
