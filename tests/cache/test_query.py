"""SQL over a store: committed rows once each, only the bytes that a question needs, nothing written, errors in one line."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from kd_core.cache.query import VIEWS, sql
from kd_core.errors import IntegrityError, StoreError
from kd_core.recipe import S3Options, TopK
from kd_core.rows.table import RowCache
from kd_core.store import LocalStore, S3Store, Store

A, B = "a" * 32, "b" * 32


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.stack)])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield LocalStore(tmp_path / "store")
        return
    info = request.getfixturevalue("s3_environment")
    s3 = S3Store(info.bucket, f"cache/{uuid.uuid4().hex}", options=S3Options(endpoint=info.urls["s3"]))
    yield s3
    s3.close()


def ask(store: Store, statement: str) -> list[tuple]:
    with sql(store, statement) as answer:
        return [tuple(row) for row in answer.rows]


def test_the_questions_of_the_issue(anywhere: Store, add_shard) -> None:
    add_shard(anywhere, range(6))
    add_shard(anywhere, range(6, 9))
    add_shard(anywhere, range(4), policy=TopK(kind="topk", k=3, temperatures=(1.0, 2.0)), namespace=B)
    where = f"WHERE namespace = '{A}'"
    by_source = ask(anywhere, f"SELECT source, count(*), avg(mean_entropy) FROM soft_labels {where} GROUP BY source ORDER BY source")
    assert [row[:2] for row in by_source] == [("gold", 4), ("teacher", 5)]
    assert all(0 < row[2] < 4 for row in by_source)
    tokens = sum(3 + row % 4 for row in range(9))
    by_teacher = ask(anywhere, "SELECT teacher, policy, sum(num_supervised) FROM soft_labels GROUP BY ALL ORDER BY policy")
    assert by_teacher == [
        ("org/teacher@01234567 float32", "sampled num_draws=25 temperature=2", tokens),
        ("org/teacher@01234567 float32", "topk k=3 temperatures=1,2", 3 + 4 + 5 + 6),
    ]
    reasons = ask(anywhere, f"SELECT finish_reason, count(*) AS n FROM soft_labels {where} GROUP BY ALL ORDER BY n")
    assert reasons == [("length", 2), ("stop", 7)]


def test_commits_and_namespaces_are_views(anywhere: Store, add_shard) -> None:
    commits = sorted([add_shard(anywhere, range(6)), add_shard(anywhere, range(4, 9))], key=lambda commit: commit.sha256)
    found = ask(anywhere, "SELECT * FROM commits ORDER BY sha256")
    assert found == [(A, "soft_labels", c.sha256, c.size_bytes, len(c.keys), c.num_tokens) for c in commits]
    size = sum(c.size_bytes for c in commits)
    query = "SELECT namespace, table_name, commits, rows, duplicate_rows, tokens, bytes, modified > TIMESTAMP '2020-01-01' FROM namespaces"
    assert ask(anywhere, query) == [(A, "soft_labels", 2, 9, 2, sum(c.num_tokens for c in commits), size, True)]


def test_stray_shards_are_not_seen_and_duplicates_once(store: LocalStore, add_shard) -> None:
    """Three overlapping shards of different content, and one without a commit: SQL sees what RowCache.read sees."""
    for rows, source in ((range(5), "x"), (range(3, 9), "y"), (range(2, 6), "z")):
        add_shard(store, rows, source=source)
    cache = RowCache(store, "soft_labels", A)
    data = store.get(cache.shard_key(cache.snapshot().commits[0]))
    store.create(f"{cache.prefix}/shards/{'0' * 64}.parquet", data)
    wanted = cache.read(cache.snapshot(), sorted(cache.snapshot().keys()))
    found = ask(store, "SELECT key, source FROM soft_labels ORDER BY key")
    assert found == list(zip(wanted["key"].to_pylist(), wanted["source"].to_pylist(), strict=True))
    assert len(found) == 9
    assert ask(store, "SELECT count(*) FROM soft_labels") == [(9,)]


class Counting(LocalStore):
    """A local store that adds up what is read of shards."""

    num_bytes = 0

    def get(self, key: str) -> bytes:
        assert not key.endswith(".parquet"), "a query reads ranges, never a whole shard"
        return super().get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        data = super().get_range(key, start, length)
        self.num_bytes += len(data)
        return data


def _wide_shard(store: Store, rows: int) -> None:
    """One shard whose targets are by far its largest column: 4 kB a row."""
    table = pa.table(
        {
            "key": [f"{i:032x}" for i in range(rows)],
            "source": ["gold", "teacher"] * (rows // 2),
            "num_supervised": pa.array([3] * rows, pa.int32()),
            "mean_entropy": pa.array([0.5, 1.5] * (rows // 2), pa.float32()),
            "targets": pa.array([bytes(4096)] * rows),
        }
    )
    RowCache(store, "soft_labels", A).commit(table, num_tokens=3 * rows)


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    store = Counting(tmp_path)
    _wide_shard(store, 640)
    assert ask(store, "SELECT source, avg(mean_entropy) FROM soft_labels GROUP BY source ORDER BY source") == [
        ("gold", 0.5),
        ("teacher", 1.5),
    ]
    plain, store.num_bytes = store.num_bytes, 0
    assert ask(store, "SELECT sum(octet_length(targets)) FROM soft_labels") == [(640 * 4096,)]
    assert store.num_bytes > 640 * 4096
    assert plain < 640 * 4096 // 10  # the footer and two small columns
    store.num_bytes = 0
    assert ask(store, "SELECT count(*) FROM soft_labels WHERE namespace = 'another'") == [(0,)]
    assert ask(store, "SELECT sum(rows) FROM commits") == [(640,)]
    assert store.num_bytes == 0


def test_an_empty_store_has_all_views_and_no_rows(store: LocalStore) -> None:
    for view, schema in VIEWS.items():
        with sql(store, f"SELECT * FROM {view}") as answer:
            assert answer.columns == tuple(schema.names)
            assert list(answer.rows) == []


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("SELEC 1", "Parser Error"),
        ("SELECT nothing_like_it FROM soft_labels", "nothing_like_it"),
        ("SELECT * FROM nowhere", "nowhere"),
        ("", "one SELECT is expected"),
        ("SELECT 1; SELECT 2", "one SELECT is expected"),
        ("CREATE TABLE t AS SELECT 1", "one SELECT is expected"),
        ("COPY (SELECT 1) TO 'out.csv'", "one SELECT is expected"),
        ("SET threads = 1", "one SELECT is expected"),
        ("SELECT * FROM read_csv('/etc/passwd')", "disabled by configuration"),
        ("SELECT CAST(key AS INTEGER) FROM soft_labels", "Could not convert"),
    ],
)
def test_a_bad_statement_is_one_line(store: LocalStore, add_shard, statement: str, said: str) -> None:
    add_shard(store, range(3))
    with pytest.raises(ValueError, match=said) as caught:
        ask(store, statement)
    assert "\n" not in str(caught.value)
    assert not Path("out.csv").exists()


def test_a_damaged_shard_and_a_lost_one_are_no_sql_errors(store: LocalStore, add_shard) -> None:
    commit = add_shard(store, range(5))
    path = store.local_path(RowCache(store, "soft_labels", A).shard_key(commit))
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes([255] * 8))
    with pytest.raises(IntegrityError, match="kd cache verify names it"):
        ask(store, "SELECT count(source) FROM soft_labels")
    path.unlink()
    with pytest.raises(StoreError, match=rf"{commit.sha256}\.parquet: cannot read: no such object"):
        ask(store, "SELECT count(source) FROM soft_labels")


def test_a_description_that_is_none_is_named(store: LocalStore, add_shard) -> None:
    add_shard(store, range(3))
    path = store.local_path(f"rows/soft_labels/{A}/about.json")
    for body in (b"{", json.dumps([1]).encode(), b'{"teacher": {}, "policy": {}}'):
        path.write_bytes(body)
        with pytest.raises(IntegrityError, match=rf"{A}/about\.json: not a valid description"):
            ask(store, "SELECT 1")


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ({"engine": "server", "model": "org/big", "revision": None}, "org/big"),
        (
            {"engine": "transformers", "dtype": "bfloat16", "weights": {"content": "12345678" * 4, "dtype": "bfloat16"}},
            "content 12345678 bfloat16",
        ),
        (
            {"engine": "transformers", "dtype": "float32", "weights": {"content": "12345678" * 4, "training": "9" * 32}},
            "trained 12345678 float32",
        ),
    ],
)
def test_teachers_have_short_names(store: LocalStore, teacher: dict, name: str) -> None:
    cache = RowCache(store, "answers", A)
    cache.describe({"teacher": teacher, "sampling": {"temperature": 0.7, "top_p": None, "stop": ["a", "b"]}, "seed": 0})
    assert ask(store, "SELECT teacher, policy FROM namespaces") == [(name, "stop=a,b temperature=0.7")]
