"""Conversations as documents: one for each answer, with the past that it may see.

A chat template (Jinja, as `transformers` has them, run in its sandbox) turns messages into text in which the names of
special tokens stand. Only the template can name one: in what people wrote such a name is text like any other, for the
template is given place holders, and what was written is put in their places when the special tokens have been found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from dlm_scale.data.files import read_regular
from dlm_scale.data.optional import import_optional
from dlm_scale.errors import UsageError

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|delete|>")
PROMPTS_SUFFIX = ".prompts"  # D/train.prompts: int32, for each document how many of its ids are the past
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LABEL = (  # what the user says is a label or a list of attributes, what the assistant says a text of that kind
    "{% for message in messages %}{{ ('<|im_start|>' if message['role'] == 'user' else '') + message['content'] "
    "+ '<|im_end|>' }}{% endfor %}"
)
ANSWERS = "assistant"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
OPEN, CLOSE = "\ue000", "\ue001"  # around the number of a place holder; private characters, never in a template
PLACE = re.compile(f"{OPEN}(\\d+){CLOSE}")


TEMPLATES = {"chatml": CHATML, "label": LABEL}


class Turn(NamedTuple):
    """The ids of one answer, its end included, and of all that comes before it, int64 each."""

    prompt: np.ndarray
    answer: np.ndarray

    def within(self, max_length: int) -> Turn:
        """At most so many ids (0: all): the oldest past goes first, then the end of the answer."""
        if not max_length:
            return self
        answer = self.answer[:max_length]
        return Turn(self.prompt[max(0, len(self.prompt) + len(answer) - max_length) :], answer)


@dataclass(frozen=True)
class Chat:
    """A template and the special tokens that it may use (name -> id), over the plain `encode(text)` of a tokenizer."""

    template: str
    special_ids: Mapping[str, int]
    encode: Callable[[str], np.ndarray]

    def turns(self, messages: Sequence[tuple[str, str]], where: str) -> Iterator[Turn]:
        """A Turn for each message (role, content) of the assistant. `where` names the conversation in errors.
        Raises UsageError."""
        written, shown = _places(messages)
        for number, (role, _) in enumerate(messages):
            if role == ANSWERS:
                prompt = self._rendered(shown[:number], True, where)
                whole = self._rendered(shown[: number + 1], False, where)
                yield Turn(self._ids(prompt, written), self._ids(self._answer_in(whole, prompt, where), written))

    def prompt(self, messages: Sequence[tuple[str, str]], where: str = "the conversation") -> np.ndarray:
        """int64 ids of a conversation up to where the next answer begins. Raises UsageError."""
        written, shown = _places(messages)
        return self._ids(self._rendered(shown, True, where), written)

    def _rendered(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, where: str) -> str:
        jinja2 = import_optional("jinja2", "a chat template")
        try:
            return _compiled(self.template).render(messages=messages, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise UsageError(f"{where}: the chat template does not take it ({error})") from error

    def _answer_in(self, whole: str, prompt: str, where: str) -> str:
        """What the template makes of the last message, up to the special token that ends it."""
        if not whole.startswith(prompt):
            raise UsageError(f"{where}: with the answer, the chat template does not begin as it does without: "
                             f"{whole[:200]!r}. Its generation prompt must be what stands before each answer")
        answer = whole[len(prompt) :]
        ends = [match.end() for match in self._special.finditer(answer)]
        if not ends or answer[ends[-1] :].strip():
            raise UsageError(f"{where}: the chat template ends the answer by no special token of "
                             f"{', '.join(self.special_ids)}: text could not stop there")
        return answer[: ends[-1]]

    def _ids(self, rendered: str, written: Sequence[_Written]) -> np.ndarray:
        """Special tokens of the template as their ids; all text between two of them is encoded at once."""
        pieces, parts = self._special.split(rendered), []
        for number, piece in enumerate(pieces):
            if number % 2:
                parts.append(np.array([self.special_ids[piece]], dtype=np.int64))
            elif piece:
                text = PLACE.sub(lambda place: written[int(place[1])].text, piece)
                parts.append(np.asarray(self.encode(text), dtype=np.int64))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    @property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


class _Written(NamedTuple):
    """What a message says: white space around a text, of which the template sees a place holder. Templates trim."""

    before: str
    text: str
    after: str

    @classmethod
    def of(cls, content: str) -> _Written:
        text = content.strip()
        start = content.find(text) if text else len(content)
        return cls(content[:start], text, content[start + len(text) :])

    def shown(self, number: int) -> str:
        return f"{self.before}{OPEN}{number}{CLOSE}{self.after}" if self.text else self.before


def _places(messages: Sequence[tuple[str, str]]) -> tuple[list[_Written], list[dict[str, str]]]:
    """What was written, and the messages as the template sees them."""
    written = [_Written.of(content) for _, content in messages]
    roles = (role for role, _ in messages)
    return written, [{"role": role, "content": w.shown(i)} for i, (role, w) in enumerate(zip(roles, written, strict=True))]


def template_of(name: str) -> str:
    """The text of a template: of a known name, or in a file. Raises UsageError."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        return read_regular(name).decode()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(TEMPLATES)
        raise UsageError(f"--chat {name}: no template of that name ({known}), and as a file: {error}") from None


def check_template(template: str, special_ids: Mapping[str, int]) -> str:
    """The template, if it makes answers that end. Raises UsageError."""
    if OPEN in template or CLOSE in template:
        raise UsageError("the chat template holds private characters (U+E000, U+E001), which mark places here")
    end_id_of(template, special_ids)
    return template


def end_id_of(template: str, special_ids: Mapping[str, int]) -> int:
    """The special token that ends an answer of this template. Raises UsageError where none does."""
    example = [("user", "question"), (ANSWERS, "answer")]
    turn = next(Chat(template, special_ids, lambda text: np.zeros(0, np.int64)).turns(example, "an example"))
    return int(turn.answer[-1])


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """In jinja2's sandbox for untrusted templates: no attributes of Python's own, no changes to what is passed."""
    sandbox = import_optional("jinja2.sandbox", "a chat template")

    def refuse(message: str) -> None:
        raise ValueError(message)

    made = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    made.globals["raise_exception"] = refuse
    return made.from_string(template)


def messages_of(found: list, where: Callable[[], str]) -> list[tuple[str, str]]:
    """(role, content) of each of a list of {role, content}, or of ShareGPT's {from, value}. UsageError."""
    return [_message(item, number, where) for number, item in enumerate(found)]


def _message(item: Any, number: int, where: Callable[[], str]) -> tuple[str, str]:
    value = item if isinstance(item, dict) else {}
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise UsageError(f"{where()}: message {number} is no object with texts `role` and `content`: {str(item)[:100]!r}")
    return SHAREGPT_ROLES.get(role, role), content
