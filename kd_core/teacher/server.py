"""A teacher behind an OpenAI-compatible server: prompts in, text out, over ``POST {url}/chat/completions``.

Owns the protocol: one request a sample with its own seed, a bounded number in flight, bounded jittered retries that
honour Retry-After. A prompt that the server refuses costs its own row; everything that would spoil all rows (no server,
wrong key, wrong model, another protocol) is a TeacherError at once. Refuses link-local and metadata addresses, redirects
and addresses with a password. The bearer key comes from the environment variable KD_TEACHER_API_KEY and from nowhere else.
"""

import asyncio
import ipaddress
import os
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeGuard
from urllib.parse import urlsplit

import httpx

from kd_core.errors import TeacherError
from kd_core.fingerprint import fingerprint
from kd_core.recipe import Answers, ServerTeacher, Task

__all__ = ["API_KEY_VARIABLE", "ServerAnswer", "answer_prompts", "check_url", "sample_seed"]

API_KEY_VARIABLE = "KD_TEACHER_API_KEY"
MAX_ATTEMPTS = 8
"""Tries a request: with 30% of requests failing, one row in 15,000 still fails."""
BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 8.0
"""Waits double from BACKOFF_SECONDS up to this, half of each at random: at most 32 s over all attempts."""
MAX_RETRY_AFTER_SECONDS = 120.0
TIMEOUT = httpx.Timeout(connect=10.0, read=1800.0, write=60.0, pool=None)
"""An answer arrives in one piece, so reading waits for a whole generation: long reasoning takes many minutes."""

_ROW_REFUSED = frozenset({400, 413, 422})
_RETRIED = frozenset({408, 409, 425, 429})
_METADATA_HOSTS = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"})
_METADATA_ADDRESSES = frozenset({ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")})


@dataclass(frozen=True)
class ServerAnswer:
    """One answer of the server, or the reason why this row has none.

    Attributes:
        text: the answer; reasoning that the server returned apart stands in front, in <think> tags. Empty on error.
        finish_reason: stop (the end token), length (met max_tokens), or error.
        error: the server's message where finish_reason is error, else None.
        prompt_tokens: tokens of the prompt as the server counts them; None where it does not say.
        completion_tokens: generated tokens as the server counts them; None where it does not say.
    """

    text: str
    finish_reason: Literal["stop", "length", "error"]
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class _Retry:
    """Why an attempt failed, and the least seconds the server asked us to wait."""

    reason: str
    after_seconds: float = 0.0


def answer_prompts(
    teacher: ServerTeacher,
    *,
    url: str,
    prompts: Sequence[tuple[str, int]],
    answers: Answers,
    task: Task,
    seed: int,
    concurrency: int,
    on_done: Callable[[int], None],
) -> list[ServerAnswer]:
    """Have the server answer every (prompt, sample index), at most ``concurrency`` requests in flight.

    Runs an event loop of its own: call it from a thread that has none running.

    Args:
        teacher: names the model.
        url: base URL, for example http://127.0.0.1:8000/v1.
        prompts: prompt text and sample index; one request each.
        answers: temperature, top_p and max_tokens.
        task: its ``system`` message, if any, goes first.
        seed: base seed; each request carries ``sample_seed(seed, prompt, index)``.
        concurrency: requests in flight, at least 1.
        on_done: called after each finished row with the number of rows finished so far.

    Returns:
        One ServerAnswer a prompt, in the order given.

    Raises:
        TeacherError: the address is refused or cannot be reached, the key or model is refused, the server goes on failing
            after all retries, or it does not speak the protocol. Requests in flight are dropped.
    """
    endpoint = check_url(url) + "/chat/completions"
    sampling = {"temperature": answers.temperature, "top_p": answers.top_p, "max_tokens": answers.max_tokens}
    system = [] if task.system is None else [{"role": "system", "content": task.system}]
    bodies = [
        {
            "model": teacher.model,
            **sampling,
            "messages": [*system, {"role": "user", "content": prompt}],
            "seed": sample_seed(seed, prompt, index),
        }
        for prompt, index in prompts
    ]
    return asyncio.run(_ask_all(endpoint, bodies, concurrency, on_done))


def sample_seed(seed: int, prompt: str, sample_index: int) -> int:
    """The seed of one request, in [0, 2^31): a function of the base seed, the prompt's text and the sample index only.

    >>> sample_seed(0, "1+1=", 0) == sample_seed(0, "1+1=", 0) != sample_seed(0, "1+1=", 1)
    True
    """
    return int(fingerprint([seed, prompt, sample_index])[:8], 16) >> 1


# ---------------------------------------------------------------------------------------------- the address


def check_url(url: str) -> str:
    """The base URL without a trailing slash, or a refusal.

    A name is resolved and every address it stands for is checked; a name that does not resolve here is left to the
    request itself (a proxy may know it).

    Raises:
        TeacherError: not http(s), no host, a password in it, or a link-local or metadata address.

    >>> check_url("http://127.0.0.1:8000/v1/")
    'http://127.0.0.1:8000/v1'
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip(".").lower(), parts.port
    except ValueError as error:
        raise TeacherError(f"run.teacher_url: {url!r} is not an address ({error}); use one like http://127.0.0.1:8000/v1") from error
    if parts.username is not None or parts.password is not None:
        raise TeacherError(
            f"run.teacher_url: the address of host {host!r} carries a password; put a bearer key in {API_KEY_VARIABLE} instead"
        )
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise TeacherError(
            f"run.teacher_url: {url!r} is refused; use a plain base URL like http://127.0.0.1:8000/v1 (http or https, no query)"
        )
    if host in _METADATA_HOSTS:
        raise TeacherError(f"run.teacher_url: {url} is a cloud metadata address, which never is a teacher; name the server itself")
    for address in _addresses(host, port or 443):
        if address.is_link_local or address in _METADATA_ADDRESSES:
            raise TeacherError(f"run.teacher_url: {url} is the link-local or metadata address {address}; name the server's own address")
    return url.rstrip("/")


def _addresses(host: str, port: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        infos = socket.getaddrinfo(host.split("%")[0], port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = [ipaddress.ip_address(str(info[4][0]).split("%")[0]) for info in infos]
    return [a.ipv4_mapped if isinstance(a, ipaddress.IPv6Address) and a.ipv4_mapped else a for a in addresses]


# ---------------------------------------------------------------------------------------------- requests


async def _ask_all(endpoint: str, bodies: list[dict[str, Any]], concurrency: int, on_done: Callable[[int], None]) -> list[ServerAnswer]:
    key = os.environ.get(API_KEY_VARIABLE, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    results: dict[int, ServerAnswer] = {}
    todo = iter(enumerate(bodies))

    async def work(client: httpx.AsyncClient) -> None:
        for i, body in todo:
            results[i] = await _ask(client, endpoint, body)
            on_done(len(results))

    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    try:
        async with httpx.AsyncClient(headers=headers, timeout=TIMEOUT, limits=limits) as client, asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(bodies))):
                group.create_task(work(client))
    except BaseExceptionGroup as failures:
        raise _without_key(failures.exceptions[0], key) from None
    return [
        answer if answer.error is None else ServerAnswer("", "error", _redact(answer.error, key))
        for answer in (results[i] for i in range(len(bodies)))
    ]


async def _ask(client: httpx.AsyncClient, endpoint: str, body: dict[str, Any]) -> ServerAnswer:
    """One row: ask until there is an answer, a refusal of the row, or no attempt left."""
    attempt = 1
    while isinstance(outcome := await _attempt(client, endpoint, body), _Retry):
        if outcome.after_seconds > MAX_RETRY_AFTER_SECONDS:
            raise TeacherError(
                f"teacher at {endpoint}: {outcome.reason}; it asks to wait {outcome.after_seconds:.0f} s: run again after that"
            )
        if attempt == MAX_ATTEMPTS:
            raise TeacherError(
                f"teacher at {endpoint}: {outcome.reason}, {attempt} times in a row; "
                "start the server, or name another one with --set run.teacher_url="
            )
        backoff = min(BACKOFF_SECONDS * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS)
        await asyncio.sleep(outcome.after_seconds + backoff * random.uniform(0.5, 1.0))
        attempt += 1
    return outcome


async def _attempt(client: httpx.AsyncClient, endpoint: str, body: dict[str, Any]) -> ServerAnswer | _Retry:
    try:
        response = await client.post(endpoint, json=body)
    except httpx.ReadTimeout as error:
        raise TeacherError(f"teacher at {endpoint}: no answer within {TIMEOUT.read:.0f} s; lower answers.max_tokens or the load") from error
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        return _Retry(f"cannot be reached ({error or type(error).__name__})")
    except httpx.RequestError as error:
        return _Retry(f"the connection failed ({type(error).__name__}: {error})")
    status = response.status_code
    if status == 200:
        return _parse(endpoint, response)
    message = _server_message(response)
    if status in _ROW_REFUSED:
        return ServerAnswer("", "error", f"HTTP {status}: {message}")
    if status >= 500 or status in _RETRIED:
        return _Retry(f"HTTP {status} ({message})", _retry_after(response))
    raise TeacherError(f"teacher at {endpoint}: HTTP {status} ({message}); {_advice(status, body['model'])}")


def _advice(status: int, model: str) -> str:
    if status in (401, 403):
        found = "is set" if os.environ.get(API_KEY_VARIABLE) else "is not set"
        return f"the server wants another key: {API_KEY_VARIABLE} {found}"
    if status == 404:
        return f"check that run.teacher_url ends where /chat/completions begins (often /v1) and that the server has a model {model!r}"
    return "this is not an answer of an OpenAI-compatible server; check run.teacher_url"


def _retry_after(response: httpx.Response) -> float:
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


# ---------------------------------------------------------------------------------------------- replies


def _parse(endpoint: str, response: httpx.Response) -> ServerAnswer | _Retry:
    """A 200 reply as an answer; a body cut short is asked for again, another protocol is an error."""
    try:
        reply = response.json()
    except ValueError:
        if "json" in response.headers.get("content-type", ""):
            return _Retry("a reply was cut short")
        reply = None
    choice = reply["choices"][0] if _is_object(reply) and isinstance(reply.get("choices"), list) and reply["choices"] else None
    message = choice.get("message") if _is_object(choice) else None
    if not _is_object(choice) or not _is_object(message):
        raise TeacherError(f"teacher at {endpoint}: the reply is no chat completion: {response.text[:200]!r}; check run.teacher_url")
    content, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise TeacherError(f"teacher at {endpoint}: content is a {type(content).__name__}, expected text; use a text-only model")
    usage = reply.get("usage") if _is_object(reply.get("usage")) else {}
    return _answer(_join(reasoning, content), choice.get("finish_reason"), usage)


def _answer(text: str, finish_reason: object, usage: dict[str, Any]) -> ServerAnswer:
    if finish_reason not in ("stop", "length"):
        return ServerAnswer("", "error", f"the server ended the answer with finish_reason {finish_reason!r}; expected 'stop' or 'length'")
    try:
        text.encode()
    except UnicodeEncodeError:
        return ServerAnswer("", "error", "the answer is not valid Unicode (a lone surrogate)")
    reason: Literal["stop", "length"] = "stop" if finish_reason == "stop" else "length"
    return ServerAnswer(text, reason, None, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _join(reasoning: str, content: str) -> str:
    """Put reasoning that a server's parser took out back in front of the content; a thought cut off stays open."""
    if not reasoning:
        return content
    return f"<think>\n{reasoning}\n</think>\n\n{content}" if content else f"<think>\n{reasoning}"


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _server_message(response: httpx.Response) -> str:
    """The message of an error reply in its usual forms ({error: {message}}, {message}, {detail}), else its first text."""
    try:
        reply = response.json()
    except ValueError:
        reply = None
    if _is_object(reply):
        error = reply.get("error")
        for found in (error.get("message") if _is_object(error) else error, reply.get("message"), reply.get("detail")):
            if found:
                return str(found)[:500]
    return response.text.strip()[:200] or "no message"


def _is_object(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _redact(text: str, key: str) -> str:
    return text.replace(key, "***") if key else text


def _without_key(error: BaseException, key: str) -> BaseException:
    """Servers echo keys in their messages; ours never go on into a log or an artifact."""
    return TeacherError(_redact(str(error), key)) if isinstance(error, TeacherError) else error
