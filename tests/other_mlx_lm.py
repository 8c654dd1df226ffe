"""What test_state.py runs with another version of mlx-lm on the path: ``VERSION FILE`` are the arguments."""

import sys

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as stock
from mlx_lm.generate import batch_generate, speculative_generate_step

import tqext
from tiny import Words, greedy, logits_after, make_llama, prompt

version, file = sys.argv[-2:]
assert mlx_lm.__version__ == version, (mlx_lm.__version__, mlx_lm.__file__)
model = make_llama()
tqext.verify(model)
tqext.attach(model, "tq3")
tokens = prompt(150)
plain = greedy(model, tokens, 40)

cache = stock.make_prompt_cache(model)
assert type(cache[0]) is tqext.TurboQuantKVCache
logits_after(model, cache, tokens[:100])
stock.save_prompt_cache(file, cache)
loaded = stock.load_prompt_cache(file)
assert mx.array_equal(*(logits_after(model, c, tokens[100:]) for c in (cache, loaded)))

prompts = [tokens, prompt(3, 1), prompt(70, 2)]
alone = [greedy(model, p, 40) for p in prompts]
together = batch_generate(model, Words(), prompts, max_tokens=40)
assert together.texts == [Words().decode(a) for a in alone]

caches = stock.make_prompt_cache(model) + stock.make_prompt_cache(model)
steps = speculative_generate_step(mx.array(tokens), model, model, num_draft_tokens=3, max_tokens=40, prompt_cache=caches)
assert [int(token) for token, _, _ in steps] == plain
print(f"mlx-lm {version}: all passed")
