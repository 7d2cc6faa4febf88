"""A store in an S3 bucket (AWS or any server that honours conditional writes), through boto3.

Writes carry ``If-None-Match: *``; a large object is a multipart upload whose *completion* carries it. An answer of
412 (something is there) or 409 (another write is under way) is never trusted alone: the object is read back and
compared, so that our own lost reply counts as success. botocore's retries are off: the one loop here covers requests
and bodies alike, is bounded and jittered, and ends in a StoreError that says what to do. Reads verify their length.
boto3 is imported when the first store is opened, not with this module.

A limit: a single conditional PUT has exactly one winner, but not every server makes the conditional *completion* of a
multipart upload atomic (SeaweedFS 4.48: 17 of 60 races of 8 writers had several winners, the last one staying). So only
small objects may decide between writers of different bytes; large ones have content addresses, where all writers agree.
"""

import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kd_core.errors import StoreAccessError, StoreError
from kd_core.fingerprint import sha256_bytes, sha256_file
from kd_core.recipe.addresses import check_address, hide_passwords, redact_url
from kd_core.store.base import ObjectInfo, check_key
from kd_core.store.local import replacing

if TYPE_CHECKING:
    from kd_core.recipe import S3Options

__all__ = ["S3Store"]

T = TypeVar("T")

MULTIPART_BYTES = 64 << 20
"""Objects above this size are sent in parts."""
PART_BYTES = 16 << 20
"""Size of a part, and of one ranged read; S3 wants 5 MiB at least and 10,000 parts at most."""
ATTEMPTS = 10
"""Tries of one request: with 30% of them failing, one request in 170,000 is given up."""
BACKOFF_SECONDS = 0.2
"""Upper end of the first pause; it doubles from try to try, up to ``BACKOFF_CAP_SECONDS``. About 13 s in all on average."""
BACKOFF_CAP_SECONDS = 5.0
USER_AGENT = "knowledge-distillery"
"""What a server's access log shows. boto3's own is put together anew for each request, a fifth of the time it takes here."""

_log = logging.getLogger(__name__)


def _attempts() -> Iterator[int]:
    """Count 1..ATTEMPTS, with a random pause before every try but the first (full jitter)."""
    for attempt in range(1, ATTEMPTS + 1):
        if attempt > 1:
            time.sleep(random.uniform(0.0, min(BACKOFF_CAP_SECONDS, BACKOFF_SECONDS * 2 ** (attempt - 2))))
        yield attempt


def _status(error: Exception) -> int:
    """The HTTP status in a botocore ClientError; 0 for any other error."""
    response = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_transient(error: Exception) -> bool:
    from botocore import exceptions as boto

    if isinstance(error, boto.SSLError):
        return False
    broken = (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, boto.FlexibleChecksumError)
    return isinstance(error, broken) or _status(error) in (408, 429) or (_status(error) >= 500 and _status(error) not in _NEVER)


_NEVER = (501, 505)
"""The server does not know what it was asked for: asking again changes nothing."""
_OF_CHECKSUMS = (400, 411, 501)
"""Answers of servers that do not know the checksums that are sent with a request, or the chunks that carry them."""


def _time(value: Any) -> datetime:
    """The time in a listing or a header. botocore's own parser tries every format there is, which was a fourth of what a listing took."""
    from botocore.utils import parse_timestamp

    try:
        return datetime.fromisoformat(value) if value[4:5] == "-" else parsedate_to_datetime(value)
    except (TypeError, ValueError):
        parsed: datetime = parse_timestamp(value)
        return parsed


def _size(data: bytes | Path) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data)


def _pieces(data: bytes | Path, length: int) -> Iterator[bytes]:
    if isinstance(data, Path):
        with data.open("rb") as file:
            while piece := file.read(length):
                yield piece
    else:
        for start in range(0, len(data), length):
            yield data[start : start + length]


class S3Store:
    """Objects below one prefix of one bucket. Safe to use from many threads; close it when done."""

    def __init__(
        self, bucket: str, prefix: str, *, options: "S3Options", multipart_bytes: int = MULTIPART_BYTES, any_key: bool = False
    ) -> None:
        """Reach the bucket, or say why not.

        Args:
            bucket: bucket name.
            prefix: key prefix, without slashes at its ends; '' is the whole bucket.
            options: endpoint, region, checksums. Credentials come from the environment or a role.
            multipart_bytes: larger objects are sent in parts.
            any_key: read and list objects of other people, whatever their keys are; ours are strict.

        Raises:
            RecipeError: the endpoint's address is refused.
            StoreAccessError: no credentials, no such bucket, no right to it, or no server there.
        """
        from boto3.session import Session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
        from botocore.session import get_session

        if prefix:
            check_key(prefix)
        self._bucket, self._prefix, self._multipart_bytes = bucket, prefix, multipart_bytes
        if options.endpoint is not None:
            check_address(options.endpoint, field="run.s3.endpoint", instead="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        self._checksums, self._any_key = options.checksums, any_key
        self._proven: set[bool] = set()
        config = Config(
            retries={"total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=32,
            request_checksum_calculation=options.checksums,
            response_checksum_validation=options.checksums,
            s3={"addressing_style": "auto" if options.endpoint is None else "path"},
            user_agent=USER_AGENT,
        )
        try:  # Any: boto3 makes the client's methods at run time
            core = get_session()
            core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
            self._client: Any = Session(botocore_session=core).client(
                "s3", endpoint_url=options.endpoint, region_name=options.region, config=config
            )
        except (BotoCoreError, ValueError) as error:
            raise StoreAccessError(
                f"{self.uri}: cannot set up S3: {hide_passwords(str(error))}; correct run.s3, or the AWS_* variables and files "
                "it is read with"
            ) from error
        self._endpoint: str = redact_url(self._client.meta.endpoint_url)  # AWS_ENDPOINT_URL may hold a password
        try:
            self._call("", lambda: self._client.head_bucket(Bucket=bucket))
        except StoreError as error:
            raise StoreAccessError(str(error)) from error

    @property
    def uri(self) -> str:
        """s3://bucket/prefix, or s3://bucket."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # ------------------------------------------------------------------------------------------ requests and errors

    def _name(self, key: str) -> str:
        """The name in the bucket of a key of ours."""
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)

    def _read_name(self, key: str) -> str:
        """The name in the bucket of a key to read: of any, where other people's are meant.

        Raises:
            StoreError: for names that an address cannot hold: HTTP folds '.' and '..' away.
        """
        if not self._any_key:
            return self._name(key)
        if not key or len(key.encode()) > 1024 or "\0" in key or any(part in (".", "..") for part in key.split("/")):
            raise StoreError(f"{self.uri}: object key {key!r} is refused: no address reaches it; copy it to a plain name")
        return f"{self._prefix}/{key}" if self._prefix else key

    def _call(self, key: str, call: Callable[[], T], *, none_if: tuple[int, ...] = (), sends: bool = False) -> T | None:
        """Run one idempotent request until it succeeds; None when the server answers with a status in ``none_if``.

        Args:
            key: what it is about, for messages.
            call: the request.
            none_if: see above.
            sends: whether it carries an object's bytes, and so their checksum.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        for attempt in _attempts():
            try:
                return call()
            except (BotoCoreError, ClientError) as error:
                if _status(error) in none_if:
                    return None
                if attempt == ATTEMPTS or not _is_transient(error):
                    raise StoreError(f"{self._where(key)}: {self._explain(error, attempt, sends)}") from error
                _log.warning("%s: try %d of %d failed: %s", self._where(key), attempt, ATTEMPTS, error)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}".rstrip("/")

    def _explain(self, error: Exception, attempts: int, sends: bool) -> str:
        from botocore import exceptions as boto

        if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)):
            return f"no credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run under a role"
        if isinstance(error, boto.ConnectionError) and not isinstance(error, boto.SSLError):
            return f"cannot reach {self._endpoint} in {attempts} tries; start the server, or correct run.s3.endpoint"
        if not isinstance(error, boto.ClientError):
            return f"gave up at try {attempts} of {ATTEMPTS}: {hide_passwords(' '.join(str(error).split()))}"
        code, text, status = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", ""), _status(error)
        if code == "NoSuchKey":
            return "no such object"
        if code in ("NoSuchBucket", "404"):
            return f"there is no bucket {self._bucket!r} at {self._endpoint}; create it, or correct run.store"
        if status in (401, 403):
            return f"{self._endpoint} refused the credentials ({code}); check AWS_ACCESS_KEY_ID, its secret, and its rights to the bucket"
        if status in (301, 307):
            return f"bucket {self._bucket!r} is not in the region of {self._endpoint}; correct run.s3.region"
        advice = ""
        if sends and status in _OF_CHECKSUMS and self._checksums == "when_supported":
            advice = "; a server that refuses checksums it does not know answers so: try --set run.s3.checksums=when_required"
        return f"{self._endpoint} answered {status} {code} to try {attempts} of {ATTEMPTS}: {text}{advice}"

    # ------------------------------------------------------------------------------------------ writing

    def create(self, key: str, data: bytes | Path) -> bool:
        """Write an object if there is none; see ``Store.create``."""
        large = _size(data) > self._multipart_bytes
        if large and (same := self._same(key, data)) is not None:  # spares the upload; the condition below is what decides
            return same
        for _ in _attempts():
            if self._put_parts(key, data) if large else self._put(key, data):
                self._prove(key, data, large)
                return True
            if (same := self._same(key, data)) is not None:
                return same
        raise StoreError(f"{self._where(key)}: {ATTEMPTS} conditional writes were refused and no object is there; is another writer stuck?")

    def _prove(self, key: str, data: bytes | Path, large: bool) -> None:
        """Read the first object of each way of writing back: a server that does not know checksums in chunks stores them as content.

        Raises:
            StoreError: other bytes are stored than were sent; they are removed.
        """
        if large in self._proven:
            return
        if self._same(key, data) is False:
            info = self.info(key)
            stored = "none" if info is None else f"{info.size_bytes:,}"
            then = "which were removed"
            try:
                self.delete(key)
            except StoreError as error:
                then = f"which cannot be removed ({error}): delete that object"
            raise StoreError(
                f"{self._where(key)}: {_size(data):,} bytes were sent to {self._endpoint}, and it stored others ({stored} bytes), "
                f"{then}; a server, or a proxy before it, that takes checksums for content does so: "
                "try --set run.s3.checksums=when_required"
            )
        self._proven.add(large)

    def _put(self, key: str, data: bytes | Path) -> bool:
        """One conditional write; False when the server says that something is, or may be, there."""
        body = data.read_bytes() if isinstance(data, Path) else data
        name = self._name(key)
        put = self._call(
            key, lambda: self._client.put_object(Bucket=self._bucket, Key=name, Body=body, IfNoneMatch="*"), none_if=(409, 412), sends=True
        )
        return put is not None

    def _put_parts(self, key: str, data: bytes | Path) -> bool:
        """One multipart upload with a conditional completion; False as in ``_put``."""
        where = {"Bucket": self._bucket, "Key": self._name(key)}
        upload = self._call(key, lambda: self._client.create_multipart_upload(**where))
        assert upload is not None
        where["UploadId"] = upload["UploadId"]
        part_bytes = max(PART_BYTES, -(-_size(data) // 10_000))
        try:
            parts = [self._put_part(key, where, number, piece) for number, piece in enumerate(_pieces(data, part_bytes), 1)]
            complete = {**where, "MultipartUpload": {"Parts": parts}, "IfNoneMatch": "*"}
            # 404: our upload is gone because an earlier try of this very request completed it, and the reply was lost
            done = self._call(key, lambda: self._client.complete_multipart_upload(**complete), none_if=(404, 409, 412))
            if done is not None:
                return True
        except BaseException:
            self._abort(key, where)
            raise
        self._abort(key, where)
        return False

    def _put_part(self, key: str, where: dict[str, str], number: int, piece: bytes) -> dict[str, object]:
        reply = self._call(key, lambda: self._client.upload_part(**where, PartNumber=number, Body=piece), sends=True)
        assert reply is not None
        return {"PartNumber": number, "ETag": reply["ETag"]}

    def _abort(self, key: str, where: dict[str, str]) -> None:
        with suppress(StoreError):  # parts of a lost upload cost space, not correctness, and must not hide the cause
            self._call(key, lambda: self._client.abort_multipart_upload(**where), none_if=(404,))

    def _same(self, key: str, data: bytes | Path) -> bool | None:
        """Read an object back and compare size, then sha256, twice before it is called another; None if there is no object."""
        info = self.info(key)
        if info is None:
            return None
        if info.size_bytes != _size(data):
            return False
        wanted = sha256_file(data) if isinstance(data, Path) else sha256_bytes(data)
        return self._sha256(key) == wanted or self._sha256(key) == wanted

    def _sha256(self, key: str) -> str:
        digest = hashlib.sha256()
        for block in self._blocks(key):
            digest.update(block)
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------ reading

    def _read(self, key: str, byte_range: str | None) -> tuple[bytes, int]:
        """One GET: the bytes, and the object's whole size."""
        parameters = {"Bucket": self._bucket, "Key": self._read_name(key)} | ({"Range": byte_range} if byte_range else {})
        reply = self._client.get_object(**parameters)
        with closing(reply["Body"]) as body:
            data: bytes = body.read()  # raises when it is shorter than its Content-Length
        if byte_range is None:
            return data, len(data)
        if "ContentRange" not in reply:
            raise StoreError(f"{self._where(key)}: {self._endpoint} ignores Range headers; use a server that honours them")
        return data, int(reply["ContentRange"].rpartition("/")[2])

    def get(self, key: str) -> bytes:
        """All bytes of an object."""
        found = self._call(key, lambda: self._read(key, None))
        assert found is not None
        return found[0]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """``length`` bytes from offset ``start``; fewer only at the object's end."""
        assert min(start, length) >= 0, f"range {start}+{length} is not in an object"
        return self._range(key, start, max(length, 1))[0][:length]

    def _range(self, key: str, start: int, length: int) -> tuple[bytes, int]:
        from botocore.exceptions import IncompleteReadError

        def call() -> tuple[bytes, int]:
            data, size = self._read(key, f"bytes={start}-{start + length - 1}")
            expected = min(start + length, size) - start
            if len(data) != expected:
                raise IncompleteReadError(actual_bytes=len(data), expected_bytes=expected)
            return data, size

        # 416: nothing at or after `start`, so the object ends there or before
        return self._call(key, call, none_if=(416,)) or (b"", start)

    def _blocks(self, key: str) -> Iterator[bytes]:
        """The object in order, in blocks that are retried one by one."""
        start, size = 0, 1
        while start < size:
            block, size = self._range(key, start, PART_BYTES)
            yield block
            start += len(block)

    def download(self, key: str, path: Path) -> None:
        """Write an object to a local file, all or nothing."""
        try:
            with replacing(path) as file:
                for block in self._blocks(key):
                    file.write(block)
        except OSError as error:
            raise StoreError(f"{self._where(key)}: cannot write to {path}: {error.strerror or error}") from error

    def info(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or None if there is none."""
        name = self._read_name(key)
        head = self._call(key, lambda: self._client.head_object(Bucket=self._bucket, Key=name), none_if=(404,))
        return None if head is None else ObjectInfo(key, head["ContentLength"], head["LastModified"].timestamp(), head.get("ETag", ""))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, sorted by key (some servers list in another order)."""
        if prefix and not self._any_key:
            check_key(prefix.removesuffix("/"))
        base = f"{self._prefix}/" if self._prefix else ""
        parameters, found = {"Bucket": self._bucket, "Prefix": base + prefix}, []
        while True:
            page = self._call(prefix, lambda: self._client.list_objects_v2(**parameters))
            assert page is not None
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # a marker of an empty directory, not an object of ours
                    found.append(
                        ObjectInfo(item["Key"].removeprefix(base), item["Size"], item["LastModified"].timestamp(), item.get("ETag", ""))
                    )
            if not page["IsTruncated"]:
                return iter(sorted(found, key=lambda info: info.key))
            parameters["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        """Remove an object; no error if there is none."""
        name = self._name(key)
        self._call(key, lambda: self._client.delete_object(Bucket=self._bucket, Key=name), none_if=(404,))

    def local_path(self, key: str) -> Path | None:
        """None: the bytes are elsewhere."""
        check_key(key)
        return None
