"""Generation on several machines with a compressed cache: every rank holds its own heads or layers, and their packed bytes.

mlx.launch --backend ring -n 2 -- python examples/distributed_generate.py --model FOLDER                    # on one machine
mlx.launch --backend ring --hostfile hosts.json -- python examples/distributed_generate.py --model FOLDER   # on two Macs
mlx.launch --backend nccl -n 2 -- python examples/distributed_generate.py --model FOLDER                    # on two NVIDIA GPUs
"""

import argparse

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.utils import sharded_load

import tqext


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or hub id; its KV heads divide by the number of ranks")
    parser.add_argument("--pipeline", action="store_true", help="split the layers instead of the heads")
    parser.add_argument("--kv", default="tq3")
    parser.add_argument("--prompt", default="Explain why the sky is blue.")
    parser.add_argument("--max-tokens", type=int, default=100)
    options = parser.parse_args()
    group = mx.distributed.init()
    tqext.install(options.kv)
    tqext.one_bit.hook()  # models with 1-bit weights
    model, tokenizer = sharded_load(options.model, *((group, None) if options.pipeline else (None, group)))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": options.prompt}], add_generation_prompt=True)
    for response in stream_generate(model, tokenizer, prompt, max_tokens=options.max_tokens):
        if group.rank() == 0:
            print(response.text, end="", flush=True)
    if group.rank() == 0:
        print()


if __name__ == "__main__":
    main()
