"""What a server has answered is paid: it is kept at once, whatever happens to other rows, and never asked for again."""

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kd_core.artifacts import Artifact, find
from kd_core.errors import TeacherError
from kd_core.progress import silent
from kd_core.recipe import Recipe
from kd_core.recipe.files import dump_recipe, load_recipe
from kd_core.stages import answers
from kd_core.stages.graph import build_graph
from kd_core.stages.job import Job
from kd_core.stages.run import run_node
from kd_core.store import LocalStore
from kd_core.summaries import shards_of

RECIPE = Path(__file__).parents[2] / "recipes" / "sequence-level.yaml"
NUM_PROMPTS = 40
Reply = tuple[int, dict[str, str], dict[str, Any]]


def answer(text: str, finish_reason: str = "stop") -> Reply:
    return 200, {}, {"choices": [{"message": {"content": text}, "finish_reason": finish_reason}]}


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    asked: list[str]
    reply: Callable[[str, int], Reply]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def serving(reply: Callable[[str, int], Reply]) -> Iterator[Server]:
    """A server; ``reply`` gets the prompt and how many requests came before it."""

    class Handler(BaseHTTPRequestHandler):
        server: Server

        def do_POST(self) -> None:
            prompt = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][-1]["content"]
            self.server.asked.append(prompt)
            status, headers, said = self.server.reply(prompt, len(self.server.asked) - 1)
            data = json.dumps(said).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(data)), "content-type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as httpd:
        httpd.asked, httpd.reply = [], reply
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield httpd
        finally:
            httpd.shutdown()
            thread.join()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"q": f"Question {i}", "a": str(i)}) + "\n" for i in range(NUM_PROMPTS)))
    return path


@pytest.fixture
def run_answers(prompts: Path, tmp_path: Path) -> Callable[..., Artifact]:
    """``run_answers(server, *overrides)``: everything up to the answers."""

    def run(server: Server, *overrides: str) -> Artifact:
        recipe = recipe_of(prompts, tmp_path, server, *overrides)
        store = LocalStore(Path(recipe.run.store))
        return [
            run_node(recipe, build_graph(recipe, store), name, store=store, tick=silent, extra={})
            for name in ("prompts", "teacher", "answers")
        ][-1]

    return run


def recipe_of(prompts: Path, folder: Path, server: Server, *overrides: str) -> Recipe:
    source = {"kind": "file", "path": str(prompts), "prompt": "{q}", "reference": "{a}"}
    split = {"validation": 0.0, "test": 0.1}
    run = {"teacher_url": server.url, "teacher_concurrency": 1, "device": "cpu", "store": str(folder / "store")}
    fields = {"prompts": {"sources": [source], "split": split}, "run": run, "answers.num_samples": 1}
    return load_recipe(RECIPE, [*(f"{name}={json.dumps(value)}" for name, value in fields.items()), *overrides])


def record(prompts: Path, folder: Path, server: Server, *overrides: str) -> Any:
    recipe = recipe_of(prompts, folder, server, *overrides)
    store = LocalStore(Path(recipe.run.store))
    found = find(store, "answers", build_graph(recipe, store)["answers"].fingerprint)
    assert found is not None
    return store, found


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"retry-after": "300"}, {"error": {"message": "quota"}}),
        (401, {}, {"error": {"message": "the key has expired"}}),
        (404, {}, {"error": {"message": "no such model any more"}}),
    ],
)
def test_what_was_answered_before_a_shard_ends_in_an_error_is_not_asked_again(run_answers, trouble: Reply) -> None:
    with serving(lambda prompt, before: trouble if before == 20 else answer("4")) as server:
        with pytest.raises(TeacherError, match=r"quota.*wait 300 s|expired|no such model"):
            run_answers(server)
        first = server.asked[:20]
        run_answers(server)
    assert not set(first) & set(server.asked[21:])
    assert len(server.asked) == len(set(server.asked)) + 1, "only the one that failed was asked twice"


@pytest.mark.parametrize(("together", "seconds", "at_a_time"), [(5, math.inf, 5), (64, 0.0, 1)])
def test_answers_are_committed_while_their_shard_goes_on(run_answers, tmp_path: Path, monkeypatch, together, seconds, at_a_time) -> None:
    """So a kill in the middle of a shard of 512 costs a few: what is committed survives it."""
    monkeypatch.setattr(answers, "_KEPT_TOGETHER", together)
    monkeypatch.setattr(answers, "_KEPT_WITHIN_SECONDS", seconds)
    kept: list[int] = []

    def reply(prompt: str, before: int) -> Reply:
        commits = (tmp_path / "store").glob("rows/answers/*/commits/*.json")
        kept.append(sum(len(json.loads(path.read_text())["keys"]) for path in commits))
        return answer("4")

    with serving(reply) as server:
        run_answers(server)
    assert kept == [before // at_a_time * at_a_time for before in range(len(server.asked))]


def test_a_row_that_failed_is_left_out_with_its_reason_and_asked_again_by_the_next_who_wants_it(run_answers, prompts, tmp_path) -> None:
    def first(prompt: str, before: int) -> Reply:
        return answer("", "content_filter") if before == 10 else answer("4")

    with serving(first) as server:
        made = run_answers(server)
        asked, bad = len(server.asked), server.asked[10]
        store, found = record(prompts, tmp_path, server)
        shards = shards_of(found)
        assert shards.rows == shards.rows_computed == asked - 1
        assert found.summary["finish_reasons"] == {"stop": asked - 1, "error": 1}
        recipe = recipe_of(prompts, tmp_path, server)
        node = build_graph(recipe, store)["curate"]
        table = answers.read_answers(Job(recipe, node, store, {"answers": found}, tmp_path, silent))
        assert table["finish_reason"].to_pylist() == ["stop"] * (asked - 1) + ["error"], "curation counts it"
        assert "content_filter" in table["error"][-1].as_py()
        assert run_answers(server).digest == made.digest
        assert len(server.asked) == asked, "a finished stage is finished"
        server.reply = lambda prompt, before: answer("4")
        run_answers(server, "answers.num_samples=2")
    assert server.asked[asked:].count(bad) == 2, "its first sample, that failed, and its second"
    assert len(server.asked) == 2 * asked + 1


def test_more_failures_than_allowed_stop_the_run_and_only_they_are_asked_again(run_answers) -> None:
    with serving(lambda prompt, before: answer("4", "stop" if before % 4 else "content_filter")) as server:
        with pytest.raises(TeacherError, match=r"2 rows have failed, more than run\.max_failed_answers allows.*content_filter"):
            run_answers(server)
        bad = {prompt for i, prompt in enumerate(server.asked) if i % 4 == 0}
        good, asked = set(server.asked) - bad, len(server.asked)
        server.reply = lambda prompt, before: answer("4")
        run_answers(server)
    assert bad <= set(server.asked[asked:])
    assert not good & set(server.asked[asked:])


def test_a_server_that_refuses_everything_is_asked_a_handful_of_times(run_answers) -> None:
    refusal = 400, {}, {"error": {"message": "top_p is not supported with this model"}}
    with serving(lambda prompt, before: refusal) as server:
        with pytest.raises(TeacherError, match=r"none of the first 8 prompts.*top_p is not supported.*answers\.top_p"):
            run_answers(server, "run.teacher_concurrency=32")
        assert len(server.asked) < 16


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_in_mid_shard_keeps_its_answers(prompts, tmp_path, kd_process, number: int) -> None:
    here, released = threading.Event(), threading.Event()

    def reply(prompt: str, before: int) -> Reply:
        if before == 29:
            here.set()
            released.wait(60)
        return answer("4")

    with serving(reply) as server:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(dump_recipe(recipe_of(prompts, tmp_path, server)))
        process = kd_process("run", "--local", recipe)
        assert here.wait(120)
        process.send_signal(number)
        process.communicate(timeout=60)
        released.set()
    commits = (tmp_path / "store").glob("rows/answers/*/commits/*.json")
    assert sum(len(json.loads(path.read_text())["keys"]) for path in commits) == 29
