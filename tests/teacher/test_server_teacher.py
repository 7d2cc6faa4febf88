"""The server teacher against a real HTTP server in a thread that speaks the protocol, with injected failures."""

import gzip
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kd_core.errors import RecipeError, TeacherError
from kd_core.prompts.turns import Turn, prompt_text
from kd_core.recipe import Answers, ServerTeacher, Task
from kd_core.teacher import server as module
from kd_core.teacher.replies import ServerAnswer
from kd_core.teacher.server import Session, answer_prompts, sample_seed

Reply = tuple[int, dict[str, str], bytes]
TEACHER = ServerTeacher(kind="server", model="big", revision="2026-01-01")
TASK = Task(template="chat", system="Be brief.", verifier="exact")
SAMPLING = Answers(num_samples=2, temperature=0.7, top_p=0.9, max_tokens=64)


def completion(content: Any, finish_reason: str | None = "stop", **message: Any) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    reply = {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    return 200, {"content-type": "application/json"}, json.dumps(reply).encode()


def failure(status: int, message: str = "injected", **headers: str) -> Reply:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps({"error": {"message": message}}).encode()


@dataclass
class Teacher:
    """What the server saw, and how it replies: a function of the request's body and how often this body came."""

    reply: Callable[[dict[str, Any], int], Reply | None]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    in_flight: int = 0
    most_in_flight: int = 0
    url: str = ""


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # with the default of 5, the sixth client at once waits for a second


@contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply | None]) -> Iterator[Teacher]:
    teacher = Teacher(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            body = json.loads(raw)
            with teacher.lock:
                count = teacher.seen[raw.decode()]
                teacher.seen[raw.decode()] += 1
                teacher.bodies.append(body)
                teacher.headers.append({k.lower(): v for k, v in self.headers.items()})
                teacher.times.append(time.monotonic())
                teacher.in_flight += 1
                teacher.most_in_flight = max(teacher.most_in_flight, teacher.in_flight)
            answer = (404, {}, b"no such path") if self.path != "/v1/chat/completions" else teacher.reply(body, count)
            with teacher.lock:
                teacher.in_flight -= 1
            self.close_connection = True
            if answer is None:
                return  # the connection drops without a reply
            status, headers, data = answer
            self.send_response(status)
            for name, value in ({"content-length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.send_header("connection", "close")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    httpd = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    teacher.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    try:
        yield teacher
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.002)
    monkeypatch.delenv("KD_TEACHER_API_KEY", raising=False)


def ask(
    url: str,
    prompts: list[tuple[str, int]],
    *,
    concurrency: int = 4,
    task: Task = TASK,
    on_done: Any = None,
    session: Session | None = None,
) -> list[ServerAnswer]:
    settings = {"answers": SAMPLING, "task": task, "seed": 5, "concurrency": concurrency, "session": session}
    return answer_prompts(TEACHER, url=url, prompts=prompts, on_done=on_done or (lambda found: None), **settings)


def some(num: int) -> list[tuple[str, int]]:
    return [(f"p{i}", 0) for i in range(num)]


def only(prompt: str, reply: Reply | None) -> Callable[[dict[str, Any], int], Reply | None]:
    """This reply to one prompt, and an echo to the others."""
    return lambda body, count: reply if body["messages"][-1]["content"] == prompt else echo(body, count)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, in seconds; nobody waits."""
    waited: list[float] = []

    async def wait(stopping: Any, seconds: float) -> bool:
        waited.append(seconds)
        return bool(stopping.is_set())

    monkeypatch.setattr(module, "_stopped_within", wait)
    return waited


def echo(body: dict[str, Any], count: int) -> Reply:
    return completion("echo " + body["messages"][-1]["content"])


def test_a_request_says_what_the_recipe_says_and_answers_keep_their_order() -> None:
    prompts = [(f"p{i}", s) for i in range(20) for s in range(2)]
    done: list[tuple[int, ServerAnswer]] = []
    with serving(echo) as teacher:
        got = ask(teacher.url + "/", prompts, on_done=done.append)
    assert got == [ServerAnswer(f"echo {prompt}", "stop", None, 7, 3) for prompt, _ in prompts]
    assert dict(done) == dict(enumerate(got)), "each was told once"
    assert len(done) == 40
    body = next(b for b in teacher.bodies if b["messages"][1]["content"] == "p3" and b["seed"] == sample_seed(5, "p3", 1))
    assert body == {
        "model": "big",
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 64,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "p3"}],
        "seed": sample_seed(5, "p3", 1),
        "stream": False,
    }
    assert len({b["seed"] for b in teacher.bodies}) == 40
    assert all("authorization" not in h for h in teacher.headers)


def test_without_a_system_message_none_is_sent() -> None:
    with serving(echo) as teacher:
        ask(teacher.url, [("hi", 0)], task=Task(template="chat", verifier="exact"))
    assert teacher.bodies[0]["messages"] == [{"role": "user", "content": "hi"}]


def test_no_prompts_ask_nothing() -> None:
    with serving(echo) as teacher:
        assert ask(teacher.url, []) == []
    assert teacher.bodies == []


def test_the_key_comes_from_the_environment_and_never_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_TEACHER_API_KEY", "sk-canary")
    with serving(only("p", failure(400, "bad request with key sk-canary"))) as teacher:
        answer, _ = ask(teacher.url, [("p", 0), ("q", 0)])
    assert teacher.headers[0]["authorization"] == "Bearer sk-canary"
    assert answer.error == "HTTP 400: bad request with key ***"
    with serving(lambda body, count: failure(401, "wrong key sk-canary")) as teacher, pytest.raises(TeacherError) as caught:
        ask(teacher.url, [("p", 0)])
    assert "sk-canary" not in str(caught.value)
    assert "KD_TEACHER_API_KEY is set" in str(caught.value)


def test_concurrency_is_used_and_bounded() -> None:
    gate = threading.Barrier(3)

    def together(body: dict[str, Any], count: int) -> Reply:
        gate.wait(timeout=10)  # passes only when three are in flight at once
        return echo(body, count)

    with serving(together) as teacher:
        assert len(ask(teacher.url, [(f"p{i}", 0) for i in range(9)], concurrency=3)) == 9
    assert teacher.most_in_flight == 3


THOUGHT = [{"type": "thinking", "thinking": [{"type": "text", "text": "2+2"}]}, {"type": "text", "text": "4"}]
STREAM = """: a comment

data: {"choices":[{"delta":{"role":"assistant","reasoning_content":"2+"}}]}
data: {"choices":[{"delta":{"reasoning_content":"2"}}]}

data: {"choices":[{"delta":{"content":"fo"}}]}
data: {"choices":[{"delta":{"content":"ur"},"finish_reason":"stop"}]}
data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}
data: [DONE]
"""


def streamed(text: str) -> Reply:
    return 200, {"content-type": "text/event-stream"}, text.encode()


def packed(reply: Reply, pack: Callable[[bytes], bytes] = gzip.compress) -> Reply:
    status, headers, data = reply
    return status, headers | {"content-encoding": "gzip"}, pack(data)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (completion("4", reasoning_content="2+2"), ("<think>\n2+2\n</think>\n\n4", "stop")),
        (completion("4", reasoning="2+2"), ("<think>\n2+2\n</think>\n\n4", "stop")),
        (completion(None, "length", reasoning_content="2+"), ("<think>\n2+", "length")),
        (completion("4", reasoning_content=None), ("4", "stop")),
        (completion("cut o", "length"), ("cut o", "length")),
        (completion(""), ("", "stop")),
        (completion([{"type": "text", "text": "4"}, "2"]), ("42", "stop")),
        (completion(THOUGHT), ("<think>\n2+2\n</think>\n\n4", "stop")),
        (completion("4", "eos_token"), ("4", "stop")),
        (completion("4", "end_turn"), ("4", "stop")),
        (completion("4", "max_tokens"), ("4", "length")),
        (streamed(STREAM), ("<think>\n2+2\n</think>\n\nfour", "stop")),
        (packed(completion("4")), ("4", "stop")),
    ],
)
def test_text_and_finish_reason(reply: Reply, expected: tuple[str, str]) -> None:
    with serving(lambda body, count: reply) as teacher:
        (answer,) = ask(teacher.url, [("2+2", 0)])
    assert (answer.text, answer.finish_reason) == expected
    assert (answer.error, answer.prompt_tokens, answer.completion_tokens) == (None, 7, 3)


def body(data: Any) -> Reply:
    return 200, {"content-type": "application/json"}, data if isinstance(data, bytes) else json.dumps(data).encode()


WRONG_IN_FORM = [
    (completion("x", "content_filter"), "content_filter"),
    (completion("x", None), "None"),
    (completion("x", ""), "finish_reason ''"),
    (completion("x", ["stop"]), "finish_reason"),
    (completion("\ud800"), "lone surrogate"),
    (completion(None), "holds no content"),
    (completion(None, refusal="I will not"), "I will not"),
    (completion(None, "tool_calls", tool_calls=[{}]), "tool_calls"),
    (completion([{"type": "image_url"}]), "a part of type 'image_url'"),
    (completion({"text": "4"}), "content is a dict"),
    (completion("4", reasoning_content=7), "content is a int"),
    (body({"choices": []}), "no chat completion"),
    (body({"choices": [None]}), "no chat completion"),
    (body({"choices": [{"message": None}]}), "no chat completion"),
    (body({"choices": {"0": 1}}), "no chat completion"),
    (body([]), "no chat completion"),
    (body(b"[" * 60_000), "nested too deeply"),
    ((200, {"content-type": "text/html"}, b"<html>welcome"), "no chat completion.*welcome"),
    (streamed('data: {"choices":[{"delta":{"content":"4"}}]}\n\ndata: [DONE]\n\n'), "the stream ended .* 'None'"),
    (streamed('data: {"choices":[{"delta":{"content":4}}]}\n\ndata: [DONE]\n\n'), "content is a int"),
    (streamed("data: 7\n\n"), "no chat completion"),
    (failure(400, "maximum context length is 2048 tokens"), "HTTP 400: maximum context length is 2048 tokens"),
    (failure(422, "too long"), "HTTP 422: too long"),
    ((400, {}, b'{"detail": "plain detail"}'), "plain detail"),
    ((400, {}, b""), "no message"),
    (body({"error": {"message": "prompt is too long", "code": 400}}), "HTTP 400: prompt is too long"),
    (body({"error": {"message": "no such field", "type": "invalid_request_error", "code": None}}), "HTTP 400: no such field"),
]


@pytest.mark.parametrize(("reply", "error"), WRONG_IN_FORM)
def test_a_refusal_or_a_wrong_form_costs_its_own_row_only(reply: Reply, error: str) -> None:
    with serving(only("bad", reply)) as teacher:
        first, bad, last = ask(teacher.url, [("a", 0), ("bad", 0), ("b", 0)])
    assert (first.text, last.text) == ("echo a", "echo b")
    assert (bad.text, bad.finish_reason, bad.completion_tokens) == ("", "error", None)
    assert re.search(error, str(bad.error))
    assert len(teacher.bodies) == 3, "such a row is not asked again in this run"


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress])
def test_a_reply_that_max_tokens_does_not_allow_is_read_to_its_bound(
    pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    read = module.read_body

    async def measured(response: Any, bound: int) -> bytes:
        data = await read(response, bound)
        kept.append(len(data))
        return data

    monkeypatch.setattr(module, "read_body", measured)
    large = completion("0" * 30_000_000)
    with serving(only("bad", packed(large, pack) if pack is gzip.compress else large)) as teacher:
        bad, good = ask(teacher.url, [("bad", 0), ("good", 0)])
    bound = module.REPLY_BYTES + 64 * module.REPLY_BYTES_A_TOKEN
    assert (good.text, bad.text) == ("echo good", "")
    assert f"longer than the {bound:,} bytes that answers.max_tokens 64 allows" in str(bad.error)
    assert max(kept) <= bound + 2**20, "a piece of the network's beyond the bound at most"


def test_an_error_of_any_size_is_one_short_message() -> None:
    with serving(only("bad", (400, {}, b"x" * 3_000_000))) as teacher:
        bad, _ = ask(teacher.url, [("bad", 0), ("good", 0)])
    assert len(str(bad.error)) < 300


def test_usage_is_none_where_the_server_does_not_say() -> None:
    reply = (200, {"content-type": "application/json"}, b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}')
    with serving(lambda body, count: reply) as teacher:
        assert ask(teacher.url, [("p", 0)]) == [ServerAnswer("x", "stop", None, None, None)]


PASSING = [
    failure(429),
    failure(500),
    failure(503),
    failure(408),
    body({"id": "x", "error": {"message": "Upstream overloaded", "code": 502}}),
    body({"choices": None, "error": {"code": 429, "message": "slow down"}}),
    body({"error": "try again"}),
    body({"choices": [{"error": {"code": "503", "message": "provider"}, "message": None}]}),
    streamed('data: {"choices":[{"delta":{"content":"4"}}]}\n\n'),  # cut: no finish_reason, no [DONE]
    streamed('data: {"error": {"code": 503, "message": "overloaded"}}\n\n'),
    packed(completion("4"), lambda data: gzip.compress(data)[:-9]),
    packed(completion("4"), lambda data: b"this is not gzip"),
    None,
    "cut",
    "cut chunked",
]


@pytest.mark.parametrize("first", PASSING)
def test_passing_failures_are_tried_again(first: Any) -> None:
    def reply(body: dict[str, Any], count: int) -> Reply | None:
        if count >= 3:
            return echo(body, count)
        if first == "cut":  # announces more bytes than it sends
            status, headers, data = echo(body, count)
            return status, headers | {"content-length": str(len(data) + 100)}, data
        if first == "cut chunked":
            return 200, {"content-type": "application/json", "content-length": "11"}, b'{"choices":'
        return first

    with serving(reply) as teacher:
        got = ask(teacher.url, some(6))
    assert [a.text for a in got] == [f"echo p{i}" for i in range(6)]
    assert set(teacher.seen.values()) == {4}, "the same request, three failures and one answer"


def test_a_server_that_hangs_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.2)
    hung = threading.Event()

    def reply(body: dict[str, Any], count: int) -> Reply | None:
        return echo(body, count) if count else (hung.wait(30) or None) and None

    with serving(reply) as teacher:
        (answer,) = ask(teacher.url, [("p", 0)])
        hung.set()
    assert answer.text == "echo p"


def test_a_row_on_which_the_server_always_breaks_costs_that_row() -> None:
    with serving(only("bad", failure(500, "out of memory"))) as teacher:
        *good, bad = ask(teacher.url, [*some(5), ("bad", 0)])
    assert [a.text for a in good] == [f"echo p{i}" for i in range(5)]
    assert bad.error == "HTTP 500 (out of memory), 8 times in a row"


def test_thirty_percent_failures_end_in_the_same_answers() -> None:
    def flaky(body: dict[str, Any], count: int) -> Reply:
        return failure(503) if count < 4 and (body["seed"] + count) % 10 < 3 else echo(body, count)

    prompts = [(f"p{i}", 0) for i in range(60)]
    with serving(flaky) as teacher:
        got = ask(teacher.url, prompts, concurrency=8)
    assert [a.text for a in got] == [f"echo {p}" for p, _ in prompts]
    assert len(teacher.bodies) > 60


def test_a_server_that_goes_on_failing_is_an_error_after_bounded_attempts() -> None:
    with (
        serving(lambda body, count: failure(503, "overloaded")) as teacher,
        pytest.raises(TeacherError, match=r"HTTP 503 \(overloaded\), 8 times"),
    ):
        ask(teacher.url, [("p", 0)])
    assert len(teacher.bodies) == module.MAX_ATTEMPTS


@pytest.mark.parametrize("value", ["30", "date"])
def test_retry_after_is_honoured(value: str, waits: list[float]) -> None:
    after = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True) if value == "date" else value
    with serving(lambda body, count: failure(429, retry_after=after) if count == 0 else echo(body, count)) as teacher:
        ask(teacher.url, [("p", 0)])
    assert len(waits) == 1
    assert waits[0] >= 30 if value == "30" else 0 < waits[0] <= 100 + module.BACKOFF_SECONDS


def test_waits_grow_to_a_bound_and_are_never_alike(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.5)
    with serving(lambda body, count: echo(body, count) if count == 7 else failure(503)) as teacher:
        ask(teacher.url, [("p", 0)])
    bounds = [0.5, 1, 2, 4, 8, 8, 8]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len(set(waits)) == 7


def test_a_row_that_waits_holds_no_other_row_up() -> None:
    others = threading.Event()

    def reply(body: dict[str, Any], count: int) -> Reply:
        if body["messages"][-1]["content"] != "p0":
            return echo(body, count)
        if count == 0:
            return failure(429, retry_after="0.01")
        assert others.wait(30), "the others are answered while p0 waits"
        return echo(body, count)

    def on_done(found: tuple[int, ServerAnswer]) -> None:
        done.append(found[0])
        if len(done) == 19:
            others.set()

    done: list[int] = []
    with serving(reply) as teacher:
        ask(teacher.url, some(20), concurrency=2, on_done=on_done)
    assert done[-1] == 0


def test_a_wait_beyond_reason_stops_the_run_and_what_is_in_flight_is_waited_for() -> None:
    seen: dict[int, ServerAnswer] = {}
    asked, refused = threading.Event(), threading.Event()

    def reply(body: dict[str, Any], count: int) -> Reply:
        if body["messages"][-1]["content"] == "p1":
            asked.wait(30)
            refused.set()
            return failure(429, retry_after="3600")
        asked.set()  # p0 is in flight when the run stops, and is answered after that
        refused.wait(30)
        return echo(body, count)

    with serving(reply) as teacher, pytest.raises(TeacherError, match=r"asks to wait 3600 s: run again after that"):
        ask(teacher.url, some(50), concurrency=2, on_done=lambda found: seen.update([found]))
    assert seen[0].text == "echo p0"
    assert len(teacher.bodies) <= 2 + len(seen), "no row is begun after the stop"


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        (failure(401), "KD_TEACHER_API_KEY is not set"),
        (failure(403), "KD_TEACHER_API_KEY is not set"),
        (failure(404, "The model `big` does not exist."), r"does not exist.*has a model 'big'"),
        (failure(402, "pay"), "pay"),
        ((307, {"location": "http://169.254.169.254/"}, b""), "HTTP 307"),
        (body({"error": {"code": 401, "message": "no key"}}), "no key.*KD_TEACHER_API_KEY"),
    ],
)
def test_what_would_spoil_every_row_is_an_error_at_once(reply: Reply, advice: str) -> None:
    with serving(lambda body, count: reply) as teacher, pytest.raises(TeacherError, match=advice) as caught:
        ask(teacher.url, some(50), concurrency=2)
    assert teacher.url in str(caught.value)
    assert len(teacher.bodies) <= 4


@pytest.mark.parametrize(("reply", "error"), WRONG_IN_FORM)
def test_the_same_failure_of_the_first_rows_stops_the_run_with_one_line(reply: Reply, error: str) -> None:
    with serving(lambda body, count: reply) as teacher, pytest.raises(TeacherError, match=rf"none of the first 8 .*{error}") as caught:
        ask(teacher.url, some(200), concurrency=50)
    assert "answers.max_tokens" in str(caught.value)
    assert len(teacher.bodies) < 2 * module.FIRST_ROWS, "a handful of requests, however many are allowed in flight"


def test_a_few_rows_that_all_fail_are_an_error_too_unless_the_server_is_proven() -> None:
    with serving(lambda body, count: failure(400, "too long")) as teacher:
        with pytest.raises(TeacherError, match=r"none of the first 3 prompts.*too long"):
            ask(teacher.url, some(3))
        assert [a.error for a in ask(teacher.url, some(3), session=Session(proven=True))] == ["HTTP 400: too long"] * 3
        assert [a.error for a in ask(teacher.url, some(1), session=Session(proven=True))] == ["HTTP 400: too long"]


def test_more_failures_than_a_session_allows_stop_the_run() -> None:
    session = Session(max_failed=5)
    with serving(lambda body, count: failure(400) if int(body["messages"][-1]["content"][1:]) % 2 else echo(body, count)) as teacher:
        ask(teacher.url, some(8), session=session)
        assert (session.proven, session.failed) == (True, 4)
        with pytest.raises(TeacherError, match=r"6 rows have failed, more than run\.max_failed_answers allows.*HTTP 400"):
            ask(teacher.url, some(100), session=session)
    assert len(teacher.bodies) < 30


def test_a_flagged_prompt_behind_a_good_key_costs_its_row() -> None:
    with serving(only("bad", failure(403, "flagged"))) as teacher:
        *_, bad = ask(teacher.url, [*some(3), ("bad", 0)], concurrency=1)
    assert bad.error == "HTTP 403: flagged"


def test_a_server_that_wants_max_completion_tokens_gets_them(caplog: pytest.LogCaptureFixture) -> None:
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    session = Session()
    with serving(lambda body, count: failure(400, words) if "max_tokens" in body else echo(body, count)) as teacher:
        assert {a.error for a in ask(teacher.url, some(30), session=session)} == {None}
        first = len(teacher.bodies)
        assert {a.error for a in ask(teacher.url, some(30), session=session)} == {None}
    assert first <= 30 + 4, "a refusal for each request that was in flight"
    assert {b["max_completion_tokens"] for b in teacher.bodies if "max_tokens" not in b} == {64}
    assert all("max_tokens" not in b for b in teacher.bodies[first:]), "the next shard knows it"
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1


def test_a_wrong_path_is_named() -> None:
    with serving(echo) as teacher, pytest.raises(TeacherError, match="/chat/completions begins"):
        ask(teacher.url.removesuffix("/v1"), [("p", 0)])


def test_an_unreachable_server_is_named_with_what_to_do() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(TeacherError, match=r"cannot be reached.*--set run\.teacher_url=") as caught:
        ask(url, [("p", 0), ("q", 0)])
    assert url in str(caught.value)


def test_an_error_of_the_caller_is_not_hidden() -> None:
    def broken(found: tuple[int, ServerAnswer]) -> None:
        raise RuntimeError("caller's own")

    with serving(echo) as teacher, pytest.raises(RuntimeError, match="caller's own"):
        ask(teacher.url, [("p", 0)], on_done=broken)


def test_an_address_that_is_no_teacher_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"run\.teacher_url.*link-local"):
        ask("http://169.254.169.254/v1", [("p", 0)])


def test_a_key_that_no_header_can_carry_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_TEACHER_API_KEY", "sk-canary\nX: y")
    with pytest.raises(TeacherError, match="KD_TEACHER_API_KEY holds") as caught:
        ask("http://127.0.0.1:9/v1", [("p", 0)])
    assert "canary" not in str(caught.value)


def test_seeds_depend_on_all_three_parts_and_fit_in_31_bits() -> None:
    seeds = [sample_seed(s, p, i) for s in range(5) for p in ("a", "b") for i in range(50)]
    assert len(set(seeds)) == 500
    assert all(0 <= s < 2**31 for s in seeds)


def test_turns_are_sent_as_they_are_and_a_system_message_of_their_own_wins() -> None:
    turns = [Turn("user", "1+1?"), Turn("assistant", "2"), Turn("user", "And 2+2?")]
    prompts = [(prompt_text(turns), 0), (prompt_text([Turn("system", "Be kind."), *turns]), 0)]
    with serving(lambda body, count: completion("4")) as teacher:
        answer_prompts(
            TEACHER, url=teacher.url, prompts=prompts, answers=SAMPLING, task=TASK, seed=0, concurrency=1, on_done=lambda found: None
        )
    sent = [[(m["role"], m["content"]) for m in body["messages"]] for body in teacher.bodies]
    spoken = [("user", "1+1?"), ("assistant", "2"), ("user", "And 2+2?")]
    assert sorted(sent) == [[("system", "Be brief."), *spoken], [("system", "Be kind."), *spoken]]
