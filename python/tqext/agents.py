"""``tqext eval --agents``: tool calls over long conversations, with the prompt cache kept from turn to turn.

Thirty-six requests in four conversations. Each is answered with one call of a tool, in JSON; what a tool finds goes into the
conversation, and later requests need what earlier results said. The conversation goes on with the right call whatever the
model answered, so that every cache is asked the same.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqext.mlx_lm import make_prompt_cache, stock_cache
from tqext.mlx_lm.packages import AnyModel
from tqext.presets import Policy, get_policy
from tqext.protocols import Tokenizer

MAX_TOKENS = 96  # the longest right call has some 50
ROWS = 12
PROMPT_CHUNK = 2048  # of mlx-lm's own commands
# Board.by_context counts the requests with a context up to so many tokens.
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """A request, the call that answers it, and what the tool then says."""

    request: str
    call: Call
    result: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns with the same tools, each a JSON schema as chat templates take it."""

    name: str
    tools: tuple[dict[str, Any], ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class _Domain:
    """A table of records in a few places, and two things to do with a record."""

    name: str
    record: str
    places: tuple[str, str, str]
    place: str
    fields: tuple[str, ...]
    actions: tuple[tuple[str, str, str, tuple[Any, ...]], ...]  # tool, argument, request, values


_DOMAINS = (
    _Domain(
        "orders", "order", ("Lyon", "Porto", "Graz"), "warehouse", ("item", "quantity", "status"),
        (
            ("cancel_order", "reason", "Cancel the order of {who}. The reason is: {value}.", ("damaged", "late", "duplicate")),
            ("set_quantity", "quantity", "Change the quantity of {who}'s order to {value}.", (7, 25, 40)),
        ),
    ),
    _Domain(
        "patients", "appointment", ("cardiology", "radiology", "surgery"), "department", ("day", "time", "room"),
        (
            ("move_appointment", "day", "Move the appointment of {who} to {value}.", ("Tuesday", "Friday", "Monday")),
            ("set_duration", "minutes", "Make the appointment of {who} {value} minutes long.", (15, 45, 90)),
        ),
    ),
    _Domain(
        "servers", "machine", ("eu-west", "us-east", "ap-south"), "region", ("cores", "system", "load"),
        (
            ("install_system", "system", "Install {value} on the machine that {who} owns.", ("debian", "freebsd", "fedora")),
            ("set_cores", "cores", "Give the machine that {who} owns {value} cores.", (2, 16, 48)),
        ),
    ),
    _Domain(
        "library", "loan", ("history", "physics", "poetry"), "section", ("book", "due", "copies"),
        (
            ("send_reminder", "text", "Send a reminder for the loan of {who}. Its text is: {value}.",
             ("please return it", "it is overdue", "last reminder")),
            ("extend_loan", "weeks", "Extend the loan of {who} by {value} weeks.", (2, 3, 6)),
        ),
    ),
)  # fmt: skip
_FIRST = """
Ana Ben Cleo Dora Emil Finn Gina Hugo Ida Jonas Kira Leo Mara Nils Olga Pavel Rosa Sven Tara Yara
""".split()  # noqa: SIM905
_LAST = """
Adler Berg Costa Duran Ekman Falk Greco Haas Ivanov Jansen Keller Lopez Moreau Novak Olsen Petrov Rossi Silva
""".split()  # noqa: SIM905
_WORDS = """
amber birch cedar delta ember flint grove heron indigo juniper kestrel laurel maple nectar onyx pine
""".split()  # noqa: SIM905


def conversations(rows: int = ROWS) -> list[Conversation]:
    """The fixed set: four conversations of nine requests.

    Args:
        rows: Records in each of the three tables that a conversation asks for: some 50 tokens each. 4 to 100.

    Raises:
        ValueError: `rows` is out of range.
    """
    if not 4 <= rows <= 100:
        raise ValueError(f"[agents] rows: expected 4 to 100, got {rows}")
    return [_conversation(domain, rows) for domain in _DOMAINS]


def _conversation(domain: _Domain, rows: int) -> Conversation:
    rng = random.Random(f"agents {domain.name} {rows}")
    people = [f"{first} {last}" for first in _FIRST for last in _LAST]
    rng.shuffle(people)
    id_name = f"{domain.record}_id"
    tables: list[list[dict[str, Any]]] = []
    unused: dict[int, list[dict[str, Any]]] = {}
    turns = []

    def act(table: list[dict[str, Any]], i: int) -> None:
        tool, argument, request, values = domain.actions[i % 2]
        # Each record once: the next one's number is not in the conversation but in its table.
        record, value = unused[id(table)].pop(), values[i // 2]
        call = Call(tool, {id_name: record[id_name], argument: value})
        turns.append(Turn(request.format(who=record["name"], value=value), call, json.dumps({"ok": True})))

    for i, place in enumerate(domain.places):
        table = []
        for _ in range(rows):
            number = f"{domain.record[0].upper()}-{rng.randrange(10_000, 100_000)}"
            other = {name: rng.choice(_WORDS) if j % 2 == 0 else rng.randrange(100) for j, name in enumerate(domain.fields)}
            table.append({id_name: number, "name": people.pop(), **other})
        tables.append(table)
        unused[id(table)] = rng.sample(table, rows)
        call = Call(f"list_{domain.record}s", {domain.place: place})
        request = f"Which {domain.record}s are there in the {domain.place} {place}?"
        turns.append(Turn(request, call, "\n".join(json.dumps(record) for record in table)))
        act(table, 2 * i)
        act(tables[max(0, i - 1)], 2 * i + 1)  # of the table before, from the second one on
    tools = [_tool(f"list_{domain.record}s", f"List all {domain.record}s of a {domain.place}.", {domain.place: "string"})]
    for tool, argument, _, values in domain.actions:
        kind = "integer" if isinstance(values[0], int) else "string"
        what = f"{tool.replace('_', ' ').capitalize()}: needs the {id_name} and the {argument}."
        tools.append(_tool(tool, what, {id_name: "string", argument: kind}))
    return Conversation(domain.name, tuple(tools), tuple(turns))


def _tool(name: str, description: str, arguments: dict[str, str]) -> dict[str, Any]:
    properties = {argument: {"type": kind} for argument, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


# Answers


def read_call(text: str, tools: Sequence[dict[str, Any]]) -> Call | None:
    """The first call in an answer: a JSON object with a tool's name and its arguments, all and no other; None without one."""
    wanted = {tool["function"]["name"]: set(tool["function"]["parameters"]["properties"]) for tool in tools}
    for found in re.finditer(r"\{", text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, found.start())
        except ValueError:
            continue
        name, arguments = value.get("name"), value.get("arguments")
        if isinstance(name, str) and isinstance(arguments, dict) and set(arguments) == wanted.get(name):
            return Call(name, arguments)
    return None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered to one request.

    Attributes:
        conversation: Its name. ``turn``: from 0 on.
        context: Tokens before the answer.
        expected: The right call.
        got: The call that was found in the answer, None without a valid one.
        text: The answer.
    """

    conversation: str
    turn: int
    context: int
    expected: Call
    got: Call | None
    text: str


@dataclass(frozen=True, slots=True)
class Board:
    """The answers of one cache.

    Attributes:
        preset: The policy's name, ``"none"`` for mlx-lm's own cache.
        answers: All of them.
        reference: Those of the uncompressed cache, or empty.
    """

    preset: str
    answers: tuple[Answer, ...]
    reference: tuple[Answer, ...] = ()

    @property
    def valid(self) -> int:
        """Answers with a call in valid JSON, of a known tool, with its arguments."""
        return sum(answer.got is not None for answer in self.answers)

    @property
    def right(self) -> int:
        """Answers whose call has the expected name and the expected arguments."""
        return sum(answer.got == answer.expected for answer in self.answers)

    @property
    def same(self) -> int | None:
        """Answers whose call is the uncompressed cache's, or has none where that has none; None without a reference."""
        if not self.reference:
            return None
        return sum(a.got == b.got for a, b in zip(self.answers, self.reference, strict=True))

    def by_context(self) -> dict[int, tuple[int, int]]:
        """Right answers and all answers by the context's length: the bound of `CONTEXTS` above it."""
        out: dict[int, tuple[int, int]] = {}
        for answer in self.answers:
            bound = next((n for n in CONTEXTS if answer.context <= n), answer.context)
            right, n = out.get(bound, (0, 0))
            out[bound] = (right + (answer.got == answer.expected), n + 1)
        return out

    def __str__(self) -> str:
        n = len(self.answers)
        same = "" if self.same is None else f", {self.same} as uncompressed"
        parts = ", ".join(f"up to {bound}: {right} of {all_}" for bound, (right, all_) in self.by_context().items())
        return f"{self.preset:<12} {n} requests: {self.right} right, {self.valid} valid{same}; right by context {parts}"

    def as_row(self) -> dict[str, Any]:
        """For JSON, with every answer that is not right."""
        wrong = [
            {"conversation": a.conversation, "turn": a.turn, "context": a.context, "text": a.text}
            for a in self.answers
            if a.got != a.expected
        ]
        counts = {"requests": len(self.answers), "right": self.right, "valid": self.valid, "same": self.same}
        contexts = {str(bound): list(found) for bound, found in self.by_context().items()}
        return {"preset": self.preset, **counts, "by_context": contexts, "wrong": wrong}


def tool_calls(
    model: AnyModel,
    tokenizer: Tokenizer | TokenizerWrapper,
    preset: str | Policy | None,
    *,
    reference: Board | None = None,
    rows: int = ROWS,
    n_conversations: int | None = None,
    n_turns: int | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Board:
    """Let a model answer the fixed set of requests, greedily.

    Args:
        model: Any mlx-lm model.
        tokenizer: Its tokenizer, with a chat template.
        preset: See `tqext.install`; None is mlx-lm's own cache.
        reference: The uncompressed cache's board of the same set, to count equal answers.
        rows: See `conversations`.
        n_conversations: At most this number of conversations. ``n_turns``: at most this number of requests of each.
        progress: Called with 1 after each answer.

    Raises:
        ValueError: The tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("[agents] tokenizer: expected a chat template, got none")
    answers = []
    for conversation in conversations(rows)[:n_conversations]:
        kept = KeptCache(model, preset)
        for i, turn in enumerate(conversation.turns[:n_turns]):
            prompt = _prompt(tokenizer, conversation, i)
            called = functools.partial(read_call, tools=conversation.tools)

            def is_call(text: str, called: Callable[[str], Any] = called) -> bool:
                return called(text) is not None

            text = kept.answer(tokenizer, prompt, MAX_TOKENS, is_call)
            got = called(text)
            answers.append(Answer(conversation.name, i, len(prompt), turn.call, got, text))
            progress(1)
    name = "none" if preset is None else get_policy(preset).name
    return Board(name, tuple(answers), reference.answers if reference else ())


def _prompt(tokenizer: Tokenizer, conversation: Conversation, i: int) -> list[int]:
    """Tokens of a conversation up to the answer of turn `i`."""
    tools = list(conversation.tools)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Answer every request with one tool call."}]
    for turn in conversation.turns[:i]:
        call = {"type": "function", "function": {"name": turn.call.name, "arguments": turn.call.arguments}}
        messages.append({"role": "user", "content": turn.request})
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": turn.call.name, "content": turn.result})
    messages.append({"role": "user", "content": conversation.turns[i].request})
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    except Exception:  # of templates that know no such messages
        text = ""
    if tools[0]["function"]["name"] not in text:
        messages = _plain_messages(conversation, i)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _plain_messages(conversation: Conversation, i: int) -> list[dict[str, Any]]:
    """For chat templates without tools: they are in the first message, and a result is the user's next message."""
    described = "\n".join(json.dumps(tool["function"]) for tool in conversation.tools)
    form = '{"name": ..., "arguments": {...}}'
    intro = f"You have these tools:\n{described}\nAnswer every request with one call in JSON and nothing else: {form}\n\n"
    messages = []
    before = intro
    for turn in conversation.turns[:i]:
        messages.append({"role": "user", "content": before + turn.request})
        call = json.dumps({"name": turn.call.name, "arguments": turn.call.arguments})
        messages.append({"role": "assistant", "content": call})
        before = f"Result of {turn.call.name}:\n{turn.result}\n\n"
    return [*messages, {"role": "user", "content": before + conversation.turns[i].request}]


class KeptCache:
    """A prompt cache that is kept over the turns of a conversation."""

    def __init__(self, model: AnyModel, preset: str | Policy | None) -> None:
        self.model, self.preset = cast(Any, model), preset  # a Model here, a Module for mlx-lm's functions
        self.tokens: list[int] = []
        self._new()

    def _new(self) -> None:
        self.cache = stock_cache(self.model) if self.preset is None else make_prompt_cache(self.model, self.preset)
        self.tokens = []

    def answer(
        self, tokenizer: Tokenizer | TokenizerWrapper, prompt: Sequence[int], max_tokens: int, done: Callable[[str], bool]
    ) -> str:
        """Greedy text after a prompt, of which the kept tokens are not read again. The answer is not kept."""
        self._read(list(prompt[:-1]))
        text = ""
        fork = copy.deepcopy(self.cache)
        for step in stream_generate(
            self.model, cast(TokenizerWrapper, tokenizer), mx.array(list(prompt[-1:])), max_tokens=max_tokens, prompt_cache=fork
        ):
            text += step.text
            if done(text):
                break
        return text

    def _read(self, tokens: list[int]) -> None:
        common = next(
            (i for i, (a, b) in enumerate(zip(self.tokens, tokens, strict=False)) if a != b), min(len(self.tokens), len(tokens))
        )
        if common < len(self.tokens):
            if can_trim_prompt_cache(self.cache):
                trim_prompt_cache(self.cache, len(self.tokens) - common)
            else:
                self._new()
                common = 0
        for begin in range(common, len(tokens), PROMPT_CHUNK):
            self.model(mx.array([tokens[begin : begin + PROMPT_CHUNK]]), cache=self.cache)
            mx.eval([c.state for c in self.cache])
        self.tokens = tokens
