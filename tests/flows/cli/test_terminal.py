"""Nothing that others wrote is obeyed by the terminal, however it gets there."""

import io
import re
from pathlib import Path

import pytest
from rich.markdown import Markdown
from rich.table import Table

from flows.cli.console import CleanConsole, Display
from flows.cli.row_output import print_rows
from flows.cli.tables import show
from flows.cli.terminal import printable, say
from kd_core.progress import Tick

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\x9b31mc\rd\x08e\u202ef"
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
OWN_STYLES = re.compile(r"\x1b\[[0-9;]*m")


def shown_on_a_terminal(*renderables: object) -> str:
    console = CleanConsole(file=io.StringIO(), force_terminal=True, width=100)
    for renderable in renderables:
        console.print(renderable)
    return OWN_STYLES.sub("", console.file.getvalue())


def test_control_characters_are_spelt_out() -> None:
    assert printable(HOSTILE) == r"a\x1b[2J\x1b]0;title\x07b\x9b31mc\rd\x08e\u202ef"
    assert printable("two\nlines,\ta tab, é, 漢, 👍") == "two\nlines,\ta tab, é, 漢, 👍"


def test_a_console_obeys_its_own_styles_alone() -> None:
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(f"[green]{HOSTILE}[/]")
    shown = shown_on_a_terminal(HOSTILE, table, Markdown(f"# {HOSTILE}\n\n{HOSTILE}"))
    assert not OBEYED.search(shown)
    assert shown.count(r"\x1b[2J") >= 4, "it is shown, not dropped"


def test_progress_is_shown_as_it_is_meant() -> None:
    console = CleanConsole(file=io.StringIO(), force_terminal=True, width=100)
    display = Display(console, live=True)
    with display.progress:
        display.start("answers")
        display.tick("answers", Tick(3, 10, "rows", note=HOSTILE))
        display.progress.refresh()
    written = console.file.getvalue()
    assert "\x1b[?25l" in written, "the display hides the cursor itself"
    assert r"\x1b[2J" in written
    assert "\x1b[2J" not in written


def test_errors_and_reports_are_clean(kd, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text('name: "x\\e[2J"\n')
    for words in (("plan", "no\x1b[2Jsuch.yaml"), ("plan", "bad.yaml"), ("no\x1b[2Jcommand",)):
        called = kd(*words)
        assert called.code == 2
        assert r"\x1b[2J" in called.err
        assert not OBEYED.search(called.err)
    show(HOSTILE)
    say(f"{HOSTILE} postgresql://me:canary@host/db")
    said = capsys.readouterr().out
    assert not OBEYED.search(said)
    assert "canary" not in said


def test_csv_is_exact_in_a_file_and_clean_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    print_rows(["text"], [[HOSTILE]], "csv")
    assert HOSTILE in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_rows(["text"], [[HOSTILE]], "csv")
    assert not OBEYED.search(capsys.readouterr().out)


def test_a_password_in_an_option_is_refused_and_not_repeated(kd) -> None:
    called = kd("cache", "ls", "--store", "s3://bucket/x", "--s3-endpoint", "http://me:canary@127.0.0.1:9")
    assert called.code == 2
    assert called.err.startswith("kd: --s3-endpoint: the address of host '127.0.0.1' carries a password; put it into AWS_ACCESS_KEY_ID")
    assert "canary" not in called.err
