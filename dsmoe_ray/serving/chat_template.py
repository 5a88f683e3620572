"""A conversation to a prompt, by the template that the model was published with.

The template runs in a sandbox: it reads messages and nothing else, not even the clock, so that the same conversation is
always the same prompt. What people write is text also where it spells a special token of the model: only the template
itself can place one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsmoe_ray.data.tokenizer import TextTokenizer
from dsmoe_ray.errors import ArtifactError, RequestError

Message = Mapping[str, str]
"""``role``, ``content`` and perhaps ``name``."""

_GUARD = "\ue000"
"""A character of private use, put into names of special tokens that people write while the template runs."""


class _GenerationTag(Extension):
    """Lets ``{% generation %}``, which marks answers for training, pass."""

    tags = {"generation"}  # noqa: RUF012 - so says jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """The chat template of one model."""

    def __init__(self, source: str, tokenizer: TextTokenizer, *, origin: str, bos_token: str = "") -> None:
        """Compile a template.

        Args:
            source: In Jinja.
            tokenizer: The model's.
            origin: Names the template in errors.
            bos_token: What the template may start a conversation with.

        Raises:
            ArtifactError: it is none.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ArtifactError(f"{origin}: the chat template cannot be used: {error}. Write it anew.") from error
        self.source = source
        self._tokenizer = tokenizer
        names = sorted(tokenizer.special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._knows_developer = "developer" in source
        self._named = {
            "bos_token": bos_token,
            "eos_token": tokenizer.backend.id_to_token(tokenizer.end_of_text_id) or "",
            "tools": None,
            "documents": None,
        }

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the tokens of a conversation; with ``add_generation_prompt`` the next ones are the answer's.

        Raises:
            RequestError: the template does not take these messages.
        """
        text = self._render([self._guard(message) for message in messages], add_generation_prompt)
        if _GUARD not in text:
            return self._tokenizer.encode_with_special(text)
        ids: list[int] = []
        start = 0
        for found in self._special.finditer(text):
            ids += self._encode_text(text[start : found.start()])
            ids.append(self._tokenizer.special_ids[found[0]])
            start = found.end()
        return ids + self._encode_text(text[start:])

    def _guard(self, message: Message) -> dict[str, str]:
        guarded = {
            name: self._special.sub(lambda found: f"{found[0][0]}{_GUARD}{found[0][1:]}", value.replace(_GUARD, ""))
            for name, value in message.items()
        }
        if guarded["role"] == "developer" and not self._knows_developer:
            guarded["role"] = "system"
        return guarded

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._named,
            )
        # What a template does with messages that it does not expect may raise anything.
        except Exception as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error

    def _encode_text(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text.replace(_GUARD, ""))] if text else []


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)
