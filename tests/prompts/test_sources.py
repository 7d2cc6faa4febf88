import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kd_core.store
from infra.fault_proxy import fault_proxy
from infra.stack import StackInfo
from kd_core.errors import SourceError
from kd_core.progress import silent
from kd_core.prompts import estimate_rows, fetched, source_identity
from kd_core.prompts.rows import RawRow
from kd_core.prompts.sources import read_source
from kd_core.prompts.templates import compile_template, fill
from kd_core.recipe import DatasetSource, FileSource, S3Options, Source
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph, open_node
from kd_core.stages.run import run_node
from kd_core.summaries import PromptsSummary, of

RECIPES = Path(__file__).parents[2] / "recipes"
S3 = S3Options()
ROWS = [{"q": "1 + 1?", "a": 2, "hint": None}, {"q": "2 + 2?", "a": 4, "hint": "count"}]


def read(source: Source) -> list[tuple[str, RawRow]]:
    return list(read_source(source, where="prompts.sources.0", s3=S3))


def file_source(path: Path | str, **fields: object) -> FileSource:
    return FileSource.model_validate({"kind": "file", "path": str(path), "prompt": "{q}", **fields})


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train.{suffix}", ROWS)
    found = read(file_source(path, gold="{hint}", reference="{a}"))
    assert [label for label, _ in found] == [f"file:train.{suffix}"] * 2
    assert [(row.prompt, row.gold, row.reference) for _, row in found] == [("1 + 1?", None, "2"), ("2 + 2?", "count", "4")]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_missing_column_names_file_row_column_and_what_there_is(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train.{suffix}", ROWS)
    place = {"jsonl": f"{path}:1", "json": f"{path} row 1 (line 1)", "parquet": f"{path} row 1"}[suffix]
    with pytest.raises(SourceError) as caught:
        read(file_source(path, prompt="{question}"))
    assert str(caught.value) == f"{place}: no column 'question', which prompts.sources.0.prompt needs; there are: 'q', 'a', 'hint'"


def test_a_column_that_vanishes_later_names_its_own_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"q": "a"}, {"q": "b"}, {"other": "c"}])
    with pytest.raises(SourceError, match=r"x\.jsonl:3: no column 'q'"):
        read(file_source(path))


def test_bad_json_names_file_and_line_and_blank_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"q": "a"}\n\n{"q": oops}\n')
    with pytest.raises(SourceError, match=r"x\.jsonl:3: not valid JSON: Expecting value"):
        read(file_source(path))
    path.write_bytes(b'{"q": "a"}\n{"q": "\xff"}\n')
    with pytest.raises(SourceError, match=r"x\.jsonl:2: not valid UTF-8: .*0xff"):
        read(file_source(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"[1]\n", r"x\.jsonl:1: expected a JSON object"),
        ("x.json", b'{"q": 1}', r"x\.json: expected a JSON list of objects, found a dict"),
        ("x.json", b"[1]", r"x\.json row 1 \(line 1\): expected a JSON object"),
        ("x.parquet", b"PAR1 no", r"x\.parquet: not a readable Parquet file"),
        ("x.json", b"[1] 2", r"x\.json row 1"),
        ("x.json", b'[{"q": 1}\n{"q": 2}]', r"x\.json: not valid JSON after row 1: found '\{\"q\": 2\}\]'"),
        ("x.json", b'[{"q": 1},\n]', r"x\.json row 2 \(line 2\): not valid JSON: Expecting value: line 2 column 1"),
        ("x.json", b'[{"q": 1}] x', r"x\.json: not valid JSON after row 1: found '\] x'"),
        ("x.jsonl", b'{"q": 1} 2\n', r"x\.jsonl:1: not valid JSON: something follows the value: '2"),
        ("x.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", r"x\.jsonl:1: not valid JSON: it is nested too deeply"),
        ("x.jsonl", b'{"q": 1}\n{"q": 1, "a": {"b": 1, "b": 2}}', r"x\.jsonl:2: not valid JSON: the key 'b' stands twice in one object"),
        ("x.json", b'[{"q": 1},\n\n{"q": 1, "q": 2}]', r"x\.json row 2 \(line 3\): not valid JSON: the key 'q' stands twice"),
        ("x.csv", b"q,q\n1,2\n", r"x\.csv:1: a column's name stands twice in the first line: 'q', 'q'"),
        ("x.csv", b'q,a\n"1\n1",2\n3\n', r"x\.csv:4: 1 fields, and the first line names 2 columns"),
        ("x.csv", b'q,a\n1,"2\n', r"x\.csv:2: not valid CSV: unexpected end of data"),
        ("x.txt", b"q\n1\n", r"x\.txt ends in none of \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
        ("x.jsonl", b"BZh91AY&SY", r"x\.jsonl: it is compressed by bzip2; decompress it, or compress it by gzip or zstd"),
        ("x.jsonl", b"\x28\xb5\x2f\xfd...", r"x\.jsonl:1: cannot be read: .*; copy the file again"),
        ("x.jsonl", pa.compress(b'{"q": 1}\n' * 9, "zstd", asbytes=True)[:-4], r"x\.jsonl:\d+: cannot be read: .*; copy the file again"),
        ("x.jsonl", gzip.compress(b'{"q": 1}\n' * 9, mtime=0)[:-9], r"x\.jsonl:\d+: damaged gzip: .*; copy the file again"),
        ("x.json", gzip.compress(b'[{"q": 1}]', mtime=0)[:-9], r"x\.json: damaged gzip: .*; copy the file again"),
    ],
)
def test_another_form_than_stated_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read(file_source(tmp_path / name))


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_is_read_compressed_under_its_name_and_under_a_plain_one(tmp_path: Path, suffix: str, ending: str) -> None:
    rows = [{"q": f"{i} + é?", "a": str(2 * i)} for i in range(3000)]
    plain = tmp_path / f"plain.{suffix}"
    if suffix in ("csv", "tsv"):
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["q", "a"], delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        write(plain, rows)
    data = plain.read_bytes()
    half = len(data) // 2
    parts = [gzip.compress(p, mtime=0) if ending == "gz" else pa.compress(p, "zstd", asbytes=True) for p in (data[:half], data[half:])]
    wanted = [(row.prompt, row.reference) for _, row in read(file_source(plain, reference="{a}"))]
    assert wanted == [(row["q"], row["a"]) for row in rows]
    for name in (f"x.{suffix}.{ending}", f"x.{suffix}"):
        (tmp_path / name).write_bytes(b"".join(parts))  # of several members, as parallel compressors write them
        assert [(row.prompt, row.reference) for _, row in read(file_source(tmp_path / name, reference="{a}"))] == wanted


def test_a_missing_file_says_how_to_set_the_path(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.jsonl", tmp_path / "*.jsonl", tmp_path):
        with pytest.raises(SourceError, match=r"--set prompts\.sources\.0\.path=") as caught:
            read(file_source(path))
        assert str(path) in str(caught.value)


def test_a_glob_reads_files_in_order_and_limit_spans_them(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"q": f"{name}1"}, {"q": f"{name}2"}])
    found = read(file_source(tmp_path / "[ab].jsonl", limit=3))
    assert [(label, row.prompt) for label, row in found] == [("file:a.jsonl", "a1"), ("file:a.jsonl", "a2"), ("file:b.jsonl", "b1")]


def test_a_name_with_wildcard_characters_is_first_a_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "part[1].jsonl", [{"q": "literal"}])
    write_jsonl(tmp_path / "part1.jsonl", [{"q": "matched"}])
    assert [row.prompt for _, row in read(file_source(tmp_path / "part[1].jsonl"))] == ["literal"]


def test_objects_of_a_bucket_are_read_like_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = kd_core.store.LocalStore(tmp_path / "bucket")
    opened: list[str] = []
    monkeypatch.setattr(kd_core.store, "open_bucket", lambda name, s3: (opened.append(name), bucket)[1])
    for key in ("data/b.jsonl", "data/a.jsonl", "data/deep/c.jsonl", "data/readme.txt"):
        bucket.create(key, json.dumps({"q": key}).encode() + b"\n")
    assert [row.prompt for _, row in read(file_source("s3://corpus/data/a.jsonl"))] == ["data/a.jsonl"]
    assert [row.prompt for _, row in read(file_source("s3://corpus/data/*.jsonl"))] == ["data/a.jsonl", "data/b.jsonl"]
    for path in ("data/**/*.jsonl", "**/*.jsonl", "**/**/?.jsonl"):
        found = [row.prompt for _, row in read(file_source(f"s3://corpus/{path}"))]
        assert found == ["data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl"]
    assert [row.prompt for _, row in read(file_source("s3://corpus/**/deep/*.jsonl"))] == ["data/deep/c.jsonl"]
    assert set(opened) == {"corpus"}
    with pytest.raises(SourceError, match=r"no file at 's3://corpus/data/none\.jsonl'"):
        read(file_source("s3://corpus/data/none.jsonl"))
    with pytest.raises(SourceError, match="no file at 's3://corpus'"):
        read(file_source("s3://corpus"))


class _CountingBucket(kd_core.store.LocalStore):
    """A bucket that counts who reads its objects, and how."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []

    def get(self, key: str) -> bytes:
        self.reads.append(key)
        return super().get(key)

    def download(self, key: str, path: Path) -> None:
        self.reads.append(key)
        super().download(key, path)


def test_an_object_is_downloaded_once_a_process_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = _CountingBucket(tmp_path / "bucket")
    monkeypatch.setattr(kd_core.store, "open_bucket", lambda name, s3: bucket)
    bucket.create("big.jsonl", b"".join(b'{"q": "%d"}\n' % i for i in range(100_000)))
    source = file_source("s3://counted/big.jsonl")
    first = source_identity(source, s3=S3)
    assert source_identity(source, s3=S3) == first, "a graph drawn twice"
    assert len(read(source)) == 100_000
    assert len(read(source.model_copy(update={"limit": 3}))) == 3
    assert bucket.reads == ["big.jsonl"]
    bucket.delete("big.jsonl")
    bucket.create("big.jsonl", b'{"q": "other"}\n')
    assert [row.prompt for _, row in read(source)] == ["other"]
    assert source_identity(source, s3=S3) != first
    assert bucket.reads == ["big.jsonl"] * 2


def test_the_oldest_downloads_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = _CountingBucket(tmp_path / "bucket")
    monkeypatch.setattr(kd_core.store, "open_bucket", lambda name, s3: bucket)
    monkeypatch.setattr(fetched, "KEPT_BYTES", 250)
    monkeypatch.setattr(fetched, "_kept", {})
    for name in "abc":
        bucket.create(f"{name}.jsonl", json.dumps({"q": name * 90}).encode())
    for name in ("a", "b", "a", "c", "b", "a"):
        assert len(read(file_source(f"s3://bounded/{name}.jsonl"))) == 1
    assert bucket.reads == [f"{name}.jsonl" for name in "abca"]


@pytest.mark.parametrize("text", ["{q.real}", "{q[0]}", "{}", "{q!r}", "{q:>5}", "{q", "q}", "plain", ""])
def test_a_template_is_column_names_and_nothing_else(text: str) -> None:
    with pytest.raises(SourceError, match=r"^here: template"):
        compile_template(text, where="here")


def test_templates_fill_text_numbers_and_braces() -> None:
    template = compile_template("{{{Body}}} {Question}", where="here")
    assert fill(template, {"Body": "b", "Question": "51.0"}, at="x:1") == "{b} 51.0"
    assert fill(template, {"Body": "b", "Question": None}, at="x:1") is None
    with pytest.raises(SourceError, match=r"x:1: column 'Body', which here needs, holds a list"):
        fill(template, {"Body": ["b"], "Question": "1"}, at="x:1")
    with pytest.raises(SourceError, match=r"x:1: column 'Body', which here needs, holds a list of chat turns"):
        fill(template, {"Body": [{"role": "user", "content": "b"}], "Question": "1"}, at="x:1")
    with pytest.raises(SourceError, match=r"x:1: column 'Body' holds 10,000,001 characters; at most 10,000,000 are read"):
        fill(template, {"Body": "b" * 10_000_001, "Question": "1"}, at="x:1")


def test_file_identity_is_content_and_name_never_the_path(tmp_path: Path) -> None:
    first, moved = write_jsonl(tmp_path / "one/x.jsonl", ROWS), write_jsonl(tmp_path / "two/x.jsonl", ROWS)
    identity = source_identity(file_source(first), s3=S3)
    assert identity == source_identity(file_source(moved), s3=S3)
    assert str(tmp_path) not in json.dumps(identity)
    assert identity != source_identity(file_source(moved, limit=1), s3=S3)
    assert identity != source_identity(file_source(moved, prompt="{a}"), s3=S3)
    write_jsonl(moved, ROWS[:1])
    assert identity != source_identity(file_source(moved), s3=S3)
    with pytest.raises(SourceError, match="is more than a column's name"):
        source_identity(file_source(first, prompt="{q.x}"), s3=S3)


def dataset_source(**fields: object) -> DatasetSource:
    return DatasetSource.model_validate(
        {"kind": "dataset", "id": "example/none", "revision": "0" * 40, "split": "train", "prompt": "{q}", **fields}
    )


def test_dataset_identity_and_estimate_need_no_network() -> None:
    source = dataset_source(limit=5)
    assert source_identity(source, s3=S3) == source.model_dump(mode="json")
    assert estimate_rows(source) == 5
    assert estimate_rows(dataset_source()) is None


def test_datasets_offline_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match=r"prompts\.sources\.0: data set example/none .*cannot be loaded"):
        read(dataset_source())


def test_datasets_rows_pass_the_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[object] = []

    def load_dataset(*args: object, **options: object) -> datasets.Dataset:
        asked.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read(dataset_source(config="main", reference="{a}", limit=1))
    assert [(label, row.prompt, row.reference) for label, row in found] == [("dataset:example/none", "1 + 1?", "2")]
    assert asked == [(("example/none", "main"), {"split": "train", "revision": "0" * 40})]
    assert len(read(dataset_source(limit=99))) == 2
    with pytest.raises(SourceError, match=r"row 0: no column 'body'.*there are: 'q', 'a', 'hint'"):
        read(dataset_source(prompt="{body}"))


def test_a_local_directory_never_stands_in_for_a_pinned_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "example/none/train.jsonl", ROWS)
    with pytest.raises(SourceError, match="is also a local path"):
        read(dataset_source())


@pytest.mark.stack
def test_objects_of_a_real_bucket_are_read_like_files(s3_environment: StackInfo) -> None:
    s3 = S3Options(endpoint=s3_environment.urls["s3"])
    bucket = kd_core.store.S3Store(s3_environment.bucket, "", options=s3)
    for name in ("b", "a"):
        bucket.create(f"prompts-source/{name}.jsonl", json.dumps({"q": name}).encode() + b"\n")
    bucket.close()
    source = file_source(f"s3://{s3_environment.bucket}/prompts-source/*.jsonl")
    found = [(label, row.prompt) for label, row in read_source(source, where="prompts.sources.0", s3=s3)]
    assert found == [("file:a.jsonl", "a"), ("file:b.jsonl", "b")]
    assert [file["name"] for file in source_identity(source, s3=s3)["files"]] == ["a.jsonl", "b.jsonl"]


@pytest.mark.stack
def test_a_run_of_prompts_gets_an_object_of_100_000_rows_once(s3_environment: StackInfo, tmp_path: Path) -> None:
    gets: list[str] = []

    def decide(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/once/big.jsonl"):
            gets.append(path)

    bucket = kd_core.store.S3Store(s3_environment.bucket, "", options=S3Options(endpoint=s3_environment.urls["s3"]))
    bucket.create("once/big.jsonl", b"".join(b'{"q": "%d + 1 = ?", "a": "%d"}\n' % (i, i + 1) for i in range(100_000)))
    bucket.close()
    with fault_proxy(s3_environment.urls["s3"], decide) as address:
        overrides = [
            f"prompts.sources=[{{kind: file, path: 's3://{s3_environment.bucket}/once/big.jsonl', prompt: '{{q}}', gold: '{{a}}'}}]",
            f"run.s3.endpoint={address}",
            "task.answer_marker=null",
        ]
        recipe = load_recipe(RECIPES / "quickstart.yaml", overrides)
        store = kd_core.store.LocalStore(tmp_path / "store")
        nodes = build_graph(recipe, store)
        assert {name: node.fingerprint for name, node in build_graph(recipe, store).items()} == {n: v.fingerprint for n, v in nodes.items()}
        run_node(recipe, nodes, "prompts", store=store, tick=silent, extra={})
        assert of(open_node(store, nodes["prompts"]), PromptsSummary).counts["read"] == 100_000
    assert len(gets) == 1
