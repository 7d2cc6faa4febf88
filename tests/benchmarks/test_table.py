"""The table of docs/benchmarks.md is what its data say, and figures are kept in the same form."""

from pathlib import Path

import pytest

from benchmarks.measure import Check, figure
from benchmarks.table import BEGIN, END, append_rows, read_rows, render, rows_of
from kd_core.errors import KDError

_DOCS = Path(__file__).parents[2] / "docs"


def test_the_document_has_the_table_of_its_data() -> None:
    text = (_DOCS / "benchmarks.md").read_text()
    rows = read_rows(_DOCS / "benchmarks.json")
    assert len(rows) >= 10
    assert text[text.index(BEGIN) : text.index(END) + len(END)] == render(rows), "run python -m benchmarks.table docs/benchmarks.json"


def test_figures_are_appended_and_read_again(tmp_path: Path) -> None:
    measured = figure("stored", 4.0, "B", Check("equal"), less_is_better=True, peer="another", peer_value=12.0)
    absent = figure("not run", None, "B", Check("no model here"))
    first, second = rows_of("softlabels", [measured], quick=False), rows_of("kernel", [absent], quick=True)
    append_rows(tmp_path / "rows.json", first)
    append_rows(tmp_path / "rows.json", second)
    assert read_rows(tmp_path / "rows.json") == [*first, *second]
    assert (first[0].ratio, first[0].command, second[0].command) == (
        3.0,
        "python -m benchmarks.softlabels",
        "python -m benchmarks.kernel --quick",
    )
    shown = render([*first, *second])
    assert "| stored | 4 B | another | 3 |" in shown
    assert "| not run | - B |  |  |" in shown


def test_a_file_of_another_form_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"what": "x"}]')
    with pytest.raises(KDError, match="no JSON list of benchmark rows"):
        read_rows(tmp_path / "rows.json")
