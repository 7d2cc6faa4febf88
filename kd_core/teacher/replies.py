"""What a reply of an OpenAI-compatible server says: an answer, an error, or nothing that can be read.

Servers differ: an error body under status 200, content as a list of parts, reasoning apart, a stream that nobody asked
for, other words for 'stop'. Whatever holds an answer is read; anything else costs its own row, with the reason.
"""

import json
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeGuard

import httpx

__all__ = ["ServerAnswer", "ServerError", "read_body", "read_reply", "retry_after", "server_message"]

_FINISHED: dict[object, Literal["stop", "length"]] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_length"), "length"),
}


@dataclass(frozen=True)
class ServerAnswer:
    """One answer of the server, or the reason why this row has none.

    Attributes:
        text: the answer; reasoning that the server returned apart stands in front, in <think> tags. Empty on error.
        finish_reason: stop (the end token), length (met max_tokens), or error.
        error: the reason where finish_reason is error, else None.
        prompt_tokens: tokens of the prompt as the server counts them; None where it does not say.
        completion_tokens: generated tokens as the server counts them; None where it does not say.
    """

    text: str
    finish_reason: Literal["stop", "length", "error"]
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class ServerError:
    """An error that a reply of status 200 carries: the status it stands for, and the server's words."""

    status: int
    message: str


async def read_body(response: httpx.Response, bound: int) -> bytes:
    """The body, unpacked; of a longer one than ``bound`` the first bytes, at least one more than that.

    Raises:
        zlib.error: it is packed wrongly, or cut.
    """
    packed = response.headers.get("content-encoding", "identity") in ("gzip", "x-gzip", "deflate")
    unpack, data = zlib.decompressobj(wbits=47), bytearray()
    async for piece in response.aiter_raw():
        data += unpack.decompress(piece, bound + 1 - len(data)) if packed else piece
        if len(data) > bound:
            return bytes(data)
    if packed and data and not unpack.eof:
        raise zlib.error("the packed body has no end")
    return bytes(data)


def retry_after(response: httpx.Response) -> float:
    """Seconds of the Retry-After header, a number or a date; 0 without one."""
    value = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def read_reply(data: bytes, content_type: str) -> ServerAnswer | ServerError | None:
    """A reply of status 200; None if it was cut short.

    >>> read_reply(b'{"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]}', "application/json").text
    '4'
    """
    stream = "event-stream" in content_type or data.lstrip().startswith(b"data:")
    try:
        reply = _joined_stream(data) if stream else json.loads(data)
        if stream and reply is None:
            return None
        return _read_object(reply, data, ended="the stream" if stream else "the server")
    except RecursionError:
        return _failed("the reply is nested too deeply")
    except TypeError as error:
        return _failed(f"{error}; expected text")
    except ValueError:
        return None if stream or "json" in content_type else _failed(_no_completion(data))


def server_message(data: bytes) -> str:
    """The message of an error reply in its usual forms ({error: {message}}, {message}, {detail}), else its first text."""
    try:
        return _message(json.loads(data)) or _excerpt(data) or "no message"
    except (ValueError, RecursionError):
        return _excerpt(data) or "no message"


def _read_object(reply: object, data: bytes, *, ended: str) -> ServerAnswer | ServerError:
    choices = reply.get("choices") if _is_object(reply) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if _is_object(choice) else None
    if _is_object(reply) and reply.get("error") and not _is_object(message):
        return ServerError(_status(reply["error"]), _message(reply) or _excerpt(data))
    if _is_object(choice) and choice.get("error"):
        return ServerError(_status(choice["error"]), _message(choice) or _excerpt(data))
    if not _is_object(reply) or not _is_object(choice) or not _is_object(message):
        return _failed(_no_completion(data))
    thought, content = _texts(message.get("content"))
    apart = "".join(_texts(message.get("reasoning_content") or message.get("reasoning")))
    finish = choice.get("finish_reason")
    if not isinstance(finish, str) or finish not in _FINISHED:
        return _failed(f"{ended} ended the answer with finish_reason {str(finish)[:100]!r}; expected 'stop' or 'length'")
    if message.get("content") is None and not apart:
        return _failed(f"the message holds no content: {str(message.get('refusal') or message)[:200]}")
    return _answer(_join(apart + thought, content), _FINISHED[finish], reply.get("usage"))


def _answer(text: str, finish: Literal["stop", "length"], usage: object) -> ServerAnswer:
    try:
        text.encode()
    except UnicodeEncodeError:
        return _failed("the answer is not valid Unicode (a lone surrogate)")
    counts = usage if _is_object(usage) else {}
    return ServerAnswer(text, finish, None, _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens")))


def _texts(content: object) -> tuple[str, str]:
    """(thought, text) of a content: none, text, or a list of parts.

    Raises:
        TypeError: it is something else; the message says what.
    """
    if content is None or isinstance(content, str):
        return "", content or ""
    if not isinstance(content, list):
        raise TypeError(f"content is a {type(content).__name__}")
    thoughts, texts = [], []
    for part in content:
        kind = part.get("type") if _is_object(part) else None
        if isinstance(part, str):
            texts.append(part)
        elif _is_object(part) and kind in ("thinking", "reasoning"):
            thoughts.append("".join(_texts(part.get(kind) or part.get("text"))))
        elif _is_object(part) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise TypeError(f"content has a part of type {str(kind)[:100]!r}")
    return "".join(thoughts), "".join(texts)


def _joined_stream(data: bytes) -> object:
    """The events of a stream as one reply; None if the stream has no end.

    Raises:
        ValueError: an event is not JSON.
    """
    thoughts, texts = list[str](), list[str]()
    finish, usage, done = None, None, False
    for line in data.decode().split("\n"):
        event = line.strip().removeprefix("data:").strip()
        if not line.startswith("data:") or not event:
            continue
        if event == "[DONE]":
            done = True
            break
        said = json.loads(event)
        if not _is_object(said) or said.get("error"):
            return said
        usage = said.get("usage") or usage
        choices = said.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not _is_object(choice):
            continue
        finish = choice.get("finish_reason") or finish
        delta = choice["delta"] if _is_object(choice.get("delta")) else {}
        thoughts += _texts(delta.get("reasoning_content") or delta.get("reasoning"))
        for found, part in zip((thoughts, texts), _texts(delta.get("content")), strict=True):
            found.append(part)
    if not done and finish is None:
        return None
    return {"choices": [{"message": {"reasoning": "".join(thoughts), "content": "".join(texts)}, "finish_reason": finish}], "usage": usage}


def _join(reasoning: str, content: str) -> str:
    """Put reasoning that a server's parser took out back in front of the content; a thought cut off stays open."""
    if not reasoning:
        return content
    return f"<think>\n{reasoning}\n</think>\n\n{content}" if content else f"<think>\n{reasoning}"


def _status(error: object) -> int:
    """The HTTP status that an error body stands for: its code, or 400 where its words say that the request is at fault, else 500."""
    code = error.get("code") if _is_object(error) else None
    if isinstance(code, (int, str)) and str(code).isdecimal() and 400 <= int(code) < 600:
        return int(code)
    words = f"{code} {error.get('type')}" if _is_object(error) else ""
    return 400 if any(word in words for word in ("invalid", "unsupported", "context_length", "content_filter", "BadRequest")) else 500


def _message(reply: object) -> str:
    if not _is_object(reply):
        return ""
    error = reply.get("error")
    said = (error.get("message") if _is_object(error) else error, reply.get("message"), reply.get("detail"))
    return next((str(found)[:500] for found in said if found), "")


def _excerpt(data: bytes) -> str:
    return data[:400].decode(errors="replace").strip()[:200]


def _no_completion(data: bytes) -> str:
    return f"the reply is no chat completion: {_excerpt(data)!r}"


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _failed(reason: str) -> ServerAnswer:
    return ServerAnswer("", "error", reason)


def _is_object(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)
