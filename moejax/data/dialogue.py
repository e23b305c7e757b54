"""Documents of which only the responses are scored: pairs and conversations, as runs of tokens.

A *run* is text that is tokenised on its own, or one token, and either scored or not. Runs are the
definition of both the tokens and the mask: no token crosses from a prompt into a response, as
none can when the model answers a prompt that was tokenised before the answer existed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moejax.data.chat_layout import laid_out
from moejax.data.chat_template import ChatTemplate
from moejax.data.errors import DataError
from moejax.data.fingerprint import fingerprint
from moejax.data.tokenizer import Tokenizer

FORMAT = 2  # part of every fingerprint: raise it when the same record would give other tokens

ASSISTANT = "assistant"
_FIRST, _AFTER_TEXT, _AFTER_SPECIAL = "first", "after text", "after special"  # where text lies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt and the response to it, verbatim; `where` is the record's file and line."""

    prompt: str
    response: str
    where: str

    @property
    def text(self) -> str:
        return self.prompt + self.response

    @property
    def responses(self) -> str:
        return self.response


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns (role, content); those of the assistant are scored. `where` is file and line."""

    messages: tuple[tuple[str, str], ...]
    where: str

    @property
    def text(self) -> str:
        return "\n".join(content for _, content in self.messages)

    @property
    def responses(self) -> str:
        return "\n".join(content for role, content in self.messages if role == ASSISTANT)


Dialogue = Pair | Conversation


@dataclasses.dataclass(frozen=True)
class Run:
    """Text that is tokenised on its own, or the id of one token."""

    content: str | int
    scored: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """A dialogue's tokens `ids` int32 [n]; `scored` bool [n + 1], with its end token; its bytes.

    `num_bytes` are the UTF-8 bytes that the scored tokens stand for.
    """

    ids: np.ndarray
    scored: np.ndarray
    num_bytes: int


def chat_fingerprint(tokenizer: Tokenizer) -> str:
    """Changes when the same conversation would give other runs."""
    template = tokenizer.chat
    return fingerprint("dialogue", FORMAT, None if template is None else template.spec())


def encoded(dialogues: Sequence[Dialogue], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokens and masks of dialogues. Raises DataError where the template refuses one."""
    runs = [runs_of(dialogue, tokenizer) for dialogue in dialogues]
    size_of, eos = tokenizer.token_bytes(), tokenizer.eos_id
    out = []
    for dialogue, own, parts in zip(dialogues, runs, _ids(runs, tokenizer), strict=True):
        tokens = np.concatenate(parts)
        scored = np.repeat([run.scored for run in own], [len(part) for part in parts])
        tokens, scored = _between_ends(tokens, scored, eos)
        if not scored[:-1].any():
            raise DataError(f"{dialogue.where}: the tokenizer gives no token for the response")
        num_bytes = sum(_num_bytes(run.content, size_of) for run in own if run.scored)
        out.append(Encoded(ids=tokens, scored=scored, num_bytes=num_bytes))
    return out


def _ids(runs: Sequence[list[Run]], tokenizer: Tokenizer) -> list[list[np.ndarray]]:
    """The ids of every run: texts are encoded by what they follow, all of a kind at once."""
    kinds = [[_kind(own, at) for at in range(len(own))] for own in runs]
    texts: dict[str, list[str]] = {_FIRST: [], _AFTER_TEXT: [], _AFTER_SPECIAL: []}
    for own, named in zip(runs, kinds, strict=True):
        for run, kind in zip(own, named, strict=True):
            if kind is not None:
                texts[kind].append(run.content)
    found = {
        _FIRST: iter(tokenizer.encode_batch(texts[_FIRST])),
        _AFTER_TEXT: iter(tokenizer.encode_inside(texts[_AFTER_TEXT], after_special=False)),
        _AFTER_SPECIAL: iter(tokenizer.encode_inside(texts[_AFTER_SPECIAL], after_special=True)),
    }
    return [
        [
            np.array([run.content], np.int32) if kind is None else next(found[kind])
            for run, kind in zip(own, named, strict=True)
        ]
        for own, named in zip(runs, kinds, strict=True)
    ]


def _kind(own: list[Run], at: int) -> str | None:
    """What the run follows, if it is text."""
    if isinstance(own[at].content, int):
        return None
    if at == 0:
        return _FIRST
    return _AFTER_TEXT if isinstance(own[at - 1].content, str) else _AFTER_SPECIAL


def runs_of(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Run]:
    """The runs of a pair (its two texts) or of a conversation (as the chat template lays it out).

    Adjacent text that is scored alike is one run, cut only at the template's special tokens. What
    a message spells is text, never a special token.
    """
    if isinstance(dialogue, Pair):
        pieces = [Run(dialogue.prompt, False), Run(dialogue.response, True)]
    elif tokenizer.chat is None:
        pieces = _default(dialogue.messages, tokenizer.eos_id)
    else:
        pieces = _by_template(tokenizer.chat, dialogue, tokenizer.special_ids())
        pieces = _stripped(pieces, tokenizer.takes_blanks())
    return _joined(pieces)


def _default(messages: Sequence[tuple[str, str]], eos_id: int) -> list[Run]:
    """`<|role|>` and the content on lines of their own; the end token closes every response.

    The format of Tulu (Wang et al., "How Far Can Camels Go?", arXiv 2306.04751, section 3.2), for
    tokenizers that have no template.
    """
    out = []
    for number, (role, content) in enumerate(messages):
        opening = f"<|{role}|>\n" if number == 0 else f"\n<|{role}|>\n"
        out += [Run(opening, False), Run(content, role == ASSISTANT)]
        if role == ASSISTANT:
            out.append(Run(eos_id, True))
    return out


def _by_template(
    template: ChatTemplate, conversation: Conversation, special_ids: Mapping[str, int]
) -> list[Run]:
    out = []
    for piece in laid_out(template, conversation.messages, tuple(special_ids), conversation.where):
        if piece.own:  # the template's own text: its special tokens are tokens
            found = piece.text if piece.special is None else special_ids[piece.special]
            out.append(Run(found, piece.scored))
        else:
            out.append(Run(piece.text, piece.scored))
    return out


def _stripped(
    pieces: Sequence[Run], takes_blanks: Mapping[int, tuple[bool, bool]]
) -> Sequence[Run]:
    """The runs without the blanks that special tokens beside them take in."""
    for forward in (True, False):
        out: list[Run] = []
        taking = False
        for piece in pieces if forward else reversed(pieces):
            if isinstance(piece.content, int):
                left, right = takes_blanks.get(piece.content, (False, False))
                taking = right if forward else left
            elif taking:
                text = piece.content.lstrip() if forward else piece.content.rstrip()
                piece, taking = Run(text, piece.scored), not text
            out.append(piece)
        pieces = out if forward else out[::-1]
    return pieces


def _joined(pieces: Sequence[Run]) -> list[Run]:
    """Neighbouring texts that are scored alike, put together; empty ones left out."""
    out: list[Run] = []
    for piece in pieces:
        last = out[-1] if out else None
        if piece.content == "":
            continue
        texts = isinstance(piece.content, str) and last and isinstance(last.content, str)
        if texts and last.scored == piece.scored:
            out[-1] = Run(last.content + piece.content, piece.scored)
        else:
            out.append(piece)
    return out


def _between_ends(ids: np.ndarray, scored: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, scored with the end): every document has the end token on both sides already.

    The end is scored where the last token is: a response must learn to stop.
    """
    if len(ids) > 1 and ids[0] == eos:
        ids, scored = ids[1:], scored[1:]
    end = scored[-1]
    if ids[-1] == eos:
        ids, scored = ids[:-1], scored[:-1]
    return ids, np.append(scored, end)


def _num_bytes(content: str | int, size_of: np.ndarray) -> int:
    return len(content.encode()) if isinstance(content, str) else int(size_of[content])
