"""A teacher behind an OpenAI-compatible server: prompts in, text out, over ``POST {url}/chat/completions``.

Owns the requests: one a sample with its own seed, a bounded number in flight, bounded jittered retries that honour
Retry-After, replies of bounded size. A prompt that is refused or answered in a wrong form costs its own row. What would
spoil all rows (no server, wrong key, wrong model, the first prompts all failing) stops the run with one line: no request
is begun then, and those in flight are waited for, because they are paid. How a reply reads is ``replies``' business. The
bearer key comes from the environment variable KD_TEACHER_API_KEY and from nowhere else.
"""

import asyncio
import logging
import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx

from kd_core.errors import TeacherError
from kd_core.fingerprint import fingerprint
from kd_core.prompts import messages_of
from kd_core.recipe import Answers, ServerTeacher, Task
from kd_core.recipe.addresses import check_address
from kd_core.teacher.replies import ServerAnswer, ServerError, read_body, read_reply, retry_after, server_message

__all__ = ["API_KEY_VARIABLE", "Session", "answer_prompts", "sample_seed"]

API_KEY_VARIABLE = "KD_TEACHER_API_KEY"
FIRST_ROWS = 8
"""Requests in flight until the first answer comes; if as many rows fail before it, the run stops."""
MAX_ATTEMPTS = 8
"""Tries a request: with 30% of requests failing, one row in 15,000 still fails."""
BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 8.0
"""Waits double from BACKOFF_SECONDS up to this, half of each at random: at most 32 s over all attempts."""
MAX_RETRY_AFTER_SECONDS = 120.0
"""A server that asks for a longer wait stops the run."""
ANSWER_SECONDS = 1800.0
"""For one request, whole: long reasoning takes many minutes."""
TIMEOUT = httpx.Timeout(connect=10.0, read=None, write=60.0, pool=None)
REPLY_BYTES = 64 * 2**10
REPLY_BYTES_A_TOKEN = 2**10
"""A reply holds at most REPLY_BYTES and this for each of max_tokens: a streamed token takes a few hundred bytes."""

_ROW_REFUSED = frozenset({400, 413, 414, 415, 422, 451})
_SERVER_AWAY = frozenset({408, 409, 425, 429, 502, 503, 504})
_LOG = logging.getLogger(__name__)


@dataclass
class Session:
    """What a run has learnt of its server so far.

    Attributes:
        proven: the server has answered a prompt of this run, so that a failure is its row's.
        failed: rows that failed.
        max_failed: rows that may fail before the run stops; None: any number.
        limit_field: under which name the server takes max_tokens.
    """

    proven: bool = False
    failed: int = 0
    max_failed: int | None = None
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"


@dataclass(frozen=True)
class _Retry:
    """Why an attempt failed; the least seconds the server asked us to wait; whether it is the server's trouble, and not this row's."""

    reason: str
    after_seconds: float = 0.0
    server_is_away: bool = False


@dataclass(frozen=True)
class _Stop:
    """Why the run must stop, and what to do."""

    reason: str


def answer_prompts(
    teacher: ServerTeacher,
    *,
    url: str,
    prompts: Sequence[tuple[str, int]],
    answers: Answers,
    task: Task,
    seed: int,
    concurrency: int,
    on_done: Callable[[tuple[int, ServerAnswer]], None],
    session: Session | None = None,
) -> list[ServerAnswer]:
    """Have the server answer every (prompt, sample index), at most ``concurrency`` requests in flight.

    Runs an event loop of its own: call it from a thread that has none running.

    Args:
        teacher: names the model.
        url: base URL, for example http://127.0.0.1:8000/v1.
        prompts: prompt, as ``kd_core.prompts.turns`` keeps it, and sample index; one request each.
        answers: temperature, top_p and max_tokens.
        task: its ``system`` message, if any, goes first where a prompt has none of its own.
        seed: base seed; each request carries ``sample_seed(seed, prompt, index)``.
        concurrency: requests in flight, at least 1.
        on_done: called with each row's number and answer as soon as it is there, also of those that come after an error.
        session: what earlier calls of this run have learnt of the server; None: nothing.

    Returns:
        One ServerAnswer a prompt, in the order given.

    Raises:
        RecipeError: the address is refused.
        TeacherError: the server cannot be reached, refuses the key or the model, asks for too long a wait, answers none of
            the first prompts, or fails on more rows than the session allows.
    """
    endpoint = check_address(url, field="run.teacher_url", instead=API_KEY_VARIABLE) + "/chat/completions"
    bodies = [
        {
            "model": teacher.model,
            "temperature": answers.temperature,
            "top_p": answers.top_p,
            "messages": messages_of(prompt, task),
            "seed": sample_seed(seed, prompt, index),
            "stream": False,
        }
        for prompt, index in prompts
    ]
    asking = _Asking(endpoint, _api_key(), answers.max_tokens, session or Session(), iter(enumerate(bodies)), on_done)
    return asyncio.run(asking.all(len(bodies), concurrency))


def sample_seed(seed: int, prompt: str, sample_index: int) -> int:
    """The seed of one request, in [0, 2^31): a function of the base seed, the prompt's text and the sample index only.

    >>> sample_seed(0, "1+1=", 0) == sample_seed(0, "1+1=", 0) != sample_seed(0, "1+1=", 1)
    True
    """
    return int(fingerprint([seed, prompt, sample_index])[:8], 16) >> 1


def _api_key() -> str:
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise TeacherError(f"{API_KEY_VARIABLE} holds signs that no header can carry; set it to the key alone")
    return key


@dataclass
class _Asking:
    """One call's rows, asked by workers side by side. The first reason to stop is kept and ends them all."""

    endpoint: str
    key: str
    max_tokens: int
    session: Session
    rows: Iterator[tuple[int, dict[str, Any]]]
    on_done: Callable[[tuple[int, ServerAnswer]], None]
    results: dict[int, ServerAnswer] = field(default_factory=dict)
    failure: str | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)  # the server is proven, or there is nothing left to wait for

    async def all(self, num_rows: int, concurrency: int) -> list[ServerAnswer]:
        headers = {"Accept-Encoding": "gzip", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        if self.session.proven:
            self.opened.set()
        try:
            async with httpx.AsyncClient(headers=headers, timeout=TIMEOUT, limits=limits) as client, asyncio.TaskGroup() as group:
                for number in range(min(concurrency, num_rows)):
                    group.create_task(self._work(client, number))
        except BaseExceptionGroup as failures:  # of the caller's ``on_done``: nothing more could be kept
            raise failures.exceptions[0] from None
        if self.failure is None and num_rows and not self.session.proven:
            self._stop(_none_answered(num_rows, self.results[0].error))
        if self.failure is not None:
            raise TeacherError(self.failure)
        return [self.results[row] for row in range(num_rows)]

    async def _work(self, client: httpx.AsyncClient, number: int) -> None:
        if number >= FIRST_ROWS:
            await self.opened.wait()
        for row, body in self.rows:
            answer = None if self.stopping.is_set() else await self._ask(client, body)
            if answer is None:
                return
            self.results[row] = answer
            self._count(answer)
            self.on_done((row, answer))
        self.opened.set()

    def _count(self, answer: ServerAnswer) -> None:
        session = self.session
        if answer.error is None:
            session.proven = True
            self.opened.set()
            return
        session.failed += 1
        if not session.proven and session.failed >= FIRST_ROWS:
            self._stop(_none_answered(session.failed, answer.error))
        elif session.proven and session.max_failed is not None and session.failed > session.max_failed:
            self._stop(f"{session.failed} rows have failed, more than run.max_failed_answers allows; the last one: {answer.error}")

    def _stop(self, reason: str) -> None:
        self.failure = self.failure or self._redacted(f"teacher at {self.endpoint}: {reason}")
        self.stopping.set()
        self.opened.set()

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> ServerAnswer | None:
        """One row: ask until there is an answer, a refusal of the row, or no attempt left. None: the run stops."""
        attempt = 1
        while isinstance(outcome := await self._attempt(client, body), _Retry):
            if outcome.after_seconds > MAX_RETRY_AFTER_SECONDS:
                outcome = _Stop(f"{outcome.reason}; it asks to wait {outcome.after_seconds:.0f} s: run again after that")
                break
            if attempt == MAX_ATTEMPTS:
                outcome = _given_up(outcome)
                break
            backoff = min(BACKOFF_SECONDS * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS)
            if await _stopped_within(self.stopping, outcome.after_seconds + backoff * random.uniform(0.5, 1.0)):
                return None
            attempt += 1
        if isinstance(outcome, _Stop):
            self._stop(outcome.reason)
            return None
        return outcome if outcome.error is None else replace(outcome, error=self._redacted(outcome.error))

    async def _attempt(self, client: httpx.AsyncClient, body: dict[str, Any]) -> ServerAnswer | _Retry | _Stop:
        limit_field = self.session.limit_field
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                async with client.stream("POST", self.endpoint, json={**body, limit_field: self.max_tokens}) as response:
                    bound = REPLY_BYTES + REPLY_BYTES_A_TOKEN * self.max_tokens
                    data = await read_body(response, bound)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return _Retry(f"cannot be reached ({error or type(error).__name__})", server_is_away=True)
        except TimeoutError:
            return _Retry(f"no answer within {ANSWER_SECONDS:.0f} s")
        except httpx.RequestError as error:
            return _Retry(f"the connection failed ({type(error).__name__}: {error})")
        except httpx.InvalidURL as error:
            return _Stop(f"{error}; correct run.teacher_url")
        except zlib.error:
            return _Retry("a reply was cut short")
        status, message = response.status_code, ""
        if status == 200:
            if len(data) > bound:
                return ServerAnswer(
                    "", "error", f"the reply is longer than the {bound:,} bytes that answers.max_tokens {self.max_tokens} allows"
                )
            found = read_reply(data, response.headers.get("content-type", ""))
            if not isinstance(found, ServerError):
                return found if found is not None else _Retry("a reply was cut short")
            status, message = found.status, found.message
        message = message or server_message(data)
        if status in _ROW_REFUSED and limit_field == "max_tokens" and "max_completion_tokens" in message:
            self._rename_limit()
            return await self._attempt(client, body)
        return self._refusal(status, message, retry_after(response), body["model"])

    def _rename_limit(self) -> None:
        if self.session.limit_field == "max_tokens":
            self.session.limit_field = "max_completion_tokens"
            _LOG.warning("the teacher takes max_completion_tokens in place of max_tokens: answers.max_tokens is sent under that name")

    def _refusal(self, status: int, message: str, after_seconds: float, model: str) -> ServerAnswer | _Retry | _Stop:
        """What an error status means: for this row, for a while, or for the run."""
        if status in _ROW_REFUSED or (status == 403 and self.session.proven):
            return ServerAnswer("", "error", f"HTTP {status}: {message}")
        if status >= 500 or status in _SERVER_AWAY:
            return _Retry(f"HTTP {status} ({message})", after_seconds, server_is_away=status in _SERVER_AWAY)
        return _Stop(f"HTTP {status} ({message}); {_advice(status, model, has_key=bool(self.key))}")

    def _redacted(self, text: str) -> str:
        """Servers echo keys in their messages; ours never go on into a log or an artifact."""
        return text.replace(self.key, "***") if self.key else text


async def _stopped_within(stopping: asyncio.Event, seconds: float) -> bool:
    """Wait; whether the run stopped meanwhile."""
    try:
        async with asyncio.timeout(seconds):
            return await stopping.wait()
    except TimeoutError:
        return False


def _given_up(last: _Retry) -> ServerAnswer | _Stop:
    """No attempt is left: without its server the run stops, another trouble may be this row's alone."""
    reason = f"{last.reason}, {MAX_ATTEMPTS} times in a row"
    if last.server_is_away:
        return _Stop(f"{reason}; start the server, or name another one with --set run.teacher_url=")
    return ServerAnswer("", "error", reason)


def _none_answered(num_rows: int, error: str | None) -> str:
    return (
        f"none of the first {num_rows} prompts was answered; one failed with: {error}; correct what it names (answers.max_tokens, "
        "answers.temperature, answers.top_p, task.system, teacher.model, run.teacher_url), then run again"
    )


def _advice(status: int, model: str, *, has_key: bool) -> str:
    if status in (401, 403):
        return f"the server wants another key: {API_KEY_VARIABLE} is {'set' if has_key else 'not set'}"
    if status == 404:
        return f"check that run.teacher_url ends where /chat/completions begins (often /v1) and that the server has a model {model!r}"
    return "this is not an answer of an OpenAI-compatible server; check run.teacher_url"
