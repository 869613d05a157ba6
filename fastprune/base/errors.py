"""The errors and warnings a user can cause; each text names value, file and cure."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1])


class FastpruneError(Exception):
    """Base of every error that the user's data, files or settings can cause."""


class InvalidValueError(FastpruneError, ValueError):
    """An argument is outside its domain; also a ValueError."""


class ArtifactError(FastpruneError):
    """A file that a stage reads or writes is missing, damaged or cannot be written."""


class BetonError(ArtifactError):
    """A beton is damaged, unfinished, or cannot be read."""


class StorageError(ArtifactError):
    """Object storage does not give or take what it was asked for."""


class ClusterError(FastpruneError):
    """A Ray cluster cannot be reached, or a task died as often as it was repeated."""


class ConversionError(FastpruneError):
    """An image or an image folder cannot be converted."""


class JpegError(FastpruneError):
    """The bytes of an image are not a whole JPEG."""


class ArtifactMismatch(FastpruneError):  # noqa: N818 - the name is part of the public contract
    """Two artifacts were made from different images."""


class RecipeError(FastpruneError):
    """A recipe has an unknown key or a value outside its domain."""


class MissingDependencyError(FastpruneError, ImportError):
    """An optional package is needed for what was asked; also an ImportError."""


class LoadingError(FastpruneError):
    """A batch could not be loaded: a row failed to decode, a worker died, a file changed."""


class TrainingError(FastpruneError):
    """A training or scoring run cannot continue."""


class TrainingStopped(TrainingError):  # noqa: N818 - nothing went wrong
    """A signal ended a training run, which can resume from its checkpoint.

    Attributes:
        exit_code: what a program ends with that was ended by the signal: 128 + its number.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PeerError(TrainingError):
    """Another process of the run failed; the text has its reason."""


class ContentNotComparedWarning(UserWarning):
    """Two artifacts agree in structure, but one of them has no content fingerprint to compare."""


class ForeignManifestWarning(UserWarning):
    """The manifest beside a beton is damaged or belongs to another beton, and is not used."""


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint is not what was written; the one before it is tried."""


@contextmanager
def importing(package: str, *, extra: str, purpose: str) -> Iterator[None]:
    """Turn a failed import in the block into a MissingDependencyError with the line to install it.

    `package` is its name for `pip`, `extra` the extra of fastprune that brings it, and `purpose`
    the words in front of "needs the package".
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the package {package} ({error}). Install it with: "
            f"pip install 'fastprune[{extra}]'"
        ) from error


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn about the line outside of fastprune that the current call came from.

    Its depth depends on the path through the package, so a fixed stack level could not point at it.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
