"""Servers that are not AWS: they refuse checksums, store them as content, and hold other people's keys. A stub in 50 lines."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from kd_core.errors import SourceError, StoreError
from kd_core.prompts.files import find_source_files
from kd_core.recipe import S3Options
from kd_core.store import S3Store

BODY = b'{"q": "1+1?"}\n'
KEYS = [
    *("raw data/part 1.jsonl", "raw data/part 2.jsonl", "daten/größe.jsonl", "a(1).jsonl", "x+y&z.jsonl", "br[1].jsonl"),
    *("data/top.jsonl", "data/deep/er/low.jsonl", "data/.hidden/x.jsonl", "data/deep/.h.jsonl"),
]


class Bucket(ThreadingHTTPServer):
    """A bucket that any name reaches.

    Attributes:
        objects: name -> bytes.
        puts: names that were sent.
        refuse: (status, code) for a request with a checksum; None takes it.
        spoil: stores the frame of a chunk with its content.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.refuse: tuple[int, str] | None = None
        self.spoil = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    @property
    def key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/bucket").removeprefix("/")

    def reply(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        fixed = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"0"', "Content-Type": "application/xml"}
        for name, value in {"Content-Length": str(len(body)), **fixed}.items():
            self.send_header(name, value)
        if self.headers.get("Range") and status == 206:
            self.send_header("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if not self.key and "list-type" in query:
            return self.listing(query)
        if not self.key:
            return self.reply(200)
        found = self.server.objects.get(self.key)
        self.reply(404) if found is None else self.reply(206 if self.headers.get("Range") else 200, found)

    do_HEAD = do_GET

    def listing(self, query: dict[str, list[str]]) -> None:
        prefix, code = query.get("prefix", [""])[0], (quote if "encoding-type" in query else str)
        rows = "".join(
            f"<Contents><Key>{escape(code(key))}</Key><LastModified>2026-01-01T00:00:00Z</LastModified><Size>{len(data)}</Size></Contents>"
            for key, data in self.server.objects.items()
            if key.startswith(prefix)
        )
        kind = "<EncodingType>url</EncodingType>" if "encoding-type" in query else ""
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        self.reply(200, f'<ListBucketResult xmlns="{space}">{kind}<IsTruncated>false</IsTruncated>{rows}</ListBucketResult>'.encode())

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.puts.append(self.key)
        if self.server.refuse and any(name.lower().startswith("x-amz-checksum") for name in self.headers):
            status, code = self.server.refuse
            return self.reply(status, f"<Error><Code>{code}</Code><Message>not implemented</Message></Error>".encode())
        if self.server.spoil:
            data = b"5;chunk-signature=0\r\n" + data + b"\r\n0;chunk-signature=0\r\n"
        self.server.objects[self.key] = data
        self.reply(200)

    def do_DELETE(self) -> None:
        self.server.objects.pop(self.key, None)
        self.reply(204)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    server = Bucket()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _options(bucket: Bucket) -> S3Options:
    return S3Options(endpoint=f"http://127.0.0.1:{bucket.server_port}")


@pytest.fixture
def store(bucket: Bucket) -> Iterator[S3Store]:
    made = S3Store("bucket", "", options=_options(bucket))
    yield made
    made.close()


@pytest.mark.parametrize("answer", [(501, "NotImplemented"), (411, "MissingContentLength"), (400, "XAmzContentSHA256Mismatch")])
def test_a_server_that_refuses_checksums_is_asked_once_and_the_field_is_named(store: S3Store, bucket: Bucket, answer) -> None:
    bucket.refuse = answer
    with pytest.raises(StoreError, match=rf"answered {answer[0]} {answer[1]} to try 1 of 10: .*run\.s3\.checksums=when_required"):
        store.create("a/b", b"hello")
    assert bucket.puts == ["a/b"]


def test_bytes_that_are_stored_otherwise_than_sent_are_noticed_and_removed(store: S3Store, bucket: Bucket) -> None:
    """Also the second time: the key is free, and the next write is looked at again."""
    bucket.spoil = True
    for _ in range(2):
        with pytest.raises(
            StoreError, match=r"a/b: 5 bytes were sent .* stored others \(\d+ bytes\), which were removed; .*run\.s3\.checksums"
        ):
            store.create("a/b", b"hello")
        assert bucket.objects == {}
    bucket.spoil = False
    assert store.create("a/b", b"hello")
    assert store.get("a/b") == b"hello"


PATTERNS = [
    *("raw data/part 1.jsonl", "raw data/*.jsonl", "daten/größe.jsonl", "daten/*.jsonl", "a(1).jsonl", "x+y&z.jsonl", "br[1].jsonl"),
    *(
        "data/*.jsonl",
        "data/**/*.jsonl",
        "**/*.jsonl",
        "data/**",
        "data/.hidden/*.jsonl",
        "data/d*/**/*.jsonl",
        "data/**.jsonl",
        "d*/**/low.jsonl",
    ),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_finds_in_a_bucket_what_it_finds_in_a_folder(bucket: Bucket, tmp_path: Path, pattern: str) -> None:
    """Whatever the keys of other people are."""
    bucket.objects = {**dict.fromkeys(KEYS, BODY), "data/folder/": b"", "data/../up.jsonl": BODY, "data//twice.txt/": b""}
    for key in KEYS:
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(BODY)
    options = _options(bucket)
    local = [file.address.removeprefix(f"{tmp_path}/") for file in find_source_files(str(tmp_path / pattern), where="s", s3=options)]
    there = find_source_files(f"s3://bucket/{pattern}", where="s", s3=options)
    found = [file.address.removeprefix("s3://bucket/") for file in there if "/../" not in file.address]
    assert sorted(found) == sorted(local)
    assert local
    for file in there:
        if "/../" in file.address:
            with pytest.raises(StoreError, match="no address reaches it"):
                file.open()
        else:
            with file.open() as stream:
                assert stream.read() == BODY


def test_a_key_of_ours_is_as_strict_as_ever(store: S3Store) -> None:
    for key in ("a b", "../a", "a//b", "ä", "a/"):
        with pytest.raises(StoreError, match="is refused"):
            store.create(key, b"x")
    with pytest.raises(SourceError, match="no file at"):
        find_source_files("s3://bucket/none*.jsonl", where="s", s3=S3Options(endpoint=store._endpoint))
