"""Every test that takes ``device`` passes on the pretended device."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_tests_of_devices_pass_on_the_pretended_device() -> None:
    """Run them in a process of their own, because torch learns of a device for good and before its first backward pass."""
    command = [sys.executable, "-m", "pytest", "--pretended", "--tb=short", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=_ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    assert counts["passed"] >= 130
    assert counts.keys() <= {"passed", "deselected"}, "nothing is skipped there"
