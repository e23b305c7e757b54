"""Prompts with responses, and conversations, from JSON Lines; only the responses are scored."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

from moejax.data.dialogue import ASSISTANT, Conversation, Dialogue, Pair
from moejax.data.errors import DataError
from moejax.data.fingerprint import fingerprint
from moejax.data.jsonl import content_fingerprint, files_of, lines_of, valid
from moejax.data.source import check_holdout, check_split

ROLES = ("system", "user", ASSISTANT, "tool")
_PAIR = ("prompt", "response")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """Records from `.jsonl` files (or `.jsonl.gz`) for tuning on responses.

    A line is `{"prompt": ..., "response": ...}`: the two texts as they are, one after the other;
    or `{"messages": [{"role": ..., "content": ...}, ...]}`: laid out by the tokenizer's chat
    template, or by `dialogue.py`'s where it has none. Other fields of a record are ignored. One
    line in `holdout_every` is held out. A line that is neither is an error: what is tuned on must
    not depend on which lines happened to be readable.

    Attributes:
      path: a file, or a folder whose `*.jsonl` and `*.jsonl.gz` files are read in sorted order.
      holdout_every: the mean distance between held-out lines.
    """

    path: str
    holdout_every: int = 20

    unit: ClassVar[str] = "line"
    dialogues: ClassVar[bool] = True  # the cache of its tokens depends on the chat template

    def documents(self, split: str) -> Iterator[Dialogue]:
        check_split(split)
        check_holdout(self, self.holdout_every)
        count = 0
        for where, line in lines_of(self.path, split, self.holdout_every):
            count += 1
            yield parsed(line, where)
        if not count:
            raise DataError(f"the {split} split of {self.path!r} holds no record: add records")

    def fingerprint(self, split: str) -> str:
        check_split(split)
        return fingerprint("chat", content_fingerprint(self.path), self.holdout_every, split)

    def files(self) -> list[tuple[str, pathlib.Path]]:
        return files_of(self.path)


def parsed(line: bytes, where: str) -> Dialogue:
    """The pair or conversation of a line. Raises DataError that names `where` and the fix."""
    try:
        record = json.loads(line, object_pairs_hook=_unique)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}): write one object per line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is not an object: write {{...}} with prompt and response")
    if "messages" in record:
        both = [key for key in _PAIR if key in record]
        if both:
            raise DataError(f"{where} has messages and {both[0]}: keep one of them")
        return Conversation(messages=tuple(_messages(record["messages"], where)), where=where)
    missing = [key for key in _PAIR if key not in record]
    if missing:
        found = ", ".join(map(repr, record)) or "nothing"
        raise DataError(
            f"{where} has {found} but no {missing[0]!r}: give prompt and response, or messages"
        )
    prompt, response = (_text(record[key], f"{where}: {key}") for key in _PAIR)
    return Pair(prompt=prompt, response=_filled(response, f"{where}: response"), where=where)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"the field {twice[0]!r} is there twice")
    return dict(pairs)


def _messages(messages: Any, where: str) -> Iterator[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is not a list of at least one message")
    for number, message in enumerate(messages):
        name = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{name} is not an object with role and content")
        unknown = sorted(message.keys() - {"role", "content"})
        if unknown:
            raise DataError(f"{name} has {unknown[0]!r}, which would be ignored: remove it")
        missing = [key for key in ("role", "content") if key not in message]
        if missing:
            raise DataError(f"{name} has no {missing[0]!r}: a message is a role and a content")
        role, content = message["role"], _text(message["content"], f"{name}: content")
        if role not in ROLES:
            raise DataError(f"{name} has the role {role!r}: use one of {', '.join(ROLES)}")
        yield role, _filled(content, name) if role == ASSISTANT else content
    if all(message["role"] != ASSISTANT for message in messages):
        raise DataError(f"{where} has no message of the assistant: there is nothing to learn")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {type(value).__name__}, not a text: write it as a string")
    return valid(value)


def _filled(response: str, name: str) -> str:
    if not response.strip():
        raise DataError(f"{name} is empty: give a response or remove the record")
    return response
