"""Sequence-level and self-distillation are recipes and nothing else: each is planned, and a small one of each runs to its report."""

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from kd_core.artifacts import read_bytes
from kd_core.progress import silent
from kd_core.prompts.generated import running_totals
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph, open_node
from kd_core.stages.run import run_node
from kd_core.store import LocalStore
from kd_core.teacher.models import LoadedModel, save_model

RECIPES = Path(__file__).parents[2] / "recipes"
SUMS = "[{kind: reasoning_gym, task: chain_sum, config: {max_terms: 2, max_digits: 1}, num: 150, seed: 5, style: running_totals}]"
SIZE = "{hidden_size: 16, num_layers: 2, num_heads: 2, intermediate_size: 32, max_positions: 64}"
TRAINING = "{steps: 12, batch_rows: 8, learning_rate: 0.003}"
COMMON = (
    f"prompts.sources={SUMS}",
    f"training={TRAINING}",
    "seeds=[0]",
    "evaluation.generate.max_tokens=16",
    "run={threads: 1, device: cpu}",
)
BORN_AGAIN = (*COMMON, f"teacher.sources={SUMS}", f"teacher.architecture={SIZE}", f"teacher.training={TRAINING}")
ANY = "gate.rules=[{kind: ceiling, metric: parameter_ratio, maximum: 1}]"


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A text-only teacher that can add: its address, and what it was asked. Every fourth answer is wrong."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            text = running_totals(body["messages"][-1]["content"].rstrip("="))[1] + ("" if body["seed"] % 4 else "0")
            bodies.append(body)
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            reply = json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", bodies
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def planned(kd: Callable[..., Any]) -> Callable[..., Recipe]:
    """``planned(recipe name, *overrides)``: the recipe, after ``kd plan`` has taken it; its store is in the test's directory."""

    def load(name: str, *overrides: str) -> Recipe:
        called = kd("plan", RECIPES / f"{name}.yaml", *words(overrides), "--json")
        faults = json.loads(called.out)["faults"]
        assert all("run.teacher_url: a server teacher needs its address" in fault for fault in faults), called.out
        return load_recipe(RECIPES / f"{name}.yaml", overrides)

    return load


def words(overrides: Sequence[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def run_to_report(recipe: Recipe) -> list[str]:
    """All nodes but the publication, in order."""
    store, names = LocalStore(Path(recipe.run.store)), []
    for node in build_graph(recipe, store).values():
        if node.name == "publish":
            break
        run_node(recipe, build_graph(recipe, store), node.name, store=store, tick=silent, extra={})
        names.append(node.name)
    return names


def read(recipe: Recipe, node: str, file: str) -> str:
    store = LocalStore(Path(recipe.run.store))
    return read_bytes(store, open_node(store, build_graph(recipe, store)[node]), file).decode()


def summary(recipe: Recipe, node: str) -> Mapping[str, Any]:
    store = LocalStore(Path(recipe.run.store))
    return open_node(store, build_graph(recipe, store)[node]).summary


def first_step(recipe: Recipe) -> dict[str, float]:
    return json.loads(read(recipe, "student.0", "metrics.jsonl").splitlines()[0])


def test_sequence_level_from_a_text_only_teacher(planned, server, tmp_path: Path, tiny_model: Callable[..., LoadedModel]) -> None:
    url, asked = server
    save_model(tiny_model(), tmp_path / "small")
    student = f"student={{kind: pretrained, model: {tmp_path / 'small' / 'model'}}}"
    task = 'task={template: plain, answer_marker: "#", verifier: math}'
    recipe = planned("sequence-level", *COMMON, student, task, ANY, "answers.num_samples=2", f"run.teacher_url={url}")
    nodes = run_to_report(recipe)
    assert nodes == ["prompts", "teacher", "answers", "curate", "student.0", "evaluate.student", "gate", "report"]
    assert len(asked) == summary(recipe, "answers")["shards"]["rows"]
    curated = summary(recipe, "curate")
    assert 0 < curated["rows"] < len(asked), "wrong answers are not taught"
    assert curated["counts"]["gold"] == 0
    assert first_step(recipe)["hard"] > 0.0
    assert "soft" not in first_step(recipe)


def test_a_text_only_teachers_student_may_keep_the_tokens_of_its_texts(planned, server, bpe_tokenizer, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=420, bos_token_id=None, eos_token_id=0, pad_token_id=0, **sizes))
    save_model(LoadedModel(whole, bpe_tokenizer, 420), tmp_path / "whole")
    student = f"student={{kind: pretrained, model: {tmp_path / 'whole' / 'model'}, vocabulary: {{keep: data}}}}"
    task = 'task={template: plain, answer_marker: "#", verifier: math}'
    recipe = planned("sequence-level", *COMMON, student, task, ANY, "answers.num_samples=2", f"run.teacher_url={server[0]}")
    assert "vocabulary" in run_to_report(recipe)
    kept = summary(recipe, "vocabulary")["tokens"]
    assert 256 < kept < 420
    assert summary(recipe, "student.0")["vocabulary"] == {"tokens": kept, "full_tokens": 420, "kept_mass": None}
    assert summary(recipe, "student.0")["parameters"] == sum(p.numel() for p in whole.parameters()) - 2 * 16 * (420 - kept)


def test_born_again_at_the_teachers_size(planned) -> None:
    recipe = planned("born-again", *BORN_AGAIN, f"student.architecture={SIZE}", ANY)
    assert {"student.0", "ablation_hard.0", "evaluate.teacher"} <= set(run_to_report(recipe))
    assert summary(recipe, "student.0")["parameters"] == summary(recipe, "teacher")["parameters"]
    assert read(recipe, "student.0", "model/config.json") == read(recipe, "teacher", "model/config.json")
    assert first_step(recipe)["hard"] == pytest.approx(math.log(17), abs=0.2), "it starts from nothing: 17 columns alike"


@pytest.mark.drill
def test_a_student_starts_as_its_teacher_and_then_teaches_the_next_one(planned, kd: Callable[..., Any]) -> None:
    held = "objective={supervision: soft, hard_weight: 0.5, soft_weight: 0.5}"
    copied = (*BORN_AGAIN, "student={kind: from_teacher}", held, ANY, "evaluation.compare=[teacher]")
    first = planned("born-again", *copied)
    called = kd("run", "--local", "--json", RECIPES / "born-again.yaml", *words(copied))
    assert called.code == 0, called.err
    assert json.loads(called.out)["verdict"]["promote"]
    assert first_step(first)["soft"] == pytest.approx(0.0, abs=1e-3), "the student is the teacher"
    called = kd("export", RECIPES / "born-again.yaml", "--out", "first", *words(copied))
    assert called.code == 0, called.err
    faced = "gate.rules=[{kind: not_worse_than_champion, metric: pass_at_1, margin: 1}]"
    second = planned("born-again", *COMMON, "teacher={kind: pretrained, model: first}", "student={kind: from_teacher}", held, faced)
    assert "evaluate.champion" in run_to_report(second), "it faces the one that taught it"
    assert first_step(second)["soft"] == pytest.approx(0.0, abs=1e-3)
    assert first_step(second)["hard"] < first_step(first)["hard"], "it goes on where the first one ended"
