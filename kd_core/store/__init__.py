"""Object storage: one protocol, a local directory and S3, and the one function that chooses between them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kd_core.errors import StoreAccessError
from kd_core.store.base import ObjectInfo, Store, check_key
from kd_core.store.local import LocalStore
from kd_core.store.s3 import S3Store

if TYPE_CHECKING:
    from kd_core.recipe import S3Options

__all__ = ["LocalStore", "ObjectInfo", "S3Store", "Store", "check_key", "open_bucket", "open_store"]


def open_store(uri: str, options: "S3Options") -> Store:
    """Open the store at a URI, and reach it: an S3 bucket must be there, a local directory is made at the first write.

    Args:
        uri: s3://bucket, s3://bucket/prefix, or a local directory.
        options: how to reach S3; unused for a local directory.

    Raises:
        StoreAccessError: another scheme, a file in the place of a directory, or a bucket that cannot be reached (the message says why, and
            what to do).
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        path = Path(uri).absolute()
        file = next((place for place in (path, *path.parents) if os.path.exists(place) and not os.path.isdir(place)), None)
        if file is not None:
            raise StoreAccessError(
                f"store {uri!r}: {file} is a file, and a store is a directory; name another one (a recipe's is run.store)"
            )
        return LocalStore(Path(uri))
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise StoreAccessError(f"store {uri!r} is not understood; use s3://bucket/prefix or a local directory")
    return S3Store(bucket, prefix.strip("/"), options=options)


def open_bucket(bucket: str, options: "S3Options") -> Store:
    """Open somebody's bucket, whose objects are read under whatever they are called.

    Raises:
        StoreAccessError: it cannot be reached.
    """
    return S3Store(bucket, "", options=options, any_key=True)
