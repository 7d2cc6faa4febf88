"""The server teacher against a real HTTP server in a thread that speaks the protocol, with injected failures."""

import json
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

from kd_core.errors import TeacherError
from kd_core.recipe import Answers, ServerTeacher, Task
from kd_core.teacher import server as module
from kd_core.teacher.server import ServerAnswer, answer_prompts, check_url, sample_seed

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

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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


def ask(url: str, prompts: list[tuple[str, int]], *, concurrency: int = 4, task: Task = TASK, on_done: Any = None) -> list[ServerAnswer]:
    return answer_prompts(
        TEACHER, url=url, prompts=prompts, answers=SAMPLING, task=task, seed=5, concurrency=concurrency, on_done=on_done or (lambda n: None)
    )


def echo(body: dict[str, Any], count: int) -> Reply:
    return completion("echo " + body["messages"][-1]["content"])


def test_a_request_says_what_the_recipe_says_and_answers_keep_their_order() -> None:
    prompts = [(f"p{i}", s) for i in range(20) for s in range(2)]
    done: list[int] = []
    with serving(echo) as teacher:
        got = ask(teacher.url + "/", prompts, on_done=done.append)
    assert got == [ServerAnswer(f"echo {prompt}", "stop", None, 7, 3) for prompt, _ in prompts]
    assert done == list(range(1, 41))
    body = next(b for b in teacher.bodies if b["messages"][1]["content"] == "p3" and b["seed"] == sample_seed(5, "p3", 1))
    assert body == {
        "model": "big",
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 64,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "p3"}],
        "seed": sample_seed(5, "p3", 1),
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
    with serving(lambda body, count: failure(400, "bad request with key sk-canary")) as teacher:
        (answer,) = ask(teacher.url, [("p", 0)])
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


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (completion("4", reasoning_content="2+2"), ("<think>\n2+2\n</think>\n\n4", "stop")),
        (completion("4", reasoning="2+2"), ("<think>\n2+2\n</think>\n\n4", "stop")),
        (completion(None, "length", reasoning_content="2+"), ("<think>\n2+", "length")),
        (completion("4", reasoning_content=None), ("4", "stop")),
        (completion("cut o", "length"), ("cut o", "length")),
        (completion(""), ("", "stop")),
    ],
)
def test_text_and_finish_reason(reply: Reply, expected: tuple[str, str]) -> None:
    with serving(lambda body, count: reply) as teacher:
        (answer,) = ask(teacher.url, [("2+2", 0)])
    assert (answer.text, answer.finish_reason) == expected
    assert answer.error is None


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (completion("x", "content_filter"), "content_filter"),
        (completion("x", None), "None"),
        (completion("\ud800"), "lone surrogate"),
        (failure(400, "maximum context length is 2048 tokens"), "HTTP 400: maximum context length is 2048 tokens"),
        (failure(422, "too long"), "HTTP 422: too long"),
        ((400, {}, b'{"detail": "plain detail"}'), "plain detail"),
        ((400, {}, b""), "no message"),
    ],
)
def test_a_refused_prompt_costs_its_own_row_only(reply: Reply, error: str) -> None:
    with serving(lambda body, count: reply if body["messages"][-1]["content"] == "bad" else echo(body, count)) as teacher:
        first, bad, last = ask(teacher.url, [("a", 0), ("bad", 0), ("b", 0)])
    assert (first.text, last.text) == ("echo a", "echo b")
    assert (bad.text, bad.finish_reason, bad.completion_tokens) == ("", "error", None)
    assert error in str(bad.error)
    assert len(teacher.bodies) == 3, "a refused row is not asked again"


def test_usage_is_none_where_the_server_does_not_say() -> None:
    reply = (200, {"content-type": "application/json"}, b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}')
    with serving(lambda body, count: reply) as teacher:
        assert ask(teacher.url, [("p", 0)]) == [ServerAnswer("x", "stop", None, None, None)]


@pytest.mark.parametrize("first", [failure(429), failure(500), failure(503), failure(408), None, "cut", "cut chunked"])
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
        got = ask(teacher.url, [(f"p{i}", 0) for i in range(6)])
    assert [a.text for a in got] == [f"echo p{i}" for i in range(6)]
    assert set(teacher.seen.values()) == {4}, "the same request, three failures and one answer"


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


@pytest.mark.parametrize("value", ["0.3", "date"])
def test_retry_after_is_honoured(value: str) -> None:
    def reply(body: dict[str, Any], count: int) -> Reply:
        after = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if value == "date" else value
        return failure(429, retry_after=after) if count == 0 else echo(body, count)

    with serving(reply) as teacher:
        ask(teacher.url, [("p", 0)])
    waited = teacher.times[1] - teacher.times[0]
    assert 0.3 <= waited < 3.0


def test_a_wait_beyond_reason_is_an_error() -> None:
    with serving(lambda body, count: failure(429, retry_after="3600")) as teacher, pytest.raises(TeacherError, match="asks to wait 3600 s"):
        ask(teacher.url, [("p", 0)])
    assert len(teacher.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        (failure(401), "KD_TEACHER_API_KEY is not set"),
        (failure(403), "KD_TEACHER_API_KEY is not set"),
        (failure(404, "The model `big` does not exist."), r"does not exist.*has a model 'big'"),
        (failure(402, "pay"), "pay"),
        ((307, {"location": "http://169.254.169.254/"}, b""), "HTTP 307"),
        ((200, {"content-type": "text/html"}, b"<html>welcome"), "no chat completion.*welcome"),
        ((200, {"content-type": "application/json"}, b'{"choices": []}'), "no chat completion"),
        ((200, {"content-type": "application/json"}, b"[]"), "no chat completion"),
        (completion([{"type": "text", "text": "x"}]), "content is a list"),
    ],
)
def test_what_would_spoil_every_row_is_an_error_at_once(reply: Reply, advice: str) -> None:
    with serving(lambda body, count: reply) as teacher, pytest.raises(TeacherError, match=advice) as caught:
        ask(teacher.url, [(f"p{i}", 0) for i in range(50)], concurrency=2)
    assert teacher.url in str(caught.value)
    assert len(teacher.bodies) <= 4


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
    def broken(done: int) -> None:
        raise RuntimeError("caller's own")

    with serving(echo) as teacher, pytest.raises(RuntimeError, match="caller's own"):
        ask(teacher.url, [("p", 0)], on_done=broken)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/v1",
        "http://169.254.1.1:8000/v1",
        "http://2852039166/v1",  # 169.254.169.254 as one number
        "http://[fe80::1]/v1",
        "http://[fe80::1%25lo]/v1",
        "http://[::ffff:169.254.169.254]/v1",
        "http://[fd00:ec2::254]/v1",
        "http://100.100.100.200/v1",
        "http://metadata.google.internal/v1",
        "http://METADATA.google.internal./v1",
        "file:///etc/passwd",
        "ftp://host/v1",
        "gopher://127.0.0.1/v1",
        "127.0.0.1:8000/v1",
        "http:///v1",
        "http://host:99999/v1",
        "http://[::1/v1",
        "http://host/v1?key=secret",
        "",
    ],
)
def test_addresses_that_are_no_teacher_are_refused(url: str) -> None:
    with pytest.raises(TeacherError, match=r"run\.teacher_url"):
        check_url(url)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(TeacherError, match="KD_TEACHER_API_KEY") as caught:
        check_url("http://user:canary@127.0.0.1/v1")
    assert "canary" not in str(caught.value)


def test_a_name_that_resolves_to_a_metadata_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(TeacherError, match="link-local"):
        check_url("https://innocent.example/v1")


def test_ordinary_addresses_pass() -> None:
    for url in ("http://127.0.0.1:8000/v1", "http://localhost:8000/v1", "http://10.0.0.3/v1", "https://[::1]:8000/v1"):
        assert check_url(url) == url


def test_seeds_depend_on_all_three_parts_and_fit_in_31_bits() -> None:
    seeds = [sample_seed(s, p, i) for s in range(5) for p in ("a", "b") for i in range(50)]
    assert len(set(seeds)) == 500
    assert all(0 <= s < 2**31 for s in seeds)
