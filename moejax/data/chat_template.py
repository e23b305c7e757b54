"""Chat templates: the Jinja text beside a tokenizer that lays a conversation out."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from moejax.data.errors import DataError

_JINJA_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"

Messages = Sequence[tuple[str, str]]  # (role, content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A Jinja template and the special tokens it may name (`bos_token`, ...), sorted by name."""

    text: str
    tokens: tuple[tuple[str, str], ...]

    def spec(self) -> dict:
        """JSON-able; `from_spec` is the inverse."""
        return {"text": self.text, "tokens": dict(self.tokens)}

    @classmethod
    def from_spec(cls, spec: dict) -> ChatTemplate:
        return cls(text=spec["text"], tokens=tuple(sorted(spec["tokens"].items())))

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The conversation as one text. Raises DataError where the template refuses it."""
        values = [{"role": role, "content": content} for role, content in messages]
        try:
            return _compiled(self.text).render(
                messages=values,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **dict(self.tokens),
            )
        except Exception as error:  # the template is a program of somebody else's
            roles = ", ".join(role for role, _ in messages)
            raise DataError(
                f"the chat template cannot lay out the roles {roles} ({error}): change the record "
                "or the template"
            ) from error


def read(folder: pathlib.Path) -> ChatTemplate | None:
    """The template of a Hugging Face tokenizer's folder, or None where it has none.

    Raises DataError where tokenizer_config.json holds something else in its place.
    """
    config = {}
    if (folder / _CONFIG).is_file():
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{str(folder / _CONFIG)!r} is not JSON: {error}") from error
    text = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(text, list):  # several, by name
        text = {one.get("name"): one.get("template") for one in text}.get("default")
    if (folder / _JINJA_FILE).is_file():
        text = (folder / _JINJA_FILE).read_text(encoding="utf-8")
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(f"chat_template in {str(folder / _CONFIG)!r} is not a text")
    named = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
    tokens = {name: value for name, value in named.items() if value is not None}
    return ChatTemplate(text=text, tokens=tuple(sorted(tokens.items())))


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> Any:
    """The template, in a sandbox that can change nothing, as transformers sets it up.

    `strftime_now` is left out: the same file must give the same tokens tomorrow.
    """
    try:
        import jinja2
        from jinja2 import ext, sandbox
    except ImportError as error:
        raise DataError(
            "this tokenizer has a chat template, which needs jinja2: pip install 'moejax[chat]'"
        ) from error

    class Generation(ext.Extension):
        """`{% generation %}`, with which some templates mark responses, changes no text."""

        tags = {"generation"}  # noqa: RUF012 - jinja's interface

        def parse(self, parser: Any) -> list:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    return environment.from_string(text)
