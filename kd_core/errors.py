"""Every error a user can meet, as one small tree.

    KDError                  something is wrong; the message says what, where, and what to do
    |- RecipeError           the recipe (or a command-line override) is not valid             exit code 2
    |- StoreError            the object store refused or failed
    |  |- StoreAccessError   it cannot be opened, reached or written at all                  exit code 2
    |  `- IntegrityError     bytes in the store are not the bytes that were recorded
    |     `- QuarantinedError and they were rows, now moved aside: they are computed again by whoever asks next
    |- ArtifactError         a record is missing, or disagrees with the current recipe
    |- SourceError           prompts or gold data cannot be read or are not of the stated form   exit code 2
    |- TeacherError          the teacher cannot be loaded, reached, or answers nonsense
    |- SoftLabelError        soft labels are missing, malformed or not valid for the objective
    |- TrainingError         training diverged or cannot be resumed
    `- VersionError          something was written in a format that this code does not read: sound, and never moved aside

All are picklable (one string argument) because they cross process boundaries.
"""

__all__ = [
    "ArtifactError",
    "IntegrityError",
    "KDError",
    "QuarantinedError",
    "RecipeError",
    "SoftLabelError",
    "SourceError",
    "StoreAccessError",
    "StoreError",
    "TeacherError",
    "TrainingError",
    "VersionError",
]


class KDError(Exception):
    """Base of every error this project raises on purpose."""


class RecipeError(KDError):
    """The recipe is not valid: a wrong key, type, range or combination."""


class StoreError(KDError):
    """The object store failed or cannot be reached."""


class StoreAccessError(StoreError):
    """The store's address, rights or server are wrong: it cannot be opened, reached or written."""


class IntegrityError(StoreError):
    """Stored bytes differ from their recorded checksum."""


class QuarantinedError(IntegrityError):
    """A damaged shard of rows was moved aside with its commit; its rows are missing now, and are computed again."""


class ArtifactError(KDError):
    """An artifact's record is missing or contradicts the recipe."""


class SourceError(KDError):
    """A data source cannot be read or has another form than the recipe states."""


class TeacherError(KDError):
    """The teacher cannot be loaded or reached, or its output is unusable."""


class SoftLabelError(KDError):
    """Soft labels are missing, malformed, or not valid for the requested objective."""


class TrainingError(KDError):
    """Training diverged or cannot continue from its checkpoint."""


class VersionError(KDError):
    """Something was written in a format that this code does not read; nothing says that it is damaged."""
