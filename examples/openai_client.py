"""The `openai` package with `tqext server`: a streamed answer, then a coding agent's requests.

    tqext server --model smollm2 --kv tq33 --port 8080
    python examples/openai_client.py --url http://127.0.0.1:8080/v1 [--model smollm2]

Needs `pip install openai`. The agent sends what coding agents send: a long system prompt, tools, and in every turn the whole
conversation again, with the calls of tools and what they returned. The server finds all but the newest messages in its prompt
cache. A small model seldom calls a tool; the example then calls it in the model's place, so that the requests keep their shape.
"""

import argparse
import json
import subprocess
import sys

from openai import OpenAI

# A few thousand tokens of rules that never change are usual; they are read once and found again by every request.
RULES = "\n".join(
    f"{i}. {rule}"
    for i, rule in enumerate(
        (
            "Read a file before you change it, and change only what the task asks for.",
            "Call one tool at a time, and wait for what it returns.",
            "Run the tests after every change, and say which ones fail.",
            "Keep names, style and language of the project.",
            "Never invent a path, a function or an option: look it up.",
            "When the task is done, say in one sentence what was changed.",
        )
        * 4,
        1,
    )
)
SYSTEM = f"You are a coding agent in the folder /project. Rules:\n{RULES}"


def tool(name, description, **parameters):
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool("read_file", "Returns a file's text.", path="Path below /project"),
    tool("run_tests", "Runs the tests and returns what they print.", path="File or folder of tests"),
]
FILES = {"calc.py": "def add(a, b):\n    return a - b\n"}


def run_tool(name, arguments):
    """The project of this example is one file."""
    if name == "read_file":
        return FILES.get(arguments.get("path", ""), "no such file")
    if name == "run_tests":
        code = FILES["calc.py"] + "\nprint('passed' if add(2, 3) == 5 else f'failed: add(2, 3) is {add(2, 3)}')"
        return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    return f"no such tool: {name}"


def ask(client, options, messages):
    """One turn of the agent; the answer may be a text, calls of tools, or both."""
    answer = client.chat.completions.create(
        model=options.model, messages=messages, tools=TOOLS, max_tokens=options.max_tokens, temperature=0
    )
    usage = answer.usage
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    print(f"  {usage.prompt_tokens} prompt tokens, {cached} of them from the cache")
    return answer.choices[0].message


def agent(client, options, task):
    """The turns of one task: every request holds all messages so far."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task}]
    for name, arguments in (("read_file", {"path": "calc.py"}), ("run_tests", {"path": "."})):
        message = ask(client, options, messages)
        if message.tool_calls:
            calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls]
        else:
            calls = [(f"call_{name}", name, json.dumps(arguments))]
        asked = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
        messages.append({"role": "assistant", "content": message.content or "", "tool_calls": asked})
        for i, called, text in calls:
            try:
                result = run_tool(called, json.loads(text))
            except json.JSONDecodeError as error:
                result = f"the arguments are no JSON: {error}"
            print(f"  {called}({text}) -> {result!r:.60}")
            messages.append({"role": "tool", "tool_call_id": i, "content": result})
    return ask(client, options, messages).content


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--model", default="default_model", help="as the server was started with")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key="none")  # the server asks for no key
    print("Models:", ", ".join(model.id for model in client.models.list()))

    stream = client.chat.completions.create(
        model=options.model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=options.max_tokens,
        temperature=0,
        stream=True,
    )
    print("> What is the capital of France?")
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print("\n\n> Find the bug in calc.py. (an agent)")
    print(agent(client, options, "Find the bug in calc.py."))


if __name__ == "__main__":
    main()
