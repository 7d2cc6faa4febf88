"""A finished student leaves: what is written, what is refused, and that plain transformers says what our evaluation says."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kd_core.export.card import Card, render_card
from kd_core.export.licences import model_licence
from kd_core.export.lineage import collect_lineage
from kd_core.export.parity import Bound, compare_forms
from kd_core.export.quantized import settle_header
from kd_core.export.student import generation_config
from kd_core.fingerprint import sha256_file
from kd_core.recipe import Answers, ModelRef
from kd_core.recipe.files import load_recipe, parse_recipe
from kd_core.stages.graph import build_graph
from kd_core.store import LocalStore
from kd_core.summaries import plain
from kd_core.teacher.generate import generate
from kd_core.teacher.models import load_directory, load_tokenizer, save_model
from kd_core.tokens.encoding import encode_prompt
from tests.standins import SUMMARIES

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
GREEDY = Answers(num_samples=1, temperature=0.0, max_tokens=20)
NO_KEY = "0" * 32


@pytest.fixture
def export(finished, kd):
    """``export(out, *words)``: kd export of the finished recipe, from an empty directory."""

    def call(out, *words):
        return kd("export", finished.recipe_file, "--out", out, "--set", f"run.store={finished.store}", *words)

    return call


def everything(directory):
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def student_record(finished):
    recipe = load_recipe(finished.recipe_file, [f"run.store={finished.store}"])
    node = build_graph(recipe, LocalStore(finished.store))["student.0"]
    return finished.store / "artifacts" / "train" / node.fingerprint


# ------------------------------------------------------------------------------------------- what is written


def test_the_directory_holds_the_recorded_weights_and_their_lineage(finished, export, tmp_path):
    called = export("out/student", "--json")
    assert (called.code, called.err) == (0, "")
    said, out = json.loads(called.out), tmp_path / "out/student"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["student"]
    record = json.loads((student_record(finished) / "record.json").read_text())["record"]
    recorded = {file["name"]: file["sha256"] for file in record["files"]}
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert said["files"][name]["sha256"] == recorded[f"model/{name}"] == sha256_file(out / name), name
    assert said["verdict"] == {name: finished.said["verdict"][name] for name in ("promote", "headline")}
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["files"] == said["files"]
    assert set(everything(out)) == {*said["files"], "README.md", "lineage.json"}
    done = {node["name"]: node for node in finished.said["nodes"] if node["name"] != "publish"}
    assert {name: (node["fingerprint"], node["digest"]) for name, node in lineage["nodes"].items()} == {
        name: (node["fingerprint"], node["digest"]) for name, node in done.items()
    }
    assert said["student"] == lineage["student"] == {"seed": 0, **{k: done["student.0"][k] for k in ("fingerprint", "digest")}}
    assert str(finished.home) not in (out / "lineage.json").read_text()


def test_the_recipe_beside_the_weights_is_the_one_that_made_them(finished, export, tmp_path):
    assert export("student").code == 0
    written = parse_recipe(yaml.safe_load((tmp_path / "student/recipe.yaml").read_text()), origin="recipe.yaml")
    store = LocalStore(finished.store)
    theirs = {node["name"]: node["fingerprint"] for node in finished.said["nodes"] if node["name"] != "publish"}
    assert {name: node.fingerprint for name, node in build_graph(written, store).items() if name != "publish"} == theirs


def test_the_card_says_what_the_records_say(finished, export, kd, tmp_path):
    assert export("student").code == 0
    card = (tmp_path / "student/README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["knowledge-distillation"]}
    report = json.loads(kd("report", "--json", finished.recipe_file, "--set", f"run.store={finished.store}").out)
    assert set(report["models"]) == {"teacher", "student", "baseline", "ablation_hard"}
    for model in report["models"].values():
        for found in model["metrics"].values():
            assert f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" in card
    assert report["verdict"]["headline"] in card
    for said in (
        "| `reasoning_gym:chain_sum` | 233 | 18 | 33 |",
        "No benchmark with a source of its own is measured",
        "65 rows of the teacher's gold data fall on the held-out sides",
        "A model trained by this recipe from scratch on the gold data above, 21,184 parameters.",
        "The suites are small (at most 20 items)",
        "One training seed",
        "100% of its answers met the token limit",
        "kind: forward_kl",
    ):
        assert said in card, said
    assert "None" not in card


@pytest.fixture
def card(finished):
    """``card(recipe, **changes)``: the card of the finished student, as if it were another recipe's."""
    own = load_recipe(finished.recipe_file, [f"run.store={finished.store}"])
    lineage = collect_lineage(own, LocalStore(finished.store), seed=None, command="kd run")

    def render(recipe, *, prompts, teacher, **changes):
        records = {
            **lineage.records,
            "prompts": replace(lineage.records["prompts"], **prompts),
            "teacher": replace(lineage.records["teacher"], **teacher),
        }
        changed = replace(lineage, recipe=recipe, records=records, **changes)
        return render_card(Card(changed, {"do_sample": False}, True, (), {"torch": "2"}, None))

    return render


def test_the_card_of_a_benchmarked_student_of_others_weights(finished, card):
    """A server's teacher, a pre-trained student, benchmarks, three seeds, a gate that says no."""
    recipe = load_recipe(ROOT / "recipes/r1-math-qwen.yaml", ["seeds=[0,1,2]"])
    sources = [source.model_dump(mode="json") for source in recipe.prompts.sources]
    benchmarks = [{"name": s.name, "source": s.source.model_dump(mode="json")} for s in recipe.evaluation.suites]
    report = json.loads(next((finished.store / "artifacts/report").glob("*/*/report.json")).read_text())
    report["verdict"] = {"promote": False, "headline": "Not promoted.", "reasons": [], "champion": None}
    said = card(
        recipe,
        prompts={
            "identity": {"sources": sources, "benchmarks": benchmarks},
            "summary": plain(replace(SUMMARIES["prompts"], counts={"overlap.aime_2024": 3})),
        },
        teacher={"identity": {}, "summary": plain(replace(SUMMARIES["teacher"], parameters=None, counts={}))},
        report=report,
    )
    header = yaml.safe_load(said.split("---\n")[1])
    assert header["license"] == "unknown"
    assert header["base_model"] == "Qwen/Qwen2.5-Math-1.5B"
    assert header["datasets"] == ["open-r1/OpenR1-Math-220k"], "benchmarks are no training data"
    for line in (
        "| benchmark aime_2024, measured only | `HuggingFaceH4/aime_2024 train at 2fe88a2f1091` |",
        "| aime_2024 | 3 | 0 |",
        "| math_500 | 0 | 0 |",
        "behind a server: only its texts were seen. Licence: unknown.",
        "Its weights come from a model whose licence is not known here",
        "The scores are over 3 training seeds; this is the student of seed 0.",
        "scored at temperature 0.6; the generation config here is greedy",
        "The gate refused it",
        "Please reason step by step",
        "goes through the tokenizer's chat template",
    ):
        assert line in said, line


def test_the_card_of_a_student_made_of_its_teacher_has_the_teachers_licence(card):
    recipe = load_recipe(ROOT / "recipes/smollm2-gsm8k-cpu.yaml", ['description="```\\n# <b>mine</b>"', 'prompts.sources.0.id="o|p/`q`"'])
    said = card(
        recipe,
        prompts={"identity": {"sources": [source.model_dump(mode="json") for source in recipe.prompts.sources], "benchmarks": []}},
        teacher={"identity": {}, "summary": plain(replace(SUMMARIES["teacher"], parameters=134_515_008, counts={}))},
        teacher_licence="apache-2.0",
        base_licence="apache-2.0",
    )
    assert yaml.safe_load(said.split("---\n")[1])["license"] == "apache-2.0"
    assert "134,515,008 parameters, run in bfloat16. Licence: `apache-2.0`." in said
    assert "````text\n```\n# <b>mine</b>\n````" in said, "text of users is never Markdown"
    assert r"| prompts | `` o\|p/`q` main train at 740312add88f `` |" in said
    assert "Answers were never sampled in the evaluation" in said
    assert "not known" not in said


def test_the_same_inputs_give_the_same_bytes(export, tmp_path):
    assert export("one").code == export("two", "--seed", 0).code == 0
    assert everything(tmp_path / "one") == everything(tmp_path / "two")


# ------------------------------------------------------------------------------------------- what is refused


def test_a_directory_in_use_is_left_as_it_is(export, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, why in (("used", "not empty"), ("file", "no directory"), ("link", "no directory"), ("file/below", "cannot|nothing can")):
        called = export(out)
        assert (called.code, called.out) == (2, "")
        assert f"--out {out}" in called.err
        assert any(word in called.err for word in why.split("|")), called.err
    assert everything(tmp_path) == {"used/notes.txt": b"mine", "file": b"mine"}
    (tmp_path / "empty").mkdir()
    assert export("empty").code == 0


def test_an_unfinished_student_names_the_command_and_writes_nothing(small_recipe, kd, tmp_path):
    called = kd("export", small_recipe, "--out", "student", "--set", "training.steps=26")
    assert called.code == 1
    assert called.err.rstrip().endswith(f"kd run {small_recipe} --set training.steps=26")
    assert list(tmp_path.iterdir()) == []


def test_a_student_without_its_report_stays(copy, kd, tmp_path):
    before = set(tmp_path.iterdir())
    [record] = (copy.store / "artifacts/report").glob("*/record.json")
    record.unlink()
    called = kd("export", copy.recipe_file, "--out", "student")
    assert called.code == 1
    assert "report is not done" in called.err
    assert f"kd run {copy.recipe_file}" in called.err
    assert set(tmp_path.iterdir()) == before


def test_a_seed_the_recipe_has_not(export, tmp_path):
    called = export("student", "--seed", 4)
    assert called.code == 2
    assert "--seed 4" in called.err
    assert "[0]" in called.err
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_do_not_leave(copy, kd, tmp_path):
    before = set(tmp_path.iterdir())
    [weights] = student_record(copy).glob("*/model/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(bytes(data))
    called = kd("export", copy.recipe_file, "--out", "student")
    assert called.code == 1
    assert "model.safetensors" in called.err
    assert "sha256" in called.err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("words", "package"), [(["--quantize", "int8-dynamic"], "torchao"), (["--onnx"], "onnxruntime")])
def test_a_missing_package_is_one_line_with_the_command(words, package, export, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest))
    called = export("student", *words)
    assert called.code == 1
    assert called.err.count("\n") == 1
    assert "pip install" in called.err
    assert package in called.err
    assert list(tmp_path.iterdir()) == []


def test_another_scheme_is_wrong_usage(export):
    called = export("student", "--quantize", "int2")
    assert called.code == 2
    assert "int8-weight-only" in called.err


# ------------------------------------------------------------------------------------------- it says the same elsewhere

_ELSEWHERE = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("kd_core") is None, "this process must not know the project"
from transformers import AutoModelForCausalLM, AutoTokenizer
said = []
for directory in sys.argv[2:]:
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    for prompt in ("1+2-6=", "7+5-9+4=", "3-9="):
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
        said.append(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:].tolist())
print(json.dumps(said))
card = open(sys.argv[2] + "/README.md").read()
code = card.split("```python\\n")[1].split("```")[0]
exec(code.replace('path = "."', "path = sys.argv[2]").replace('prompt = "..."', 'prompt = "1+2-6="'))  # prints the answer
"""


def test_plain_transformers_in_a_fresh_process_gives_the_tokens_of_our_evaluation(finished, export, tiny_model, tmp_path):
    """The exported student, and a random model whose answers differ (a student of 25 steps says one thing).

    -I ignores PYTHON* and the working directory; -S leaves out .pth files, by which an editable install is found.
    """
    assert export("student").code == 0
    recipe = load_recipe(finished.recipe_file)
    random = tiny_model(seed=3)
    save_model(random, tmp_path)
    generation_config(recipe, random).save_pretrained(tmp_path / "model")
    [files] = student_record(finished).glob("*/model")
    expected = []
    for ours in (load_directory(files, device=CPU, tokenizer=load_tokenizer(files)), random):
        ids = [encode_prompt(ours.tokenizer, prompt, recipe.task) for prompt in ("1+2-6=", "7+5-9+4=", "3-9=")]
        expected += [answer.ids for answer in generate(ours, ids, keys=[NO_KEY] * 3, answers=recipe.evaluation.generate)]
    assert len({tuple(answer) for answer in expected}) > 3
    (tmp_path / "cwd").mkdir()
    packages = Path(torch.__file__).parents[1]
    command = [sys.executable, "-I", "-S", "-c", _ELSEWHERE, packages, tmp_path / "student", tmp_path / "model"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "cwd", timeout=120)
    assert done.returncode == 0, done.stderr
    tokens, answer = done.stdout.splitlines()
    assert json.loads(tokens) == expected
    assert answer == random.tokenizer.decode(expected[0], skip_special_tokens=True), "the card's own example"


def test_the_generation_config_says_what_our_sampler_says(tiny_model, small_recipe, tmp_path):
    """Models with more columns than tokens, and opinions: what no token has is never said, and answers end where ours end."""
    lengths = set()
    for seed in range(6):
        loaded = tiny_model(seed=seed)
        loaded.model.save_pretrained(tmp_path / str(seed))
        config = generation_config(load_recipe(small_recipe), loaded)
        config.save_pretrained(tmp_path / str(seed))
        assert config.suppress_tokens == list(range(17, 24))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / str(seed))
        for prompt in ([2, 3, 4], [9], [5, 5, 5, 12, 8]):
            [expected] = generate(loaded, [prompt], keys=[NO_KEY], answers=GREEDY)
            inputs = torch.tensor([prompt])
            said = plain.generate(inputs, attention_mask=torch.ones_like(inputs))[0, len(prompt) :].tolist()
            assert said == expected.ids
            lengths.add(len(said))
    assert max(lengths) == 20
    assert min(lengths) < 20, "no answer ended by itself"


# ------------------------------------------------------------------------------------------- licences and parity


def test_a_licence_is_what_its_authors_state_or_unknown(tmp_path):
    ref = ModelRef(model=str(tmp_path))
    assert model_licence(ref) is None
    for text, licence in (
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model", "apache-2.0"),
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", "mit, cc-by-4.0"),
        ("---\ntags: [a]\n---\n", None),
        ("# license: mit\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: [\n---\n", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert model_licence(ref) == licence, text


@pytest.mark.parametrize("licence", ["mit", None])
def test_a_gguf_file_states_its_licence_in_its_header(licence, tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_name("a model")
    if licence is not None:
        writer.add_license(licence)
    writer.add_tensor("t", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with mock.patch("kd_core.export.licences.locate", return_value=tmp_path / "model.gguf"):
        assert model_licence(ModelRef(model="pkg://package/model.gguf")) == licence


def _fixed(*rows):
    """A form that says these probabilities at every position."""
    probabilities = torch.tensor(rows, dtype=torch.float64)
    return lambda ids_BT, attention_BT: probabilities.log()[ids_BT]


def test_parity_by_hand():
    reference = _fixed([0.5, 0.25, 0.25], [0.8, 0.1, 0.1])
    other = _fixed([0.25, 0.5, 0.25], [0.8, 0.1, 0.1])
    found = compare_forms("x", reference, other, [[0, 1, 1], [1, 0, 0, 0], [1, 1]], num_columns=3, bound=Bound(1.0, 1.0))
    at_zero = 0.5 * torch.tensor(2.0).log().item() - 0.25 * torch.tensor(2.0).log().item()
    assert (found.rows, found.positions) == (3, 6)  # predicting positions 0 1 / 1 0 0 / 1; padding is not among them
    assert found.max_kl == pytest.approx(at_zero)
    assert found.mean_kl == pytest.approx(3 * at_zero / 6)
    assert found.agreement == 0.5
    assert found.require() is found


def test_parity_is_taken_over_the_columns_that_tokens_have():
    reference, other = _fixed([0.5, 0.25, 0.25], [0.2, 0.2, 0.6]), _fixed([0.2, 0.1, 0.7], [0.1, 0.1, 0.8])
    assert compare_forms("x", reference, other, [[0, 1, 0]], num_columns=2, bound=Bound(0.0, 0.0)).max_kl < 1e-12


@pytest.mark.parametrize("other", [[0.001, 0.999], [float("nan"), 0.5]])
def test_a_form_that_is_another_model_is_refused(other):
    from kd_core.errors import KDError

    found = compare_forms("broken", _fixed([0.9, 0.1]), _fixed(other), [[0, 0, 0]], num_columns=2, bound=Bound(0.05, 10.0))
    assert not found.holds
    with pytest.raises(KDError, match="broken: this form is not the same model"):
        found.require()


def test_a_settled_header_is_sorted_and_keeps_every_tensor(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = {"b": torch.arange(5, dtype=torch.int8), "a": torch.randn(3, 2)}
    metadata = {name: "é" * i for i, name in enumerate("zkabqm")}
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    settle_header(tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert {name: torch.equal(loaded[name], tensors[name]) for name in loaded} == {"a": True, "b": True}
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == metadata
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert list(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]) == sorted(metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


# ------------------------------------------------------------------------------------------- optional forms


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weight-only"])
def test_int8_weights_load_and_are_the_same_model(scheme, finished, export, tmp_path):
    pytest.importorskip("torchao")
    for out in ("one", "two"):
        called = export(out, "--quantize", scheme, "--json")
        assert called.code == 0, called.err
    [parity] = json.loads(called.out)["parity"]
    assert parity["form"] == scheme
    assert parity["positions"] > 100
    assert 0.0 < parity["mean_kl"] <= parity["max_kl"] < 1e-3
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    card = (tmp_path / "one/README.md").read_text()
    assert f"| {scheme} | {parity['rows']} | {parity['positions']} |" in card
    assert "pip install torchao" in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert "Int8" in type(model.model.layers[0].mlp.up_proj.weight).__name__
    assert model.generation_config.max_new_tokens == 20


def test_a_form_outside_its_bound_is_not_written(export, tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr("kd_core.export.student.QUANTIZED_BOUNDS", {"int8-dynamic": Bound(1e-12, 1e-12)})
    called = export("student", "--quantize", "int8-dynamic")
    assert called.code == 1
    assert "not the same model" in called.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_onnx_graph_says_what_the_model_says(finished, export, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    called = export("student", "--onnx", "--json")
    assert called.code == 0, called.err
    [parity] = json.loads(called.out)["parity"]
    assert (parity["form"], parity["agreement"]) == ("onnx", 1.0)
    graph = tmp_path / "student/onnx/model.onnx"
    assert str(Path(torch.__file__).parents[1]).encode() not in graph.read_bytes()
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for shape in ((1, 1), (3, 14)):  # other than the shape it was traced with
        ids = torch.randint(0, 17, shape)
        mask = torch.ones_like(ids)
        mask[0, 10:] = 0
        [said] = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        expected = model(input_ids=ids, attention_mask=mask).logits.detach()
        assert torch.allclose(torch.from_numpy(said)[mask == 1], expected[mask == 1], atol=1e-4)
