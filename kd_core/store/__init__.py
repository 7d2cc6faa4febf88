"""Object storage: one protocol, a local directory and S3."""

from kd_core.store.base import ObjectInfo, Store, check_key
from kd_core.store.local import LocalStore
from kd_core.store.s3 import S3Store, open_store

__all__ = ["LocalStore", "ObjectInfo", "S3Store", "Store", "check_key", "open_store"]
