"""What test_distributed.py launches twice: a model in two parts on compressed caches; rank 0 writes its tokens.

``FOLDER PART...`` are the arguments: ``tensor`` parts are KV heads, ``pipeline`` parts are layers, ``one-bit`` is ``tensor``
with weights of one bit. The tokens of a part go to ``FOLDER/PART.json``, its prefix store is ``FOLDER/PART``.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import batch_generate

import tqext
import tqext.mlx_lm
from distributed_prefix_check import check
from q1_models import make_one_bit
from tiny import Words, greedy, make_llama, make_qwen2, prompt


def check_part(part, file, folder, group):
    model = {"tensor": make_llama, "one-bit": make_one_bit, "pipeline": make_qwen2}[part]()
    by_head = part != "pipeline"
    whole_logits = model(mx.array([prompt(40)]))
    if by_head:
        if part == "tensor":
            whole = tqext.calibrate(model).layers
            sharp = make_llama()
            first_head = mx.where(mx.arange(128)[:, None] < 64, 40.0, 1.0)
            sharp.layers[0].self_attn.k_proj.weight = sharp.layers[0].self_attn.k_proj.weight * first_head
            sharp.shard(group)
            # Its keys are off on one rank alone; both must leave their heads of the layer as they are.
            recipes = [layer.recipe for layer in tqext.mlx_lm.report(tqext.attach(sharp, means=False, balance=False)).layers]
            assert [recipe is None for recipe in recipes] == [True, False, False], recipes
        model.shard(group)
        if part == "tensor":
            by_rank = tqext.calibrate(model).layers  # with further steps: another rank may need them
            for key, found in whole.items():
                own = found.balance[group.rank() : group.rank() + 1]
                assert mx.allclose(by_rank[key].balance, own, rtol=1e-3), "each rank has the balance of its heads"
    else:
        model.model.pipeline(group)
    # Of the order of fp32's rounding: the sums over the ranks are made in another order.
    own_logits = model(mx.array([prompt(40)]))
    assert mx.allclose(own_logits, whole_logits, rtol=0, atol=2e-5 * mx.abs(whole_logits).max().item())
    # Layers of the middle only: a stage must know where in the whole model its layers are.
    tqext.attach(model, "tq3", first_last=0 if by_head else 1)
    cache = model.make_cache()
    tokens = greedy(model, prompt(250), 12, cache=cache)
    if by_head:
        assert cache[0].keys.shape[1] == 1, "one KV head for each process"
        assert cache[0].n_coded > 0
    else:
        kinds = [type(c).__name__ for c in cache]
        assert kinds == (["KVCache"] if group.rank() else ["TurboQuantKVCache", "KVCache"]), kinds
        tqext.attach(model, "tq3")
        cache = model.make_cache()
        tokens = greedy(model, prompt(250), 12, cache=cache)
        assert [c.n_coded > 0 for c in cache] == [True] * len(cache)
    if part == "tensor":
        check(tqext.attach(model, "tq33", guard=False, balance=False), part, folder, 512, more=True)
    if part == "pipeline":
        # Rank 1 has the first layer alone, and no compressed one: its parts begin elsewhere.
        check(tqext.attach(model, "tq33", guard=False, balance=False, first_last=1), part, folder, 512, more=False)
    tqext.attach(model, "tq3")
    batch = batch_generate(model, Words(), [prompt(250), prompt(40, 1)], max_tokens=12, return_token_ids=True).token_ids
    mx.eval(mx.distributed.all_sum(mx.array(1), group=group))
    if group.rank() == 0:
        with open(file, "w") as out:
            json.dump([tokens, *batch], out)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    ranks = mx.distributed.init(strict=True)
    assert ranks.size() == 2
    for name in sys.argv[2:]:
        check_part(name, out / f"{name}.json", out / name, ranks)
        tqext.uninstall()
