"""kd cache on the store of a whole run: what it prints, what it returns, and that what it repairs is computed again."""

import csv
import io
import json

import pyarrow.parquet as pq
import pytest
import torch

from kd_core.recipe import S3Options
from kd_core.rows.table import RowCache
from kd_core.store import LocalStore, open_store


@pytest.fixture
def there(finished, kd, monkeypatch):
    """``kd cache`` beside the finished run's store, which must stay as it is."""
    monkeypatch.chdir(finished.home)

    def call(*words):
        return kd("cache", *words)

    return call


def spaces(store: LocalStore) -> dict[str, RowCache]:
    return {key.split("/")[1]: RowCache(store, *key.split("/")[1:3]) for key in (info.key for info in store.list("rows/"))}


# ------------------------------------------------------------------------------------------- looking


def test_ls_lists_both_tables(there, finished):
    called = there("ls", "--json")
    assert (called.code, called.err) == (0, "")
    said = json.loads(called.out)
    assert said["store"] == str(finished.store)
    found = {row["table"]: row for row in said["namespaces"]}
    assert set(found) == {"answers", "soft_labels"}
    for table, cache in spaces(LocalStore(finished.store)).items():
        row, commits = found[table], cache.snapshot().commits
        assert (row["namespace"], row["commits"]) == (cache.namespace, len(commits))
        assert row["rows"] == len({key for commit in commits for key in commit.keys})
        assert row["bytes"] == sum(commit.size_bytes for commit in commits)
        assert row["tokens"] == sum(commit.num_tokens for commit in commits) > 0
        assert row["age_seconds"] >= 0
        assert row["teacher"].startswith("trained ")
    assert found["soft_labels"]["policy"].startswith("sampled num_draws=")
    shown = there("ls").out
    assert all(row["namespace"][:12] in shown for row in found.values())


def test_a_store_that_is_not_there_is_an_error_and_is_not_made(there, tmp_path):
    called = there("ls", "--store", str(tmp_path / "gone"))
    assert (called.code, called.out) == (2, "")
    assert f"no store at {tmp_path / 'gone'}: name one with --store" in called.err
    assert not (tmp_path / "gone").exists()


def test_stats_of_each_table(there, finished):
    for table, cache in spaces(LocalStore(finished.store)).items():
        said = json.loads(there("stats", cache.namespace[:8], "--json").out)
        assert (said["table"], said["rows"], said["orphan_shards"]) == (table, len(cache.snapshot().keys()), 0)
        assert sum(said["bytes_by_part"].values()) == cache.snapshot().size_bytes()
        assert sum(said["finish_reasons"].values()) == said["rows"]
        called = there("stats", cache.namespace)
        assert (called.code, called.err) == (0, "")
        assert ("Rows by mean entropy" in called.out) == (table == "soft_labels")
    called = there("stats")
    assert (called.code, called.out) == (1, "")
    assert "say which namespace; there are: " in called.err


def test_sql_prints_a_table_json_or_csv(there):
    query = "SELECT source, count(*) AS n, avg(mean_entropy) AS entropy FROM soft_labels GROUP BY source ORDER BY source"
    called = there("sql", query, "--json")
    assert (called.code, called.err) == (0, "")
    rows = json.loads(called.out)
    assert {row["source"] for row in rows} == {"gold", "teacher"}
    assert all(row["n"] > 0 and row["entropy"] > 0 for row in rows)
    table = list(csv.DictReader(io.StringIO(there("sql", query, "--csv").out)))
    assert [(row["source"], int(row["n"]), float(row["entropy"])) for row in table] == [tuple(row.values()) for row in rows]
    shown = there("sql", query).out.splitlines()
    assert shown[0].split() == ["source", "n", "entropy"]
    assert [line.split()[:2] for line in shown[1:]] == [[row["source"], str(row["n"])] for row in rows]


def test_sql_prints_odd_values_as_plain_ones(there):
    query = (
        "SELECT 'nan'::FLOAT AS a, '\\x01\\xFF'::BLOB AS b, [1, 2] AS c, {'d': 1.5::DECIMAL(4, 1)} AS e, NULL AS f, DATE '2026-11-22' AS g"
    )
    [row] = json.loads(there("sql", query, "--json").out)
    assert row == {"a": None, "b": "01ff", "c": [1, 2], "e": {"d": 1.5}, "f": None, "g": "2026-11-22"}
    assert json.loads(there("sql", "SELECT 1 AS a WHERE false", "--json").out) == []
    assert there("sql", "SELECT 1 AS a WHERE false", "--csv").out == "a\n"
    many = there("sql", "SELECT range AS a FROM range(150)")
    assert len(many.out.splitlines()) == 102
    assert many.out.splitlines()[-1] == "... these are the first 100 rows; --csv or --json prints all"
    assert len(json.loads(there("sql", "SELECT range AS a FROM range(150)", "--json").out)) == 150


def test_json_of_two_columns_of_one_name_is_refused_and_csv_keeps_both(there):
    """A JSON object would hold one of them."""
    called = there("sql", "SELECT 1 AS a, 2 AS a, 3 AS b", "--json")
    assert (called.code, called.out) == (2, "")
    assert "these name several columns: a; rename them with AS" in called.err
    assert there("sql", "SELECT 1 AS a, 2 AS a, 3 AS b", "--csv").out == "a,a,b\n1,2,3\n"
    [row] = json.loads(there("sql", "SELECT 1.50::DECIMAL(4, 2) AS d, 7::DECIMAL(18, 0) AS e, 9007199254740993 AS f", "--json").out)
    assert row == {"d": 1.5, "e": 7, "f": 9007199254740993}


def test_a_reader_that_stops_early_is_no_error(kd_process):
    for form in ("--csv", "--json"):
        process = kd_process("cache", "sql", "SELECT range AS a FROM range(1000000)", form, "--store", ".")
        assert process.stdout.readline() in ("a\n", "[\n")
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, "")


@pytest.mark.stack
def test_a_bucket_answers_as_a_directory_does(there, finished, s3_environment):
    endpoint, where = s3_environment.urls["s3"], f"s3://{s3_environment.bucket}/cache-cli"
    bucket = open_store(where, S3Options(endpoint=endpoint))
    local = LocalStore(finished.store)
    for prefix in ("rows/", "artifacts/", "ledger/"):
        for info in local.list(prefix):
            assert bucket.create(info.key, local.get(info.key))
    for words in (
        ("sql", "SELECT finish_reason, sum(num_supervised) AS n FROM soft_labels GROUP BY ALL ORDER BY n", "--csv"),
        ("explode", "--limit", "3", "--json"),
        ("verify",),
        ("repair",),
    ):
        there_called, here = there(*words, "--store", where, "--s3-endpoint", endpoint), there(*words)
        assert (there_called.code, there_called.err.splitlines()) == (0, [])
        assert there_called.out == here.out
    called = there("ls", "--store", f"s3://{s3_environment.bucket}-not", "--s3-endpoint", endpoint)
    assert (called.code, called.out) == (2, "")
    assert "there is no bucket" in called.err


def test_explode_to_screen_and_files(there, tmp_path):
    key = json.loads(there("sql", "SELECT key FROM soft_labels ORDER BY key LIMIT 1", "--json").out)[0]["key"]
    rows = json.loads(there("explode", "--key", key, "--json").out)
    assert {row["key"] for row in rows} == {key}
    shown = there("explode", "--key", key).out.splitlines()
    assert shown[0].split()[:4] == ["key", "position", "token_id", "probability"]
    for name in ("out.parquet", "out.csv"):
        called = there("explode", "--limit", "5", "--out", tmp_path / name)
        assert called.out.startswith(f"Written: {tmp_path / name} (")
    table = pq.read_table(tmp_path / "out.parquet")
    assert len(set(table["key"].to_pylist())) == 5
    with (tmp_path / "out.csv").open() as file:
        assert [row["token_id"] for row in csv.DictReader(file)] == [str(i) for i in table["token_id"].to_pylist()]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("sql", "SELECT nothing_like_it FROM soft_labels"), 2, "nothing_like_it"),
        (("sql", "DROP VIEW soft_labels"), 2, "one SELECT is expected"),
        (("sql", "SELECT * FROM 'secret.csv'"), 2, "disabled by configuration"),
        (("gc", "--grace", "soon"), 2, "'soon' is no duration; write a number with s, m, h, d or w, for example 7d"),
        (("gc", "--grace", "7"), 2, "'7' is no duration"),
        (("verify", "--sample", "0"), 2, "0 is no share"),
        (("verify", "--live", "nowhere.yaml"), 2, "nowhere.yaml: cannot be read"),
        (("explode", "--out", "x.txt"), 2, "write to a name that ends in .parquet or .csv"),
        (("explode", "--key", "nowhere"), 1, "has no row nowhere"),
        (("explode", "--namespace", "zz"), 1, "'zz' names 0 namespaces"),
        (("ls", "--store", "gs://bucket"), 2, "use s3://bucket/prefix or a local directory"),
    ],
)
def test_what_goes_wrong_is_one_line(there, words, code, said):
    called = there(*words)
    assert (called.code, called.out) == (code, "")
    [line] = called.err.splitlines()
    assert said in line


def test_every_command_is_content_with_an_empty_store(kd, tmp_path):
    store = tmp_path / "empty"
    store.mkdir()
    for words in (("ls",), ("verify",), ("repair",), ("gc",), ("sql", "SELECT * FROM namespaces")):
        called = kd("cache", *words, "--store", str(store), "--json")
        assert (called.code, called.err) == (0, ""), words
        json.loads(called.out)
        assert kd("cache", *words, "--store", str(store)).code == 0
    assert list(store.iterdir()) == []


# ------------------------------------------------------------------------------------------- looking after


def _flip(path, at: int = 200) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_is_named_put_aside_and_computed_again(copy, kd):
    assert kd("cache", "verify").code == 0
    store = LocalStore(copy.store)
    caches = spaces(store)
    broken = [cache.shard_key(cache.snapshot().commits[0]) for cache in caches.values()]
    rows = {table: set(cache.snapshot().keys()) for table, cache in caches.items()}
    for key in broken:
        _flip(copy.store / key)
    called = kd("cache", "verify", "--json")
    assert (called.code, called.err) == (1, "")
    assert [damage["key"] for damage in json.loads(called.out)["damage"]] == sorted(broken)
    shown = kd("cache", "verify").out
    assert all(f"rows/{table}/{cache.namespace}" in shown for table, cache in caches.items())

    planned = json.loads(kd("cache", "repair", "--json").out)
    assert not planned["done"]
    assert not list(store.list("quarantine/"))
    assert "Nothing was changed; do it with --yes." in kd("cache", "repair").out
    done = json.loads(kd("cache", "repair", "--yes", "--json").out)
    assert (done["done"], done["moves"]) == (True, planned["moves"])
    assert {f"quarantine/{key}" for key in broken} <= {info.key for info in store.list("quarantine/")}
    called = kd("cache", "verify", "--json")
    assert called.code == 1, "what was made from the records that were put aside is there, and they are not"
    assert all("gone, and" in damage["reason"] for damage in json.loads(called.out)["damage"])

    again = json.loads(kd("run", "--local", "--json", copy.recipe_file).out)
    computed = {node["name"] for node in again["nodes"] if node["status"] == "computed"}
    assert {"answers", "soft_labels"} <= computed
    assert not any(name.startswith(("student", "baseline", "teacher")) for name in computed)
    assert {table: set(cache.snapshot().keys()) for table, cache in caches.items()} == rows
    assert kd("cache", "verify").out.endswith("all is as committed.\n")
    assert kd("cache", "repair").out == "Nothing is damaged.\n"


def test_gc_says_first_and_leaves_a_run_whole(copy, kd):
    store = LocalStore(copy.store)
    cache = spaces(store)["soft_labels"]
    stray = f"{cache.prefix}/shards/{'0' * 64}.parquet"
    before = {info.key for info in store.list("")}
    store.create(stray, b"stray")
    assert kd("cache", "gc").out.startswith("Nothing to delete in ")
    said = json.loads(kd("cache", "gc", "--grace", "0", "--json").out)
    assert ([item["key"] for item in said["objects"]], said["bytes"], said["done"]) == ([stray], 5, False)
    called = kd("cache", "gc", "--grace", "0s", "--namespaces")
    assert f"{cache.prefix}/shards/0000" in called.out
    assert called.out.endswith("1 objects, 5 B would be deleted; do it with --yes.\n")
    assert store.info(stray) is not None
    assert kd("cache", "gc", "--grace", "0s", "--namespaces", "--yes").out.endswith("1 objects, 5 B were deleted.\n")
    assert {info.key for info in store.list("")} == before
    again = json.loads(kd("run", "--local", "--json", copy.recipe_file).out)
    assert {node["status"] for node in again["nodes"]} <= {"hit", "computed"}
    assert {node["name"] for node in again["nodes"] if node["status"] == "computed"} <= {"publish"}  # another registry


def test_the_live_teacher_is_the_one_that_made_the_labels(there, finished, monkeypatch):
    """Trap 20: the same weights pass; a teacher that is a little off is seen, row by row."""
    called = there("verify", "--live", finished.recipe_file, "--rows", "5", "--json")
    assert (called.code, called.err) == (0, "")
    live = json.loads(called.out)["live"]
    assert (live["holds"], len(live["rows"]), live["refused"]) == (True, 5, {})
    assert all(row["same_ids"] > 0.9 for row in live["rows"])

    from kd_core.cache import parity

    load = parity.load_text_teacher

    def noisy(job):
        teacher = load(job)
        generator = torch.Generator().manual_seed(0)
        for weight in teacher.model.parameters():
            weight.add_(0.5 * weight.std() * torch.randn(weight.shape, generator=generator))
        return teacher

    monkeypatch.setattr(parity, "load_text_teacher", noisy)
    called = there("verify", "--live", finished.recipe_file, "--rows", "5")
    assert called.code == 1
    assert "The live teacher is not the one that made these labels" in called.out
    assert sum("differs" in line for line in called.out.splitlines()) >= 4
