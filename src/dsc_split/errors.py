"""Every error that dsc-split raises on purpose.

::

    DscError                     exit 1
     |- UsageError               exit 2   unknown source, target, model or option; a number out of range
     |- ExportError              exit 1   the model cannot be exported, or the exported graph disagrees
     |- BundleBusyError          exit 1   another command is writing the same bundle
     |- CutError                 exit 3   a cut that the user named cannot be made, or no pair passed its proof
     |- BackendError             exit 4   a back-end failed
     |   |- OutOfMemoryError     exit 4   ... because memory ran out
     |   `- BackendUnavailable   exit 5   ... is not installed, or has no device
     `- DamagedError             exit 6   a file is damaged, hostile, or does not fit
         |- ModelFileError
         |- BundleError
         |   `- SignatureError           ... is not signed by a trusted key
         |- TableError
         `- EngineFileError
             `- EngineMismatch           ... an engine was built for another library, version or GPU

Catch the base to catch them all::

    try:
        bundle = Bundle.open("b4")
    except DscError as error:
        print(error)
        raise SystemExit(error.exit_code)
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "BundleBusyError",
    "BundleError",
    "CutError",
    "DamagedError",
    "DscError",
    "EngineFileError",
    "EngineMismatch",
    "ExportError",
    "ModelFileError",
    "OutOfMemoryError",
    "SignatureError",
    "TableError",
    "UsageError",
]


class DscError(Exception):
    """Base of all errors of this package; the message says what is wrong, what was expected, and what to do."""

    exit_code: ClassVar[int] = 1
    """Exit status of the command line."""


class UsageError(DscError):
    """A source, target, model or option is unknown, or a number is out of range."""

    exit_code = 2


class ExportError(DscError):
    """A model cannot be exported, or the exported graph computes other outputs than the model."""


class BundleBusyError(DscError):
    """Another command is writing the same bundle."""


class CutError(DscError):
    """A cut that the user named cannot be made, or no pair passed its proof."""

    exit_code = 3


class BackendError(DscError):
    """A back-end failed to build, load or run a graph."""

    exit_code = 4


class OutOfMemoryError(BackendError):
    """A back-end failed because memory ran out."""


class BackendUnavailable(BackendError):  # noqa: N818 - the name names a state
    """A back-end or another optional package is not installed, or has no device."""

    exit_code = 5


class DamagedError(DscError):
    """A file is damaged, hostile, or does not fit."""

    exit_code = 6


class ModelFileError(DamagedError):
    """A model or weights file is damaged, hostile, or does not fit."""


class BundleError(DamagedError):
    """A bundle is damaged, incomplete, or of a newer format."""


class SignatureError(BundleError):
    """A bundle is not signed by a trusted key, or its signature does not fit the bundle."""


class TableError(DamagedError):
    """A lookup table is damaged, or of a newer format."""


class EngineFileError(DamagedError):
    """An engine file is damaged, or of a newer format."""


class EngineMismatch(EngineFileError):  # noqa: N818 - the name names a finding
    """An engine was built for another library, version, GPU or set of options than the one in use."""
