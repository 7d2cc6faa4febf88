"""The plan against a real finished run of a tiny recipe, against an empty store, and against hub data sets."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from flows.cli.tables import plan_table, show
from kd_core.artifacts import find
from kd_core.errors import RecipeError, SourceError
from kd_core.planning.basis import Basis
from kd_core.planning.costs import (
    PASS_SECONDS,
    epoch_requests,
    forward_seconds,
    measured_seconds,
    soft_label_bytes,
    training_seconds,
    write_requests,
)
from kd_core.planning.known import Known
from kd_core.planning.plan import Plan, StagePlan, make_plan, plan_json
from kd_core.planning.soft_labels import SoftLabelOption, scoring_rate
from kd_core.progress import silent
from kd_core.recipe import Dense, Recipe, Run, Sampled, TopK
from kd_core.recipe.files import load_recipe, parse_recipe
from kd_core.rows.parquet import GROUP_ROWS
from kd_core.stages.graph import build_graph
from kd_core.stages.run import run_node
from kd_core.store import LocalStore
from kd_core.summaries import shards_of
from tests.standins import SUMMARIES

ROOT = Path(__file__).parents[2]
KEYS = ["name", "fingerprint", "status", "rows", "rows_cached", "tokens", "bytes", "requests", "seconds", "price"]
GROUPS = [
    "prompts",
    "teacher",
    "answers",
    "curate",
    "soft_labels",
    "student",
    "baseline",
    "ablation_hard",
    "evaluate",
    "gate",
    "report",
    "publish",
]
MINUTE = 60.0


def _sums() -> Iterator[tuple[str, str]]:
    for a, b in product(range(20), range(20)):
        yield f"{a}+{b}=", f"{a}+{b}={a + b}#{a + b}"


def _write_sums(path: Path, count: int) -> None:
    rows = [pair for _, pair in zip(range(count), _sums(), strict=False)]
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows))


def _data(data: Path) -> dict[str, Any]:
    source = {"kind": "file", "path": str(data), "prompt": "{q}", "gold": "{a}"}
    architecture = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32, "max_positions": 64}
    training = {"steps": 4, "batch_rows": 8, "learning_rate": 0.003}
    return {
        "name": "tiny",
        "seeds": [0, 1],
        "task": {"template": "plain", "answer_marker": "#", "verifier": "math"},
        "prompts": {"sources": [{**source, "limit": 60}], "split": {"validation": 0.1, "test": 0.15}},
        "teacher": {
            "kind": "trained",
            "sources": [source],
            "tokenizer": {"kind": "characters", "alphabet": "0123456789+=#"},
            "architecture": {**architecture, "num_layers": 2},
            "training": training,
        },
        "answers": {"num_samples": 2, "temperature": 1.0, "max_tokens": 8},
        "curate": {"verify": False, "keep_truncated": True, "gold_rows": 20},
        "soft_labels": {"kind": "sampled", "num_draws": 4, "temperature": 1.0},
        "student": {"kind": "config", "architecture": architecture},
        "objective": {"supervision": "soft", "soft_weight": 1.0},
        "training": training,
        "evaluation": {
            "suites": [{"kind": "held_out", "name": "held_out"}],
            "generate": {"num_samples": 1, "temperature": 0.0, "max_tokens": 8},
            "compare": ["teacher", "baseline", "ablation_hard"],
        },
        "gate": {"rules": [{"kind": "floor", "metric": "pass_at_1", "minimum": 0.1}]},
        "publish": "tiny",
    }


def _recipe(data: Path, **changes: Any) -> Recipe:
    return parse_recipe({**_data(data), **changes}, origin="test")


def _lines(plan: Plan) -> dict[str, StagePlan]:
    return {stage.name: stage for stage in plan.stages}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    _write_sums(path, 200)
    return path


@pytest.fixture
def finished(ran: LocalStore, tmp_path: Path) -> LocalStore:
    """A store in which the tiny recipe ran, the test's own: some add to it."""
    shutil.copytree(ran.uri, tmp_path / "finished")
    return LocalStore(tmp_path / "finished")


@pytest.fixture(scope="module")
def ran(data: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A store in which the tiny recipe ran; report and publication are stand-ins."""
    store = LocalStore(tmp_path_factory.mktemp("finished") / "store")
    recipe = _recipe(data)
    for node in build_graph(recipe, store).values():
        run_node(
            recipe,
            build_graph(recipe, store),
            node.name,
            store=store,
            tick=silent,
            extra={"report": lambda job: SUMMARIES["report"], "publish": lambda job: SUMMARIES["publish"]},
        )
    return store


@pytest.fixture
def empty(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


# ---------------------------------------------------------------------------------------------- lines and fingerprints


def test_the_lines_are_the_groups_of_the_graph_in_order(data: Path, empty: LocalStore) -> None:
    plan = plan_json(make_plan(_recipe(data), empty))
    assert list(plan) == ["stages", "total", "soft_label_options", "notes"]
    assert [stage["name"] for stage in plan["stages"]] == GROUPS
    assert all(list(stage) == KEYS for stage in plan["stages"])
    assert json.loads(json.dumps(plan)) == plan
    alone = {**_data(data)["evaluation"], "compare": []}
    gold = _recipe(data, answers=None, soft_labels=None, objective={"supervision": "gold"}, evaluation=alone)
    assert [stage.name for stage in make_plan(gold, empty).stages] == [
        "prompts",
        "teacher",
        "curate",
        "student",
        "evaluate",
        "gate",
        "report",
        "publish",
    ]


def test_a_group_of_one_node_has_its_fingerprint_and_others_one_of_their_own(data: Path, empty: LocalStore) -> None:
    recipe = _recipe(data)
    nodes, lines = build_graph(recipe, empty), _lines(make_plan(recipe, empty))
    assert all(lines[name].fingerprint == nodes[name].fingerprint for name in GROUPS if name in nodes)
    assert "student" not in nodes
    more = _lines(make_plan(_recipe(data, seeds=[0, 1, 2]), empty))
    assert {name for name in GROUPS if more[name].fingerprint == lines[name].fingerprint} == {
        "prompts",
        "teacher",
        "answers",
        "curate",
        "soft_labels",
    }


# ---------------------------------------------------------------------------------------------- hits, misses, parts


def test_nothing_is_there_before_the_first_run(data: Path, empty: LocalStore) -> None:
    lines = _lines(make_plan(_recipe(data), empty))
    assert {line.status for line in lines.values()} == {"miss"}
    assert {line.rows_cached for line in lines.values()} == {0, None}
    assert all(line.seconds is not None and 0 < line.seconds < MINUTE for line in lines.values())
    assert all(line.price is None for line in lines.values())


def test_what_a_first_run_was_expected_to_do_is_what_it_did(data: Path, empty: LocalStore, finished: LocalStore) -> None:
    recipe = _recipe(data)
    before, after = _lines(make_plan(recipe, empty)), _lines(make_plan(recipe, finished))
    for name in ("prompts", "answers", "evaluate"):
        assert before[name].rows == after[name].rows
    rows = find(finished, "curate", build_graph(recipe, finished)["curate"].fingerprint)
    assert rows is not None
    counts = rows.summary["counts"]
    assert before["curate"].rows == counts["read"] + counts["gold"]
    assert before["soft_labels"].rows == before["curate"].rows
    assert before["student"].rows == 2 * counts["read"] + 2 * counts["gold"]
    assert before["baseline"].rows == after["baseline"].rows == 2 * counts["gold"]
    answers = find(finished, "answers", build_graph(recipe, finished)["answers"].fingerprint)
    assert answers is not None
    assert before["answers"].rows is not None
    assert before["answers"].tokens == 8 * before["answers"].rows >= answers.summary["tokens"], "gold answers are longer than the bound"
    gold = [len(q) + len(a) + 1 for q, a in list(_sums())[:200]]
    assert before["teacher"].tokens == round(4 * 8 * sum(gold) / len(gold))
    teacher = find(finished, "teacher", build_graph(recipe, finished)["teacher"].fingerprint)
    assert teacher is not None
    assert before["teacher"].bytes == teacher.summary["bytes"]


def test_a_second_run_is_all_hits_and_costs_nothing(data: Path, finished: LocalStore) -> None:
    plan = make_plan(_recipe(data, run={"price_per_hour": 3.0}), finished)
    assert {line.status for line in plan.stages} == {"hit"}
    assert {(line.tokens, line.bytes, line.requests, line.seconds, line.price) for line in plan.stages} == {(0, 0, 0, 0.0, 0.0)}
    assert (plan.total.bytes, plan.total.requests, plan.total.seconds, plan.total.price) == (0, 0, 0.0, 0.0)
    [note] = plan.notes
    assert re.fullmatch(r"rows: (\d+) of \1 rows \(100\.0%\) are learnt from, with (\d+) of \2 supervised tokens", note), (
        "nothing was estimated"
    )
    assert all(line.rows == line.rows_cached for line in plan.stages)
    assert {line.name for line in plan.stages if line.rows is None} == {"gate", "report", "publish"}


def test_more_prompts_cost_only_themselves(data: Path, finished: LocalStore) -> None:
    grown = _data(data)
    grown["prompts"]["sources"][0]["limit"] = 66
    recipe = parse_recipe(grown, origin="test")
    old, new = _lines(make_plan(_recipe(data), finished)), _lines(make_plan(recipe, finished))
    assert new["prompts"].rows == 66
    assert (new["prompts"].status, new["teacher"].status, new["answers"].status) == ("miss", "hit", "partial")
    assert new["answers"].rows_cached == old["answers"].rows
    added = new["answers"].rows - old["answers"].rows  # type: ignore[operator]
    assert 0 < added <= 12
    assert new["soft_labels"].status == "partial"
    assert 0 < new["soft_labels"].rows_cached <= old["answers"].rows  # type: ignore[operator]
    for node in build_graph(recipe, finished).values():
        run_node(recipe, build_graph(recipe, finished), node.name, store=finished, tick=silent, extra={})
        if node.name == "answers":
            break
    first, second = (find(finished, "answers", build_graph(r, finished)["answers"].fingerprint) for r in (_recipe(data), recipe))
    assert first is not None
    assert second is not None
    assert second.summary["shards"]["rows_computed"] == added, "the plan promised exactly this"
    assert new["answers"].tokens == round(added * first.summary["tokens"] / first.summary["shards"]["rows"]), (
        "as long as this teacher's others"
    )


def test_soft_labels_are_counted_exactly_after_curation(data: Path, finished: LocalStore) -> None:
    fewer = _recipe(data, curate={"verify": False, "keep_truncated": True, "gold_rows": 21})
    for node in build_graph(fewer, finished).values():
        run_node(fewer, build_graph(fewer, finished), node.name, store=finished, tick=silent, extra={})
        if node.name == "curate":
            break
    line = _lines(make_plan(fewer, finished))["soft_labels"]
    assert line.status == "partial"
    assert line.rows is not None
    assert line.rows_cached == line.rows - 1
    assert line.tokens is not None
    assert 6 <= line.tokens <= 13, "one gold answer such as 3+17=20#20, and its end"


def test_another_teacher_makes_everything_of_its_work_a_miss(data: Path, finished: LocalStore) -> None:
    changed = _data(data)
    changed["teacher"]["training"] = {**changed["teacher"]["training"], "steps": 5}
    lines = _lines(make_plan(parse_recipe(changed, origin="test"), finished))
    assert {name for name, line in lines.items() if line.status == "hit"} == {"prompts"}
    assert {lines[name].rows_cached for name in ("teacher", "answers", "soft_labels", "student", "evaluate")} == {0}
    assert lines["answers"].rows == _lines(make_plan(_recipe(data), finished))["answers"].rows


def test_one_seed_more_is_a_part_of_its_group(data: Path, finished: LocalStore) -> None:
    old = _lines(make_plan(_recipe(data), finished))
    new = _lines(make_plan(_recipe(data, seeds=[0, 1, 2]), finished))
    for name in ("student", "baseline", "ablation_hard"):
        assert (new[name].status, new[name].rows_cached) == ("partial", old[name].rows)
        assert new[name].rows == 1.5 * old[name].rows  # type: ignore[operator]
        assert (
            new[name].bytes
            == 4 * find(finished, "train", build_graph(_recipe(data), finished)["student.0"].fingerprint).summary["parameters"]
        )  # type: ignore[union-attr]
    items = old["evaluate"].rows // 7  # type: ignore[operator]  # one teacher, three models of two seeds
    assert (new["evaluate"].status, new["evaluate"].rows_cached, new["evaluate"].rows) == ("partial", items, 10 * items)


# ---------------------------------------------------------------------------------------------- seconds and price


def test_measured_rates_win_over_assumed_ones(data: Path, finished: LocalStore) -> None:
    longer = _data(data)
    longer["training"] = {**longer["training"], "steps": 400}
    line = _lines(make_plan(parse_recipe(longer, origin="test"), finished))["ablation_hard"]
    hard = [record for record in _train_records(_recipe(data), finished) if record.identity["objective"]["supervision"] != "soft"]
    slowest = max(record.summary["training"]["seconds"] for record in hard)
    assert line.seconds == pytest.approx(2 * 100 * slowest)


def _train_records(recipe: Recipe, store: LocalStore) -> list[Any]:
    nodes = [node for node in build_graph(recipe, store).values() if node.stage == "train"]
    return [find(store, node.stage, node.fingerprint) for node in nodes]


def test_the_record_with_the_most_work_sets_the_rate() -> None:
    records: Any = [(1.0, 50.0), None, (10.0, 20.0), (0.0, 9.0)]
    assert measured_seconds(records, lambda pair: pair) == 2.0  # type: ignore[arg-type, return-value]
    assert measured_seconds(records[1:2] + records[3:], lambda pair: pair) is None  # type: ignore[arg-type, return-value]


def test_arithmetic_where_nothing_is_measured() -> None:
    run = Run(device="cpu", threads=2)
    assert forward_seconds(10**6, tokens=3000, passes=0, run=run) == pytest.approx(0.1)
    assert training_seconds(10**6, tokens=1000, steps=0, run=run) == pytest.approx(0.1)
    assert training_seconds(1, tokens=1, steps=10, run=run) == pytest.approx(30 * PASS_SECONDS, rel=1e-3)
    assert forward_seconds(10**9, tokens=1000, passes=0, run=Run(device="cuda")) == pytest.approx(0.1)


def test_time_and_a_servers_tokens_are_priced(data: Path, empty: LocalStore) -> None:
    teacher = {"kind": "server", "model": "big", "revision": "1", "price_per_million_tokens": 2.0}
    student = {"kind": "pretrained", "model": "org/small", "revision": "0" * 40}
    evaluation = {**_data(data)["evaluation"], "compare": []}
    server = {"teacher": teacher, "student": student, "soft_labels": None, "objective": {"supervision": "hard"}, "evaluation": evaluation}
    lines = _lines(make_plan(_recipe(data, **server, run={"price_per_hour": 7.2, "teacher_concurrency": 10}), empty))
    answers = lines["answers"]
    assert answers.tokens is not None
    assert answers.seconds == pytest.approx(answers.tokens / 200, abs=0.01)
    assert answers.price == pytest.approx(answers.tokens * 2e-6 + answers.seconds * 0.002)
    assert lines["teacher"].price == 0.0
    assert lines["student"].price is None, "a student on the hub has no size here, so its time is unknown"
    unpriced = _lines(make_plan(_recipe(data, **server), empty))
    assert unpriced["answers"].price == pytest.approx(answers.tokens * 2e-6)
    assert {line.price for name, line in unpriced.items() if name != "answers"} == {None}


# ---------------------------------------------------------------------------------------------- what cannot be known


def test_hub_data_sets_are_not_fetched(data: Path, empty: LocalStore) -> None:
    hub = {"kind": "dataset", "id": "org/none", "revision": "0" * 40, "split": "train", "prompt": "{q}", "gold": "{a}"}
    limited = {"sources": [{**hub, "limit": 1000}], "split": {"validation": 0.1, "test": 0.1}}
    lines = _lines(make_plan(_recipe(data, prompts=limited), empty))
    rows = {name: lines[name].rows for name in ("prompts", "answers", "curate", "soft_labels", "student", "baseline", "evaluate")}
    expected = {"prompts": 1000, "answers": 1600, "curate": 1620, "soft_labels": 1620, "student": 3240, "baseline": 40, "evaluate": 700}
    assert rows == expected
    assert lines["answers"].tokens == 1600 * 8, "without a gold answer to measure, the bound"
    assert lines["student"].tokens == 2 * 4 * 8 * (240 + 8), "prompts are as long as is assumed"
    assert {lines[name].seconds is None for name in rows} == {False}
    unlimited = {"sources": [hub], "split": {"validation": 0.1, "test": 0.1}}
    plan = make_plan(_recipe(data, prompts=unlimited), empty)
    lines = _lines(plan)
    assert {lines[name].rows for name in rows} == {None}
    assert {lines[name].seconds for name in rows} == {None, lines["student"].seconds}
    assert set(plan.total.unknown) == {"prompts", "answers", "curate", "soft_labels", "evaluate"}
    assert {(option.rows, option.bytes, option.seconds) for option in plan.soft_label_options} == {(None, None, None)}


def test_a_source_that_is_not_there_is_an_error(tmp_path: Path, empty: LocalStore) -> None:
    with pytest.raises(SourceError, match=r"^prompts\.sources\.0\.path: no file at"):
        make_plan(_recipe(tmp_path / "none.jsonl"), empty)


# ---------------------------------------------------------------------------------------------- what it does not do


def test_it_writes_nothing_needs_no_torch_and_takes_little_time(data: Path, finished: LocalStore, tmp_path: Path) -> None:
    """CPU time of a whole process, imports included; the goal is 2.5 s, the bounds leave room for busy machines."""
    code = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from kd_core.planning.plan import make_plan\n"
        "from kd_core.recipe.files import load_recipe\n"
        "from kd_core.store import LocalStore\n"
        "make_plan(load_recipe(sys.argv[1]), LocalStore(Path(sys.argv[2])))\n"
        "print(json.dumps([sorted({'torch', 'transformers', 'datasets', 'boto3'} & set(sys.modules)), time.process_time()]))\n"
    )
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(_data(data)))
    for file, store, bound in ((recipe, finished.uri, 4.0), (ROOT / "recipes" / "quickstart.yaml", str(tmp_path / "none"), 8.0)):
        before = _tree(Path(store))
        done = subprocess.run([sys.executable, "-c", code, str(file), store], capture_output=True, text=True, check=True, cwd=ROOT)
        imported, seconds = json.loads(done.stdout)
        assert imported == []
        assert seconds < bound
        assert _tree(Path(store)) == before


def _tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


# ---------------------------------------------------------------------------------------------- soft labels


def _chosen(plan: Plan) -> SoftLabelOption:
    (option,) = [option for option in plan.soft_label_options if option.chosen]
    return option


def _line_of(option: SoftLabelOption) -> tuple[Any, ...]:
    return option.rows, option.rows_cached, option.tokens, option.bytes, option.write_requests, option.seconds, option.price


@pytest.mark.parametrize("limit", [60, 70, 90])
def test_the_recipes_own_option_is_its_line(data: Path, empty: LocalStore, finished: LocalStore, limit: int) -> None:
    changed = _data(data)
    changed["prompts"]["sources"][0]["limit"] = limit
    run = {"price_per_hour": 2.0, "price_per_thousand_requests": 0.5, "price_per_gb_month": 0.02}
    for store in (empty, finished):
        plan = make_plan(parse_recipe({**changed, "run": run}, origin="test"), store)
        line, option = _lines(plan)["soft_labels"], _chosen(plan)
        assert _line_of(option) == (line.rows, line.rows_cached, line.tokens, line.bytes, line.requests, line.seconds, line.price)
        done = store is finished and limit == 60
        assert [bool(number) for number in _line_of(option)[2:]] == [not done] * 5


@pytest.mark.parametrize(
    ("policy", "temperature", "expected"),
    [
        ({"kind": "sampled", "num_draws": 4, "temperature": 2.0}, 2.0, ["sampled 2", "sampled 4", "sampled 8", "dense"]),
        ({"kind": "sampled", "num_draws": 1, "temperature": 1.0}, 1.0, ["sampled 1", "sampled 2", "dense"]),
        ({"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]}, 2.0, ["topk 8", "sampled 12", "sampled 25", "sampled 50", "dense"]),
        (
            {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]},
            {"kind": "piecewise", "values": [1.0, 2.0], "at": [0.5]},
            ["topk 8", "dense"],
        ),
        ({"kind": "dense"}, {"kind": "linear", "start": 4.0, "end": 1.0}, ["dense"]),
    ],
)
def test_options_are_what_the_objective_could_train_on(
    data: Path, empty: LocalStore, policy: dict[str, Any], temperature: Any, expected: list[str]
) -> None:
    """A vocabulary of 14 columns: top-k with 32 is refused by capture."""
    objective = {"supervision": "soft", "soft_weight": 1.0, "temperature": temperature}
    plan = make_plan(_recipe(data, soft_labels=policy, objective=objective), empty)
    named = [f"{o.policy['kind']} {o.policy.get('num_draws', o.policy.get('k', ''))}".strip() for o in plan.soft_label_options]
    assert sorted(named) == sorted(expected)
    for option in plan.soft_label_options:
        _recipe(data, soft_labels=option.policy, objective=objective)  # a recipe with it is a valid one
    assert _chosen(plan).policy == {"max_refused_rows": 0, **policy}
    sizes = [option.bytes_a_token for option in plan.soft_label_options]
    assert sizes == sorted(sizes)  # type: ignore[type-var]
    assert len({option.seconds for option in plan.soft_label_options}) == 1, "the teacher reads the same tokens"


def test_a_large_vocabulary_is_offered_top_k_and_warned_of_dense(empty: LocalStore) -> None:
    """The recipe of a pre-trained teacher, before anything has run: its files' headers and assumed lengths are enough."""
    plan = make_plan(load_recipe(ROOT / "recipes" / "smollm2-gsm8k-cpu.yaml"), empty)
    options = {(o.policy["kind"], o.policy.get("num_draws", o.policy.get("k"))): o for o in plan.soft_label_options}
    assert list(options) == [("sampled", 25), ("sampled", 50), ("sampled", 100), ("topk", 32), ("topk", 128), ("dense", None)]
    assert options["sampled", 50].chosen
    assert [option.tokens for option in plan.soft_label_options] == [224 * 128] * 6
    assert options["dense", None].bytes == pytest.approx(224 * 128 * 49_152 * 4, rel=0.01)
    assert 8 < options["sampled", 25].bytes_a_token < options["topk", 128].bytes_a_token < 250  # type: ignore[operator]
    assert plan.total.unknown == ()
    assert [note.partition(":")[0] for note in plan.notes] == ["lengths", "answers", "template", "scoring", "soft labels' bytes"]


def test_without_soft_labels_nothing_is_offered(data: Path, empty: LocalStore) -> None:
    evaluation = {**_data(data)["evaluation"], "compare": []}
    plan = make_plan(_recipe(data, objective={"supervision": "hard"}, evaluation=evaluation), empty)
    assert plan.soft_label_options == ()
    assert not [note for note in plan.notes if note.startswith(("scoring:", "soft labels'"))]


def test_a_stated_rate_wins_over_a_measured_one_and_that_over_arithmetic(data: Path, empty: LocalStore, finished: LocalStore) -> None:
    changed = _data(data)
    changed["prompts"]["sources"][0]["limit"] = 90
    recipe = parse_recipe(changed, origin="test")
    known = [
        Known(Basis(recipe, store, nodes, _records(store, nodes))) for store in (empty, finished) for nodes in [build_graph(recipe, store)]
    ]
    arithmetic, measured = map(scoring_rate, known)
    assert arithmetic is not None
    assert measured is not None
    assert arithmetic.source == "arithmetic"
    work = []
    for record in known[1].basis.finished("soft_labels"):
        curated = find(finished, "curate", record.upstream["curate"])
        assert curated is not None
        shards = shards_of(record)
        assert shards is not None
        work.append((curated.summary["tokens"] * shards.rows_computed / shards.rows, record.seconds))
    tokens, seconds = max(work)
    assert (measured.source, measured.tokens_per_second) == ("measured", pytest.approx(tokens / seconds))
    stated = parse_recipe({**changed, "run": {"score_tokens_per_second": 50.0}}, origin="test")
    for store in (empty, finished):
        plan = make_plan(stated, store)
        option = _chosen(plan)
        assert option.seconds is not None
        assert option.tokens is not None
        assert option.seconds > option.tokens / 50, "prompts are read too"
        assert any(note.startswith("scoring: 50 tokens/s") for note in plan.notes)
    slower = make_plan(parse_recipe({**changed, "run": {"score_tokens_per_second": 25.0}}, origin="test"), finished)
    assert _chosen(slower).seconds == pytest.approx(2 * _chosen(make_plan(stated, finished)).seconds)  # type: ignore[operator]


def _records(store: LocalStore, nodes: dict[str, Any]) -> dict[str, Any]:
    return {name: find(store, node.stage, node.fingerprint) for name, node in nodes.items()}


def test_bytes_and_requests_are_those_of_the_run_that_follows(data: Path, finished: LocalStore) -> None:
    changed = _data(data)
    changed["prompts"]["sources"][0]["limit"] = 110
    recipe = parse_recipe({**changed, "run": {"shard_rows": 16}}, origin="test")
    for name in ("answers", "soft_labels"):
        for node in build_graph(recipe, finished).values():
            if node.name == name:
                break
            run_node(recipe, build_graph(recipe, finished), node.name, store=finished, tick=silent, extra={})
        before, plan = _objects(finished, name), make_plan(recipe, finished)
        assert _lines(plan)[name].rows_cached
        run_node(recipe, build_graph(recipe, finished), name, store=finished, tick=silent, extra={})
        added = {key: size for key, size in _objects(finished, name).items() if key not in before}
        shards = sum(size for key, size in added.items() if "/shards/" in key)
        assert _lines(plan)[name].requests == len(added)
        assert _lines(plan)[name].bytes == pytest.approx(shards, rel=0.4)
    assert any("as measured on stored labels of kind sampled" in note for note in plan.notes)


def _objects(store: LocalStore, table: str) -> dict[str, int]:
    return {info.key: info.size_bytes for info in store.list(f"rows/{table}/") if not info.key.endswith("/about.json")}


def test_requests_follow_the_shards() -> None:
    assert [write_requests(rows, shard_rows=100) for rows in (0, 1, 100, 101, 250)] == [0, 2, 2, 4, 6]
    groups_and_footers = {
        0: 0,
        1: 1 + 1,
        GROUP_ROWS: 1 + 1,
        GROUP_ROWS + 1: 2 + 1,
        512: 512 // GROUP_ROWS + 1,
        513: 512 // GROUP_ROWS + 1 + 2,
    }
    assert {rows: epoch_requests(rows, shard_rows=512) for rows in groups_and_footers} == groups_and_footers


def test_training_reads_labels_every_epoch(data: Path, empty: LocalStore) -> None:
    longer = _recipe(data, training={"steps": 400, "batch_rows": 8, "learning_rate": 0.003}, run={"shard_rows": 64})
    plan = make_plan(longer, empty)
    lines, option = _lines(plan), _chosen(plan)
    assert option.rows is not None
    assert option.epoch_requests is not None
    epochs = 400 * 8 / option.rows
    assert lines["student"].requests == pytest.approx(2 * epochs * option.epoch_requests, abs=2), "two seeds"
    assert (lines["baseline"].requests, lines["ablation_hard"].requests) == (0, 0)
    assert plan.total.requests == sum(line.requests or 0 for line in plan.stages)


def test_requests_and_storage_are_priced(data: Path, empty: LocalStore) -> None:
    prices = {"price_per_thousand_requests": 10.0, "price_per_gb_month": 1e6}
    plan = make_plan(_recipe(data, run=prices), empty)
    for line in plan.stages:
        assert line.price == (None if line.requests is None else pytest.approx(0.01 * line.requests))
    assert plan.total.price == pytest.approx(0.01 * plan.total.requests)
    assert plan.total.price_a_month == pytest.approx(plan.total.bytes / 1000)
    for option in plan.soft_label_options:
        assert option.price == pytest.approx(0.01 * option.write_requests)  # type: ignore[operator]
        assert option.price_a_month == pytest.approx(option.bytes / 1000, abs=1e-3)  # type: ignore[operator]


def test_hidden_states_are_planned_like_soft_labels(data: Path, empty: LocalStore) -> None:
    lines = _lines(make_plan(_recipe(data, hidden_states={"blocks": [0, 1], "width": 8}), empty))
    hidden, labels = lines["hidden_states"], lines["soft_labels"]
    assert (hidden.rows, hidden.tokens, hidden.requests, hidden.seconds) == (labels.rows, labels.tokens, labels.requests, labels.seconds)
    assert hidden.tokens is not None
    whole = _lines(make_plan(_recipe(data, hidden_states={"blocks": [0, 1]}), empty))["hidden_states"]
    assert whole.bytes - hidden.bytes == 2 * 8 * hidden.tokens, "16 columns of the teacher against 8, in two blocks"  # type: ignore[operator]


def test_features_are_planned_with_the_pairs_that_training_will_use(data: Path, empty: LocalStore) -> None:
    states, objective = {"blocks": [1], "width": 8}, {"supervision": "soft", "soft_weight": 1.0}
    plain = make_plan(_recipe(data, hidden_states=states, objective=objective), empty)
    cached, live = ({"kind": "hidden_states", "source": source} for source in ("cached", "live"))
    read = make_plan(_recipe(data, hidden_states=states, objective={**objective, "features": cached}), empty)
    beside = make_plan(_recipe(data, objective={**objective, "features": live}), empty)
    (note,) = [note for note in read.notes if note.startswith("features")]
    assert note == (
        "features (hidden_states), read from the store: the student's blocks learn from the teacher's: 0 from 1 (of 1 and 2 blocks, "
        "evenly spaced)"
    )
    (note,) = [note for note in beside.notes if note.startswith("features")]
    assert "with the teacher beside the student in every step: the student's blocks learn from the teacher's: 0 from 1" in note
    assert not [note for note in plain.notes if note.startswith("features")]
    without, reading, running = (_lines(plan)["student"] for plan in (plain, read, beside))
    assert reading.requests == 2 * without.requests > 0  # type: ignore[operator]
    assert reading.seconds == without.seconds < running.seconds  # type: ignore[operator]
    assert _lines(beside)["ablation_hard"].seconds == without.seconds
    wrong = {**objective, "features": {**cached, "blocks": [{"student": 0, "teacher": 0}]}}
    with pytest.raises(RecipeError, match=r"the teacher's blocks \[0\] are not among hidden_states.blocks \[1\]"):
        _recipe(data, hidden_states=states, objective=wrong)


def test_people_see_the_options_and_where_figures_come_from(data: Path, empty: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    show(plan_table(make_plan(_recipe(data, run={"price_per_gb_month": 0.02}), empty), {}))
    text = capsys.readouterr().out
    shown = [line for line in text.splitlines() if line.startswith(("sampled,", "dense"))]
    assert [line.split("  ")[0] for line in shown] == [f"sampled, {n} draws at T 1" for n in (2, 4, 8)] + ["dense"]
    assert [" * " in line for line in shown] == [False, True, False, False]
    assert "Keeping what is added costs" in text
    assert "- scoring: " in text


# ---------------------------------------------------------------------------------------------- bytes


def test_bytes_of_a_position_by_the_codecs_law() -> None:
    """Real figures, bytes a position: SmolLM2-135M on GSM8K, 6,338 positions, through the codec."""
    measured = {
        Sampled(kind="sampled", num_draws=25, temperature=1.0): (6.25, 0.4),
        Sampled(kind="sampled", num_draws=100, temperature=1.0): (12.36, 0.5),
        TopK(kind="topk", k=32, temperatures=(1.0,)): (45.45, 0.1),
        TopK(kind="topk", k=128, temperatures=(1.0,)): (145.8, 0.1),
        TopK(kind="topk", k=128, temperatures=(1.0, 2.0, 4.0)): (186.2, 0.1),
    }
    for policy, (found, off) in measured.items():
        law = soft_label_bytes(policy, num_columns=49_152)
        assert law == soft_label_bytes(policy, num_columns=None)
        assert law == pytest.approx(found, rel=off)
        assert isinstance(policy, TopK) or law > found, "this text has few choices; a plan is rather too dear"
    assert soft_label_bytes(Dense(kind="dense"), num_columns=20) == 80.0
    assert soft_label_bytes(Dense(kind="dense"), num_columns=None) is None
    few = soft_label_bytes(Sampled(kind="sampled", num_draws=1000, temperature=1.0), num_columns=5)
    assert few == pytest.approx(0.9 + 1.08 * 5), "no more ids than there are columns"


@pytest.mark.parametrize("more", ["", ", narrower: {hidden_size: 64}", ", share_embeddings: true"])
def test_blocks_that_the_teacher_does_not_have_are_refused_before_it_works(tmp_path: Path, more: str) -> None:
    quickstart = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    recipe = load_recipe(quickstart, [f"student={{kind: from_teacher, blocks: [0, 7]{more}}}"])
    with pytest.raises(RecipeError, match=r"^student\.blocks: 7, and the teacher has 4 blocks; use numbers from 0 to 3$"):
        make_plan(recipe, LocalStore(tmp_path))


@pytest.mark.parametrize(("student", "match"), [("narrower: {num_heads: 64}", "num_heads: 64"), ("num_kv_heads: 3", "num_kv_heads")])
def test_a_student_that_cannot_be_made_is_refused_before_the_teacher_works(tmp_path: Path, student: str, match: str) -> None:
    quickstart = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    recipe = load_recipe(quickstart, [f"student={{kind: from_teacher, every_nth_block: 2, {student}}}"])
    with pytest.raises(RecipeError, match=match):
        make_plan(recipe, LocalStore(tmp_path))
