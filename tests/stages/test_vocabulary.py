"""A whole run whose students keep the tokens that their data uses: order, cache, figures, export, plain transformers."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kd_core.artifacts import Record, find, materialize
from kd_core.errors import TrainingError
from kd_core.evaluate.measure import measure
from kd_core.planning.plan import make_plan
from kd_core.progress import silent
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph, open_node
from kd_core.stages.run import run_node
from kd_core.stages.vocabulary import trimmed_tokens
from kd_core.store import LocalStore
from kd_core.student.describe import describe
from kd_core.teacher.models import load_directory, load_tokenizer
from kd_core.tokens.encoding import encode_gold, encode_prompt
from kd_core.tokens.token_map import TokenMap, read_token_map
from kd_core.train.history import logged_metrics
from tests.standins import SUMMARIES

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
CPU = torch.device("cpu")
STUDENT = {"kind": "from_teacher", "last_blocks": 1, "vocabulary": {"keep": "data", "least_kept_mass": 0.2}}


@dataclass(frozen=True)
class Ran:
    """A run that went to its end: its recipe, its store, its records by node."""

    recipe: Recipe
    store: LocalStore
    records: dict[str, Record]
    overrides: list[str]


@pytest.fixture(scope="module")
def overrides(bpe_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The quickstart with a tiny pre-trained teacher of 420 tokens and 6 rows more."""
    home = tmp_path_factory.mktemp("vocabulary")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(vocab_size=426, initializer_range=0.2, bos_token_id=None, eos_token_id=0, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(home / "teacher")
    bpe_tokenizer.save_pretrained(home / "teacher")
    changed = {
        "teacher": {"kind": "pretrained", "model": str(home / "teacher")},
        "student": STUDENT,
        "seeds": [0],
        "task.template": "chat",
        "prompts.sources.0.num": 100,
        "answers.max_tokens": 6,
        "curate": {"gold_rows": 20, "verify": False, "keep_truncated": True},
        "training": {"steps": 3, "batch_rows": 4, "learning_rate": 0.003},
        "evaluation.suites.0.limit": 6,
        "evaluation.generate.max_tokens": 6,
        "evaluation.compare": ["teacher", "ablation_hard"],
        "gate.rules": [{"kind": "ceiling", "metric": "parameter_ratio", "maximum": 1.0}],
        "publish": "trimmed",
        "run": {"threads": 1, "device": "cpu", "store": str(home / "store"), "checkpoint_every_steps": 2},
    }
    return [f"{path}={json.dumps(value)}" for path, value in changed.items()]


@pytest.fixture(scope="module")
def ran(overrides: list[str]) -> Ran:
    recipe = load_recipe(str(QUICKSTART), overrides)
    store = LocalStore(Path(recipe.run.store))
    for node in build_graph(recipe, store).values():
        run_node(
            recipe, build_graph(recipe, store), node.name, store=store, tick=silent, extra={"publish": lambda job: SUMMARIES["publish"]}
        )
    records = {name: find(store, node.stage, node.fingerprint) for name, node in build_graph(recipe, store).items()}
    return Ran(recipe, store, {name: record for name, record in records.items() if record is not None}, overrides)


def record_of(ran: Ran, overrides: list[str], *names: str) -> Record:
    """The last of some nodes of a changed recipe, computed in the same store."""
    recipe = load_recipe(str(QUICKSTART), [*ran.overrides, *overrides])
    for name in names:
        run_node(recipe, build_graph(recipe, ran.store), name, store=ran.store, tick=silent, extra={})
    return open_node(ran.store, build_graph(recipe, ran.store)[names[-1]])


def model_of(ran: Ran, node: str, to: Path) -> Path:
    return materialize(ran.store, ran.records[node], to / node) / ("model" if node != "vocabulary" else "tokenizer")


def test_the_student_is_small_and_plain_and_carries_its_map(ran: Ran, tmp_path: Path) -> None:
    kept = ran.records["vocabulary"].summary["tokens"]
    assert 256 < kept < 420 == ran.records["vocabulary"].summary["full_tokens"]
    path = model_of(ran, "student.0", tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert (model.lm_head.weight.shape, len(tokenizer), model.config.eos_token_id) == ((kept, 16), kept, tokenizer.eos_token_id)
    token_map = read_token_map(path)
    assert token_map is not None
    full = load_tokenizer(model_of(ran, "teacher", tmp_path))
    curated = materialize(ran.store, ran.records["curate"], tmp_path / "curate")
    rows = [*pq.read_table(curated / "rows.parquet").to_pylist(), *pq.read_table(curated / "validation.parquet").to_pylist()]
    prompts = pq.read_table(materialize(ran.store, ran.records["prompts"], tmp_path / "prompts") / "prompts.parquet").to_pylist()
    assert {row["source"] for row in rows} == {"teacher", "gold"}
    assert {prompt["split"] for prompt in prompts} == {"train", "validation", "test"}
    for row in rows:
        assert token_map.restore(token_map.trim(np.array(row["ids"]))).tolist() == row["ids"]
        ours = tokenizer.encode(row["text"], add_special_tokens=False)
        assert token_map.restore(np.array(ours, np.int64)).tolist() == full.encode(row["text"], add_special_tokens=False)
    for prompt in prompts:
        pair = [encode_prompt(t, prompt["prompt"], ran.recipe.task) for t in (tokenizer, full)]
        assert token_map.restore(np.array(pair[0])).tolist() == pair[1]


def test_the_teacher_was_asked_once_and_its_rows_stay_in_its_ids(ran: Ran) -> None:
    """The same recipe without a trimmed vocabulary finds all that the teacher did."""
    student = json.dumps({**STUDENT, "vocabulary": None})
    nodes = build_graph(load_recipe(str(QUICKSTART), [*ran.overrides, f"student={student}"]), ran.store)
    assert "vocabulary" not in nodes
    for name in ("prompts", "teacher", "answers", "curate", "soft_labels"):
        assert nodes[name].fingerprint == ran.records[name].fingerprint, name
    assert nodes["student.0"].fingerprint != ran.records["student.0"].fingerprint
    assert ran.records["student.0"].upstream["vocabulary"] == ran.records["vocabulary"].fingerprint


def test_the_kept_mass_is_the_teachers_own(ran: Ran, tmp_path: Path) -> None:
    """Against dense probabilities at the temperature of the draws; 25 draws a position over some hundred positions."""
    summary = ran.records["student.0"].summary["vocabulary"]
    assert ran.records["ablation_hard.0"].summary["vocabulary"] == {**summary, "kept_mass": None}
    teacher_path = model_of(ran, "teacher", tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(ran.recipe.teacher.model)  # type: ignore[union-attr]
    token_map = read_token_map(model_of(ran, "student.0", tmp_path))
    assert token_map is not None
    assert load_tokenizer(teacher_path).eos_token_id == 0
    masses = []
    curated = materialize(ran.store, ran.records["curate"], tmp_path / "curate")
    for row in pq.read_table(curated / "rows.parquet").to_pylist():
        with torch.no_grad():
            logits_TV = teacher(input_ids=torch.tensor([row["ids"]])).logits[0, row["first_supervised"] - 1 : -1, :420]
        masses += torch.softmax(logits_TV / 2.0, -1)[:, torch.from_numpy(token_map.full_ids)].sum(-1).tolist()
    assert summary["kept_mass"] == pytest.approx(np.mean(masses), abs=0.01)


def test_too_little_kept_mass_ends_the_run(ran: Ran) -> None:
    strict = load_recipe(str(QUICKSTART), [*ran.overrides, "student.vocabulary.least_kept_mass=1.0"])
    node = build_graph(strict, ran.store)["student.0"]
    with pytest.raises(
        TrainingError, match=r"keeps \d+ of 420 tokens, and they hold 0\.\d{4} of the teacher's probability on \d+ training"
    ):
        run_node(strict, build_graph(strict, ran.store), node.name, store=ran.store, tick=silent, extra={})


def test_it_is_described_before_and_after(ran: Ran, kd) -> None:
    recipe = ran.recipe
    before, after = describe(recipe), describe(recipe, kept_tokens=trimmed_tokens(recipe, ran.store))
    assert (before.untrimmed, after.untrimmed) == (True, False)
    assert before.student.vocabulary == 426
    record = ran.records["student.0"].summary
    assert (after.student.vocabulary, after.student.parameters, after.student.bytes) == (
        record["vocabulary"]["tokens"],
        record["parameters"],
        record["bytes"],
    )
    words = [word for override in ran.overrides for word in ("--set", override)]
    said = json.loads(kd("student", "describe", QUICKSTART, *words, "--json").out)
    assert said["student"]["parameters"] == record["parameters"]
    assert said["ratios"]["vocabulary"] == record["vocabulary"]["tokens"] / 426
    assert "upper bounds" in kd("student", "describe", QUICKSTART, *words, "--set", "student.vocabulary.num_common=1").out


def test_a_pretrained_student_under_adapters_and_dense_labels(ran: Ran, tmp_path: Path) -> None:
    """Adapters leave the embeddings alone: they are the kept rows of the whole model's. Dense labels are the conditional distribution."""
    model = load_recipe(str(QUICKSTART), ran.overrides).teacher.model  # type: ignore[union-attr]
    student = {"kind": "pretrained", "model": model, "adapter": {"kind": "lora", "rank": 2, "alpha": 4}, "vocabulary": {"keep": "data"}}
    changed = [f"student={json.dumps(student)}", "student.vocabulary.least_kept_mass=0.2", "soft_labels={kind: dense}"]
    trained = record_of(ran, [*changed, "objective.temperature=1.0"], "soft_labels", "vocabulary", "student.0")
    path = materialize(ran.store, trained, tmp_path) / "model"
    written, token_map = AutoModelForCausalLM.from_pretrained(path), read_token_map(path)
    assert token_map is not None
    whole = AutoModelForCausalLM.from_pretrained(model)
    kept_S = torch.from_numpy(token_map.full_ids)
    assert torch.equal(written.model.embed_tokens.weight, whole.model.embed_tokens.weight[kept_S])
    assert not torch.equal(written.model.layers[0].self_attn.q_proj.weight, whole.model.layers[0].self_attn.q_proj.weight)
    first = logged_metrics(ran.store, trained)[0]
    assert first["soft"] == pytest.approx(0.0, abs=1e-5), "the student is the teacher, given that the token is a kept one"


def test_a_student_from_a_config_has_the_small_tokenizers_size(ran: Ran) -> None:
    architecture = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "intermediate_size": 16, "max_positions": 128}
    student = {"kind": "config", "architecture": architecture, "vocabulary": STUDENT["vocabulary"]}
    overrides = [f"student={json.dumps(student)}"]
    trained = record_of(ran, overrides, "student.0")
    recipe = load_recipe(str(QUICKSTART), [*ran.overrides, *overrides])
    tokens = ran.records["vocabulary"].summary["tokens"]
    assert trained.upstream["vocabulary"] == ran.records["vocabulary"].fingerprint, "one vocabulary for students of any kind"
    assert trained.summary["vocabulary"]["tokens"] == tokens
    assert trained.summary["parameters"] == describe(recipe, kept_tokens=tokens).student.parameters
    plan = {stage.name: stage for stage in make_plan(recipe, ran.store).stages}
    assert plan["vocabulary"].status == "hit"
    assert plan["student"].bytes == 0
    more = load_recipe(str(QUICKSTART), [*ran.overrides, *overrides, "student.vocabulary.num_common=3"])
    missing = {stage.name: stage for stage in make_plan(more, ran.store).stages}
    assert (missing["vocabulary"].status, missing["student"].bytes) == ("miss", None)
    assert 0.0 < (missing["vocabulary"].seconds or 0.0) < 60.0


@pytest.mark.parametrize("cached", [False, True])
def test_inner_states_are_compared_on_the_same_text(ran: Ran, cached: bool) -> None:
    """The teacher's own blocks as the student: with the teacher reading its own ids there is nothing to learn at the first step."""
    features = {"kind": "hidden_states", "source": "cached"} if cached else {"kind": "relations", "num_heads": 2}
    student = json.dumps({**STUDENT, "last_blocks": None})
    changed = [f"objective.features={json.dumps(features)}", f"student={student}", "hidden_states={blocks: [0, 1]}"]
    record = record_of(ran, changed, "hidden_states", "student.0")
    first = logged_metrics(ran.store, record)[0]
    assert record.summary["feature_blocks"] == [[0, 0], [1, 1]]
    assert cached or abs(first["feature"]) < 1e-6
    assert first["feature"] >= 0.0


# ---------------------------------------------------------------------------------------------- measured


def test_losses_are_of_the_same_text_and_distances_over_shared_tokens(ran: Ran, tmp_path: Path) -> None:
    """By hand, on a gold answer that the student spells in more tokens than the teacher."""
    teacher = load_directory(Path(ran.recipe.teacher.model), device=CPU, tokenizer=load_tokenizer(Path(ran.recipe.teacher.model)))  # type: ignore[union-attr]
    path = model_of(ran, "student.0", tmp_path)
    student = load_directory(path, device=CPU, tokenizer=load_tokenizer(path))
    item = {"prompt_id": "a", "prompt": "7+5=", "gold": " electromagnetic#12", "reference": None}
    theirs, ours = (encode_gold(model.tokenizer, item["gold"]) for model in (teacher, student))
    assert len(ours) > len(theirs)

    def scored(model: Any, teacher: Any = teacher) -> dict[str, Any]:
        found = measure(
            model,
            {"suite": pa.Table.from_pylist([item])},
            seed=0,
            answers=None,
            task=ran.recipe.task,
            run=ran.recipe.run,
            teacher=teacher,
            tick=silent,
        )
        [row] = found.scores.to_pylist()
        return row

    def logprobs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1, : model.num_columns]
        return torch.log_softmax(logits.double(), -1)

    prompts = [encode_prompt(model.tokenizer, item["prompt"], ran.recipe.task) for model in (teacher, student)]
    log_q = logprobs(student, prompts[1], ours)
    token_map = student.token_map
    assert token_map is not None
    log_p = logprobs(teacher, prompts[0], token_map.restore(np.array(ours)).tolist())[:, torch.from_numpy(token_map.full_ids)]
    log_p = torch.log_softmax(log_p, -1)
    found = scored(student)
    assert found["tokens"] == len(theirs)
    assert found["nll_sum"] == pytest.approx(-float(log_q[range(len(ours)), ours].sum()), abs=1e-4)
    assert found["kl_sum"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), abs=1e-4)
    agreed = float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    assert found["agreement_sum"] == pytest.approx(agreed * len(theirs))
    own = scored(teacher)
    assert (own["tokens"], own["kl_sum"], own["agreement_sum"]) == (len(theirs), 0.0, len(theirs))
    heir = scored(student, teacher=replace(student, token_map=None))  # a champion beside a teacher that it once was
    assert (heir["tokens"], heir["kl_sum"], heir["agreement_sum"]) == (len(ours), 0.0, len(ours))
    assert scored(replace(student, token_map=TokenMap((0, 1), 5, "another")))["kl_sum"] is None


# ---------------------------------------------------------------------------------------------- exported

_PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
messages = [{"role": "user", "content": "7+5="}]
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
said = model.generate(**inputs)[0, inputs["input_ids"].shape[1]:]
foreign = "Zo\\u00eb \\u4e2d\\u6587 \\U0001f600"
assert tokenizer.decode(tokenizer.encode(foreign)) == foreign
assert not [name for name in sys.modules if name.startswith("kd_core")]
print(json.dumps({"columns": model.config.vocab_size, "said": said.tolist()}))
"""


@pytest.mark.slow
def test_the_export_loads_in_a_process_without_this_project(ran: Ran, kd, tmp_path: Path) -> None:
    words = [word for override in ran.overrides for word in ("--set", override)]
    called = kd("export", QUICKSTART, "--out", tmp_path / "student", *words)
    assert called.code == 0, called.err
    assert "tokens of the full tokenizer 420" in (tmp_path / "student/README.md").read_text()
    plain = subprocess.run(
        [sys.executable, "-I", "-c", _PLAIN, str(tmp_path / "student")], capture_output=True, text=True, cwd="/", check=False
    )
    assert plain.returncode == 0, plain.stderr
    said = json.loads(plain.stdout)
    assert said["columns"] == ran.records["vocabulary"].summary["tokens"]
    assert 0 < len(said["said"]) <= 6
    loaded = load_directory(tmp_path / "student", device=CPU, tokenizer=load_tokenizer(tmp_path / "student"))
    assert loaded.token_map == read_token_map(model_of(ran, "vocabulary", tmp_path))


@pytest.mark.parametrize("form", [("--quantize", "int8-weight-only"), pytest.param(("--onnx",), marks=pytest.mark.slow)])
def test_further_forms_are_compared_in_the_students_ids(form: tuple[str, ...], ran: Ran, kd, tmp_path: Path) -> None:
    pytest.importorskip("torchao" if form[0] == "--quantize" else "onnxscript")
    words = [word for override in ran.overrides for word in ("--set", override)]
    called = kd("export", QUICKSTART, "--out", tmp_path / "student", "--json", *form, *words)
    assert called.code == 0, called.err
    [parity] = json.loads(called.out)["parity"]
    assert parity["positions"] > 20
    assert parity["max_kl"] < 1e-2
