"""What a file says is the text that is used, format by format; and a small file cannot become a large one."""

import datetime
import decimal
import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_core.errors import SourceError
from kd_core.prompts.sources import read_source
from kd_core.recipe import DatasetSource, FileSource, S3Options


def references(path: Path) -> list[str | None]:
    source = FileSource(kind="file", path=str(path), prompt="{a}", reference="{a}")
    return [row.reference for _, row in read_source(source, where="s", s3=S3Options())]


JSON = {
    "5": "5",
    "5.0": "5.0",
    "1e16": "1e16",
    "0.00001": "0.00001",
    "-0": "-0",
    "9007199254740993": "9007199254740993",
    "9" * 6000: "9" * 6000,
    "0.1000000000000000055511151231257827": "0.1000000000000000055511151231257827",
    "true": "true",
    "false": "false",
    "null": None,
    "NaN": None,
    '"nan"': "nan",
    '"NA"': "NA",
    '"null"': "null",
    '"True"': "True",
    '""': "",
    '" 1,080 "': " 1,080 ",
}


def test_json_values_are_as_they_are_spelled(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"a": {spelling}}}\n' for spelling in JSON))
    (tmp_path / "a.json").write_text("[" + ", ".join(f'{{"a": {spelling}}}' for spelling in JSON) + "]")
    for name in ("a.jsonl", "a.json"):
        assert references(tmp_path / name) == list(JSON.values())


@pytest.mark.parametrize(("name", "between"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_values_are_text(tmp_path: Path, name: str, between: str) -> None:
    values = ["5", "5.0", "007", "True", "nan", "NA", "null", "", " x ", "1e16", 'say "2, 3"\tor\nfour']
    lines = ["b" + between + "a"] + ["row" + between + '"' + value.replace('"', '""') + '"' for value in values[6:]]
    lines[1:1] = [f"row{between}{value}" for value in values[:6]]
    (tmp_path / name).write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", newline="")
    assert references(tmp_path / name) == values


COLUMNS: list[tuple[pa.Array, list[str | None]]] = [
    (pa.array([5, None, -(2**62)]), ["5", None, str(-(2**62))]),
    (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
    (
        pa.array([18.0, None, 0.5, 1e16, 1e-5, 1e300, float("nan"), float("inf"), -0.25]),
        ["18", None, "0.5", "1" + "0" * 16, "0.00001", "1e+300", None, "inf", "-0.25"],
    ),
    (pa.array([3.14, 18.0, 16777216.0, None], pa.float32()), ["3.14", "18", "16777216", None]),
    (pa.array([3.14], pa.float16()), ["3.14"]),
    (pa.array([True, False, None]), ["true", "false", None]),
    (pa.array(["nan", "NA", "", None, "5.0", "x" * 70_000]), ["nan", "NA", "", None, "5.0", "x" * 70_000]),
    (pa.array(["a", None, "b", "a"]).dictionary_encode(), ["a", None, "b", "a"]),
    (pa.array([decimal.Decimal("18.50"), decimal.Decimal("0E-2")], pa.decimal128(20, 2)), ["18.50", "0.00"]),
    (pa.array([datetime.date(2024, 1, 31)]), ["2024-01-31"]),
    (pa.array([None, None], pa.null()), [None, None]),
]


@pytest.mark.parametrize(("column", "texts"), COLUMNS, ids=[str(column.type) for column, _ in COLUMNS])
def test_columns_keep_their_values_in_parquet_and_in_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: pa.Array, texts: list[str | None]
) -> None:
    import datasets

    pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet")
    assert references(tmp_path / "a.parquet") == texts
    if column.type in (pa.float16(), pa.null()):
        return  # which data sets do not have
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: datasets.Dataset(pa.table({"a": column})))
    source = DatasetSource(kind="dataset", id="example/none", revision="0" * 40, split="train", prompt="{a}", reference="{a}")
    assert [row.reference for _, row in read_source(source, where="s", s3=S3Options())] == texts


@pytest.mark.parametrize("value", [[1], {"b": 1}, b"x"])
def test_what_is_no_text_is_refused(tmp_path: Path, value: Any) -> None:
    pq.write_table(pa.table({"a": [value]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet row 1: column 'a', which s\.prompt needs, holds a (list|dict|bytes);"):
        references(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv.gz", "a.json"])
def test_gzip_is_read_under_any_name(tmp_path: Path, name: str) -> None:
    text = {"a.csv.gz": "a\n1\n", "a.json": '[{"a": 1}]'}.get(name, '{"a": 1}\n')
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert references(tmp_path / name) == ["1"]


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(65):
            file.write(b" " * 2**20)
    with pytest.raises(SourceError, match=r"a\.jsonl:1: a line of more than 67,108,864 bytes"):
        references(path)


def test_a_text_in_many_rows_of_parquet_is_in_memory_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["x" * 2**20]))
    pq.write_table(pa.table({"a": long}), path, compression="zstd")
    assert path.stat().st_size < 20_000
    code = f"""
import resource
from kd_core.prompts.sources import read_source
from kd_core.recipe import FileSource, S3Options
source = FileSource(kind="file", path={str(path)!r}, prompt="{{a}}")
read = lambda limit: sum(1 for _ in read_source(source.model_copy(update={{"limit": limit}}), where="s", s3=S3Options()))
assert read(1) == 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert read(None) == 4000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200, "MiB beside the libraries; all rows are 4,000"


def test_a_page_that_expands_beyond_text_is_refused_by_file_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": ["x" * 2**20] * 65}), path, compression="zstd", use_dictionary=False)
    with pytest.raises(SourceError, match=r"a\.parquet: [\d,]+ bytes of column 'a' become 68,[\d,]+, which is no text"):
        references(path)


def test_a_damaged_page_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [f"text {i}" for i in range(5000)]}), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"a\.parquet: not a readable Parquet file"):
        references(path)
