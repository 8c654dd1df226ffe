"""Two clients of one server with a compressed cache: both ask at once, then one goes on with its conversation.

python examples/two_clients.py [--model smollm2] [--kv tq3]
"""

import argparse
import concurrent.futures
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_ready(server, url, seconds=300):
    for _ in range(seconds):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise SystemExit("the server did not become ready")


def chat(url, messages, max_tokens):
    body = json.dumps({"messages": messages, "max_tokens": max_tokens, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
    return answer["choices"][0]["message"]["content"], answer["usage"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kv", default="tq3")
    parser.add_argument("--max-tokens", type=int, default=24)
    options = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tqext", "server", "--model", options.model, "--kv", options.kv, "--port", str(port)]
    server = subprocess.Popen(command)
    try:
        wait_until_ready(server, url)
        questions = ["What is the capital of France?", "Name three colours."]
        histories = [[{"role": "user", "content": q}] for q in questions]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda h: chat(url, h, options.max_tokens), histories))
        for question, (text, _) in zip(questions, answers, strict=True):
            print(f"> {question}\n{text}\n")
        # The follow-up finds its own conversation's cache, whatever else ran in between.
        follow_up = [
            *histories[0],
            {"role": "assistant", "content": answers[0][0]},
            {"role": "user", "content": "And of Italy?"},
        ]
        text, usage = chat(url, follow_up, options.max_tokens)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        print(f"> And of Italy?\n{text}\n\n{cached} of {usage['prompt_tokens']} prompt tokens came from the cache")
    finally:
        server.terminate()
        server.wait(timeout=30)


if __name__ == "__main__":
    main()
