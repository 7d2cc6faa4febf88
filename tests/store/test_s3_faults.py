"""What a network and a server do to an S3 client: each fault ends in one success or one clear line."""

import random
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest

from infra.fault_proxy import Decide, Fault, fault_proxy
from infra.stack import StackInfo
from kd_core.errors import RecipeError, StoreError
from kd_core.recipe import S3Options
from kd_core.store import S3Store, open_store, s3

pytestmark = pytest.mark.stack


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "BACKOFF_SECONDS", 0.001)


@pytest.fixture
def prefix() -> str:
    return f"faults/{uuid.uuid4().hex}"


@contextmanager
def _through(info: StackInfo, prefix: str, decide: Decide, *, multipart_bytes: int = s3.MULTIPART_BYTES) -> Iterator[S3Store]:
    with fault_proxy(info.urls["s3"], decide) as address:
        store = S3Store(info.bucket, prefix, options=S3Options(endpoint=address), multipart_bytes=multipart_bytes)
        try:
            yield store
        finally:
            store.close()


def _nth(method: str, faults: list[Fault | None], *, mark: str = "/faults/") -> Decide:
    """The faults, in order, for requests of one method to objects; then none."""
    numbers = count()

    def decide(found: str, path: str) -> Fault | None:
        if found != method or mark not in path:
            return None
        number = next(numbers)
        return faults[number] if number < len(faults) else None

    return decide


@pytest.mark.parametrize("fault", ["503", "429", "409", "lost_reply"])
def test_a_write_gets_through_and_is_committed_once(s3_environment: StackInfo, prefix: str, fault: Fault) -> None:
    seen = []
    inject = _nth("PUT", [fault, fault])

    def decide(method: str, path: str) -> Fault | None:
        seen.append(method)
        return inject(method, path)

    with _through(s3_environment, prefix, decide) as store:
        assert store.create("a", b"bytes")
        assert seen.count("PUT") >= (2 if fault == "lost_reply" else 3)
        assert store.get("a") == b"bytes"
        assert not store.create("a", b"other")
        assert [info.key for info in store.list("")] == ["a"]


def test_a_large_write_whose_reply_is_lost_is_committed_once(s3_environment: StackInfo, prefix: str) -> None:
    data = random.Random(0).randbytes(17 << 20)
    decide = _nth("POST", ["lost_reply"], mark="uploadId=")
    with _through(s3_environment, prefix, decide, multipart_bytes=5 << 20) as store:
        assert store.create("large", data)
        assert store.get("large") == data


@pytest.mark.parametrize("fault", ["503", "cut_body", "lost_reply"])
def test_a_read_is_whole_or_tried_again(s3_environment: StackInfo, prefix: str, fault: Fault, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(1 << 20)
    decide = _nth("GET", [fault, fault, None, fault, fault, None, fault])
    with _through(s3_environment, prefix, decide) as store:
        store.create("a", data)
        assert store.get("a") == data
        assert store.get_range("a", 1000, 1000) == data[1000:2000]
        store.download("a", tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == data


def test_a_body_that_is_always_cut_is_an_error_not_a_short_read(s3_environment: StackInfo, prefix: str, tmp_path: Path) -> None:
    with _through(s3_environment, prefix, lambda method, path: None) as whole:
        whole.create("a", b"0123456789")
    with _through(s3_environment, prefix, lambda method, path: "cut_body" if method == "GET" else None) as store:
        for read in (lambda: store.get("a"), lambda: store.get_range("a", 0, 10), lambda: store.download("a", tmp_path / "a")):
            with pytest.raises(StoreError, match=r"/a: gave up at try 10 of 10"):
                read()
        assert list(tmp_path.iterdir()) == []


def test_a_shorter_body_with_a_length_that_agrees_is_detected(s3_environment: StackInfo, prefix: str, tmp_path: Path) -> None:
    decide = _nth("GET", ["short_body", None, "short_body", None, "short_body"])
    with _through(s3_environment, prefix, decide) as store:
        store.create("a", b"0123456789")
        assert store.get_range("a", 2, 6) == b"234567"
        store.download("a", tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == b"0123456789"
        assert store.get("a") == b"0123456789"  # by its checksum


def test_a_server_that_only_fails_is_given_up_with_its_answer(s3_environment: StackInfo, prefix: str) -> None:
    with _through(s3_environment, prefix, lambda method, path: "503" if method == "PUT" else None) as store:
        with pytest.raises(StoreError, match=r"/a: .* answered 503 ServiceUnavailable to try 10 of 10: injected"):
            store.create("a", b"bytes")
        assert list(store.list("")) == []


def test_conflicts_without_end_are_given_up(s3_environment: StackInfo, prefix: str) -> None:
    never = "10 conditional writes were refused and no object is there"
    with (
        _through(s3_environment, prefix, lambda method, path: "409" if method == "PUT" else None) as store,
        pytest.raises(StoreError, match=never),
    ):
        store.create("a", b"bytes")


def test_thirty_percent_of_failing_requests_change_nothing(s3_environment: StackInfo, prefix: str) -> None:
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    faults: tuple[Fault, ...] = ("503", "429", "lost_reply", "cut_body")
    with _through(s3_environment, prefix, lambda method, path: draw.choice(faults) if draw.random() < 0.3 else None) as store:
        bodies = {f"k{i:02d}": draw.randbytes(2000) for i in range(40)}
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(store.create, bodies, bodies.values())), f"seed {seed}"
            assert list(pool.map(store.get, bodies)) == list(bodies.values()), f"seed {seed}"
        assert [info.key for info in store.list("")] == sorted(bodies), f"seed {seed}"


def _open(bucket: str, endpoint: str) -> None:
    open_store(f"s3://{bucket}/x", S3Options(endpoint=endpoint))


def test_what_keeps_a_store_from_opening_is_said_in_one_line(s3_environment: StackInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = s3_environment.urls["s3"]
    with pytest.raises(StoreError, match=r"^s3://no-such-bucket/x: there is no bucket 'no-such-bucket' at http://.*; create it"):
        _open("no-such-bucket", endpoint)
    with pytest.raises(StoreError, match=r"^s3://distillery/x: cannot reach http://127.0.0.1:9 in 10 tries; start the server"):
        _open("distillery", "http://127.0.0.1:9")
    with pytest.raises(RecipeError, match=r"^run\.s3\.endpoint: 'nonsense' is refused; use a plain address"):
        _open("distillery", "nonsense")
    with pytest.raises(StoreError, match=r"^s3://b!d/x: gave up at try 1 of 10: .*Invalid bucket name"):
        _open("b!d", endpoint)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match=r"^s3://distillery/x: http://.* refused the credentials \(403\); check AWS_ACCESS_KEY_ID"):
        _open("distillery", endpoint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match=r"^s3://distillery/x: no credentials \(.*\); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        _open("distillery", endpoint)


def test_times_are_read_as_servers_write_them() -> None:
    wanted = datetime(2026, 11, 22, 18, 50, 20, tzinfo=UTC)
    for text in ("2026-11-22T18:50:20.000Z", "Sun, 22 Nov 2026 18:50:20 GMT", "2026-11-22T19:50:20+01:00", str(wanted.timestamp())):
        assert s3._time(text) == wanted
    assert s3._time(wanted.timestamp()) == wanted
    with pytest.raises(ValueError, match="Invalid timestamp"):
        s3._time("yesterday")
