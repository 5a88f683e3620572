"""Conversations as clients send them, to plain messages of text."""

import reprlib
from collections.abc import Sequence
from typing import Any

from dsmoe_ray.serving.openai_api.errors import ApiError

_ROLES = ("system", "developer", "user", "assistant", "tool")
_UNSERVED = ("tool_calls", "function_call", "audio")


def read_messages(values: Sequence[Any]) -> list[dict[str, str]]:
    """Return role, content and, if given, name of each message.

    Raises:
        ApiError: one of them is no message, or is more than text.
    """
    if not values:
        raise ApiError("messages is empty. Give at least one message.", param="messages")
    return [_read_message(value, f"messages[{idx}]") for idx, value in enumerate(values)]


def _read_message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ApiError(f"{where} must be an object with role and content; found {reprlib.repr(value)}.", param=where)
    role = value.get("role")
    if role not in _ROLES:
        raise ApiError(
            f"{where}.role must be one of {', '.join(_ROLES)}; found {reprlib.repr(role)}.", param=f"{where}.role"
        )
    for unserved in _UNSERVED:
        if value.get(unserved):
            raise ApiError(f"{where}.{unserved} is not supported here. Leave it out.", param=f"{where}.{unserved}")
    message: dict[str, str] = {"role": role, "content": _read_content(value.get("content"), f"{where}.content", role)}
    name = value.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise ApiError(f"{where}.name must be a string; found {reprlib.repr(name)}.", param=f"{where}.name")
        message["name"] = name
    return message


def _read_content(value: Any, where: str, role: str) -> str:
    if isinstance(value, str):
        return value
    if value is None and role == "assistant":
        return ""
    if not isinstance(value, list):
        raise ApiError(f"{where} must be a text, or a list of texts; found {reprlib.repr(value)}.", param=where)
    texts = []
    for idx, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ApiError(
                f'{where}[{idx}] must be {{"type": "text", "text": ...}}: this model reads text only; found '
                f"{reprlib.repr(part)}.",
                param=f"{where}[{idx}]",
            )
        texts.append(text)
    return "\n".join(texts)
