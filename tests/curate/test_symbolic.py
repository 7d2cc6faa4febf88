"""The child process: its limits, its death, and the death of its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kd_core.curate import judge, symbolic
from kd_core.curate.verifier import _compare
from kd_core.errors import KDError
from kd_core.recipe import Task

MATH = Task(template="plain", verifier="math")
ENDLESS = ["formulas", ["formula", r"\sum_{k=1}^{10^{9}} \sin(k^2)"], ["number", "1", "integer", "0"]]
EASY = ["formulas", ["formula", r"\sqrt{8}"], ["formula", r"2\sqrt{2}"]]


@pytest.fixture(autouse=True)
def forget() -> None:
    _compare.cache_clear()
    symbolic._ask.cache_clear()


def test_what_never_ends_is_undecided_by_its_cpu_time_and_the_next_question_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "LIMIT_CPU_SECONDS", 1.0)
    assert symbolic._child.ask(ENDLESS) == "undecided"
    assert symbolic._child._process is None
    monkeypatch.undo()
    assert symbolic._child.ask(EASY) == "right"


@pytest.mark.parametrize("answer", ["9^{9^{9^9}}", "10^{10^{10}}", "100000!", "3^{2^{30}}", "\\sqrt{2}^{9^{99}}"])
def test_what_is_too_big_is_undecided_by_its_size(answer: str) -> None:
    assert symbolic._child.ask(EASY) == "right"
    process = symbolic._child._process
    assert judge(answer, "2", MATH) == "undecided"
    assert judge("2", answer, MATH) == "undecided"
    assert symbolic._child._process is process


def test_a_child_that_somebody_killed_costs_no_verdict() -> None:
    assert symbolic._child.ask(EASY) == "right"
    process = symbolic._child._process
    assert process is not None
    process.kill()
    process.wait()
    assert symbolic._child.ask(EASY) == "right"
    assert symbolic._child._process is not process


def test_the_child_outlives_the_thread_that_first_asked() -> None:
    symbolic._child.stop()
    thread = threading.Thread(target=symbolic._child.ask, args=(EASY,))
    thread.start()
    thread.join()
    process = symbolic._child._process
    assert symbolic._child.ask(EASY) == "right"
    assert process is not None
    assert process.poll() is None
    assert symbolic._child._process is process


def test_it_works_in_worker_threads() -> None:
    found: list[str] = []

    def ask(i: int) -> None:
        found.append(judge(f"\\sqrt{{{2 * i}}}", f"\\sqrt{{2}}\\sqrt{{{i}}}", MATH))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["right"] * 8


def test_a_verifier_that_cannot_start_is_an_error_never_a_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    symbolic._child.stop()
    monkeypatch.setattr(symbolic, "_PROGRAM", tmp_path / "gone.py")
    with pytest.raises(KDError, match="did not start"):
        judge("\\sqrt{11}", "\\sqrt{22}", MATH)
    monkeypatch.undo()
    assert judge("\\sqrt{11}", "\\sqrt{22}", MATH) == "wrong"


PARENT = """
import sys
from kd_core.curate import symbolic
assert symbolic._child.ask({easy}) == "right"
print(symbolic._child._process.pid, flush=True)
{then}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a child at work is killed by Linux's parent-death signal")
@pytest.mark.parametrize(
    "then", ["sys.stdin.read()", "symbolic.LIMIT_CPU_SECONDS = 1e6; symbolic._child.ask({endless})"], ids=["idle", "at work"]
)
def test_the_child_never_outlives_a_parent_that_is_killed(then: str) -> None:
    program = PARENT.format(easy=EASY, then=then.format(endless=ENDLESS))
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert _is_alive(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert parent.stdin is not None
    parent.stdin.close()
    for _ in range(600):
        if not _is_alive(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child lives on a minute after its parent")


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
