"""The version that everything stored carries, and the refusal of any other.

A format has a version from its first day, and there is one version of each. Bytes of another version are no damage: maintenance
never moves them aside, so that rows which a teacher was paid for wait for code that reads them.
"""

from kd_core.errors import VersionError

__all__ = ["VERSION", "expect_version"]

VERSION = 1
"""Version of every format that is written."""


def expect_version(found: object, what: str, *, otherwise: str = "use another store") -> None:
    """Refuse what has another version than the one that is read.

    Args:
        found: version that was read.
        what: name of what has it, with its place.
        otherwise: what the user can do in place of updating the package.

    Raises:
        VersionError: the version is another one.
    """
    if found != VERSION:
        raise VersionError(f"{what} of version {found}; this code reads version {VERSION}; update the package, or {otherwise}")
