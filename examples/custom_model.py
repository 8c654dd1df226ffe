"""A small language model of our own that decodes on packed keys and values.

It learns a text character by character for a few seconds, then continues it twice: once with its exact history, once with
`tqext.turboquant_attention` on packed bytes, and compares.

    python examples/custom_model.py [--text FILE] [--steps 60]
"""

import argparse
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import tqext

HEAD_DIM, N_HEADS, N_LAYERS, CONTEXT = 64, 2, 2, 64
TAIL = 32  # recent tokens that stay exact
BLOCK = tqext.format.BLOCK  # tokens that are packed together and share a mean


class PackedHistory:
    """Keys and values of one layer: packed, but for the last tokens."""

    def __init__(self):
        self.keys = self.values = None
        self.tail_k = self.tail_v = mx.zeros((1, N_HEADS, 0, HEAD_DIM))

    def append(self, k, v):
        self.tail_k = mx.concatenate([self.tail_k, k], axis=2)
        self.tail_v = mx.concatenate([self.tail_v, v], axis=2)
        n = max(self.tail_k.shape[2] - TAIL, 0) // BLOCK * BLOCK
        if n == 0 and self.keys is not None:
            return
        oldest = self.tail_k[:, :, :n]
        keys = tqext.quantize_keys(oldest, means=tqext.block_means(oldest))
        values = tqext.quantize_values(self.tail_v[:, :, :n])
        self.tail_k, self.tail_v = self.tail_k[:, :, n:], self.tail_v[:, :, n:]
        if self.keys is None:
            self.keys, self.values = keys, values
        else:
            join = lambda a, b: mx.concatenate([a, b], axis=2)  # noqa: E731
            self.keys = self.keys._replace(
                **{name: join(getattr(self.keys, name), getattr(keys, name)) for name in ("codes", "norms", "means")}
            )
            self.values = self.values._replace(
                codes=join(self.values.codes, values.codes), params=join(self.values.params, values.params)
            )

    def attend(self, q):
        return tqext.turboquant_attention(q, self.keys, self.values, tail=(self.tail_k, self.tail_v), mask="causal")

    @property
    def nbytes(self):
        return self.keys.nbytes + self.values.nbytes + self.tail_k.nbytes + self.tail_v.nbytes


class ExactHistory:
    """The same interface, uncompressed."""

    def __init__(self):
        self.k = self.v = mx.zeros((1, N_HEADS, 0, HEAD_DIM))

    def append(self, k, v):
        self.k, self.v = mx.concatenate([self.k, k], axis=2), mx.concatenate([self.v, v], axis=2)

    def attend(self, q):
        return mx.fast.scaled_dot_product_attention(q, self.k, self.v, scale=HEAD_DIM**-0.5, mask="causal")

    @property
    def nbytes(self):
        return self.k.nbytes + self.v.nbytes


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        dims = N_HEADS * HEAD_DIM
        self.qkv = nn.Linear(dims, 3 * dims, bias=False)
        self.out = nn.Linear(dims, dims, bias=False)
        self.rope = nn.RoPE(HEAD_DIM)

    def __call__(self, x, history, offset):
        B, L, _ = x.shape
        q, k, v = (y.reshape(B, L, N_HEADS, HEAD_DIM).transpose(0, 2, 1, 3) for y in mx.split(self.qkv(x), 3, axis=-1))
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if history is None:  # training
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=HEAD_DIM**-0.5, mask="causal")
        else:
            history.append(k, v)
            out = history.attend(q)
        return self.out(out.transpose(0, 2, 1, 3).reshape(B, L, -1))


class Model(nn.Module):
    def __init__(self, n_characters):
        super().__init__()
        dims = N_HEADS * HEAD_DIM
        self.embed = nn.Embedding(n_characters, dims)
        self.attention = [Attention() for _ in range(N_LAYERS)]
        self.mlp = [nn.Sequential(nn.Linear(dims, 2 * dims), nn.GELU(), nn.Linear(2 * dims, dims)) for _ in range(N_LAYERS)]
        self.norms = [nn.RMSNorm(dims) for _ in range(2 * N_LAYERS + 1)]

    def __call__(self, tokens, histories=None, offset=0):
        x = self.embed(tokens)
        for i in range(N_LAYERS):
            x = x + self.attention[i](self.norms[2 * i](x), histories and histories[i], offset)
            x = x + self.mlp[i](self.norms[2 * i + 1](x))
        return self.embed.as_linear(self.norms[-1](x))


def train(model, data, steps):
    optimizer = optim.AdamW(learning_rate=3e-3)

    def loss(model, x, y):
        return nn.losses.cross_entropy(model(x), y, reduction="mean")

    step = nn.value_and_grad(model, loss)
    for _ in range(steps):
        starts = mx.random.randint(0, data.size - CONTEXT - 1, (4, 1))
        window = data[starts + mx.arange(CONTEXT + 1)]
        value, gradients = step(model, window[:, :-1], window[:, 1:])
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, value)
    return value.item()


def generate(model, prompt, n_tokens, history_class):
    histories = [history_class() for _ in range(N_LAYERS)]
    logits, tokens, offset = model(prompt[None], histories), [], prompt.size
    for _ in range(n_tokens):
        token = mx.argmax(logits[0, -1])
        tokens.append(token.item())
        logits = model(token[None, None], histories, offset)
        offset += 1
    return tokens, sum(h.nbytes for h in histories)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    text = options.text.read_text()
    characters = sorted(set(text))
    data = mx.array([characters.index(c) for c in text])
    mx.random.seed(0)
    model = Model(len(characters))
    print(f"loss after {options.steps} steps: {train(model, data, options.steps):.2f}")
    prompt = data[:512]
    for name, history in (("exact", ExactHistory), ("packed", PackedHistory)):
        tokens, nbytes = generate(model, prompt, 64, history)
        print(f"{name:6} history {nbytes / 1e3:6.1f} kB: {''.join(characters[t] for t in tokens)!r}")


if __name__ == "__main__":
    main()
