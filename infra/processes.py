"""Server processes that outlive their starter: spawn, look, stop.

A process is identified by its pid *and* its start time, so a reused pid is never taken for ours. Every process is
spawned with a mark in its environment, which all its descendants inherit: ``stop`` finds those that left the process
group or lost their parent (a flow run starts a session of its own) and leaves none. Nothing else is ever signalled.
"""

import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from kd_core.errors import KDError

__all__ = ["ServerProcess", "binary", "family", "find_ports", "is_alive", "marked", "spawn", "stop", "tail"]

MARK = "KD_STACK_HOME"
_SAME_START_SECONDS = 2.0  # start times are read against the wall clock, which may be corrected


@dataclass(frozen=True)
class ServerProcess:
    """One spawned server: its pid (also the id of its session) and when it started, in seconds since the epoch."""

    pid: int
    started_seconds: float


def binary(name: str) -> str:
    """Path of an installed program: beside this interpreter, or else on PATH.

    Raises:
        KDError: it is in neither place.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise KDError(
            f"program {name!r} is not beside {sys.executable} nor on PATH; install it with: pip install 'knowledge-distillery[stack]'"
        )
    return found


def spawn(command: Sequence[str], *, env: Mapping[str, str], log: Path, home: Path) -> ServerProcess:
    """Start a process in a session of its own, with its output appended to a log file.

    Args:
        command: program (a path) and arguments.
        env: its whole environment; the mark is added.
        log: file for stdout and stderr.
        home: folder of the stack the process belongs to.
    """
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = os.posix_spawn(command[0], list(command), {**env, MARK: str(home)}, file_actions=files, setsid=True)
    return ServerProcess(pid, psutil.Process(pid).create_time())


def _handle(process: ServerProcess) -> psutil.Process | None:
    """The running process, or None when it ended or its pid went to another."""
    try:
        found = psutil.Process(process.pid)
        ours = abs(found.create_time() - process.started_seconds) < _SAME_START_SECONDS and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return found if ours else None


def is_alive(process: ServerProcess) -> bool:
    """True while this very process runs."""
    return _handle(process) is not None


def family(process: ServerProcess) -> list[psutil.Process]:
    """The process and its descendants, as far as they run; nothing when its pid went to another."""
    leader = _handle(process)
    if leader is None:
        return []
    try:
        return [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def marked(home: Path) -> list[psutil.Process]:
    """Every running process that was spawned for this stack, and every descendant of one, orphans too."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def stop(processes: Sequence[psutil.Process], *, grace_seconds: float) -> None:
    """SIGTERM, then SIGKILL for what is left after the grace. A pid that went to another process is not signalled."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=grace_seconds)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=grace_seconds)


def find_ports(preferred: Mapping[str, int], *, second_offset: Mapping[str, int]) -> dict[str, int]:
    """A free loopback port for each name: the preferred one, or else the next free one above it.

    Args:
        preferred: name -> first port to try.
        second_offset: name -> distance of a second port that must be free too (a server's gRPC port).

    Raises:
        KDError: 200 ports in a row are busy.
    """
    ports: dict[str, int] = {}
    taken: set[int] = set()
    for name, first in preferred.items():
        for port in range(first, first + 200):
            wanted = {port, port + second_offset.get(name, 0)}
            if not wanted & taken and all(_is_free(each) for each in wanted):
                break
        else:
            raise KDError(f"no free port for {name} among {first}..{first + 199} on 127.0.0.1; stop what uses them")
        ports[name] = port
        taken |= wanted
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def tail(log: Path, *, num_lines: int = 15) -> str:
    """The last lines of a log file."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])
