"""What test_distributed.py launches twice: a tensor-parallel model on compressed caches; rank 0 writes its tokens."""

import json
import sys

import mlx.core as mx

import tqext
from tiny import greedy, make_llama, prompt

group = mx.distributed.init(strict=True)
assert group.size() == 2
model = make_llama()
model.shard(group)
tqext.attach(model, "tq3")
cache = model.make_cache()
tokens = greedy(model, prompt(120), 24, cache=cache)
assert cache[0].keys.shape[1] == 1, "one KV head for each process"
assert cache[0].n_coded > 0
mx.eval(mx.distributed.all_sum(mx.array(1), group=group))
if group.rank() == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(tokens, file)
