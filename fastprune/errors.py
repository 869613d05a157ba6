"""The errors a user can cause. Each text says what, which value, which file, and the cure."""


class FastpruneError(Exception):
    """Base of every error that the user's data, files or settings can cause."""


class InvalidValueError(FastpruneError, ValueError):
    """An argument is outside its domain; also a ValueError."""


class ArtifactError(FastpruneError):
    """A file that a stage reads or writes is missing, damaged or cannot be written."""


class BetonError(ArtifactError):
    """A beton is damaged, unfinished, or cannot be read."""


class ConversionError(FastpruneError):
    """An image or an image folder cannot be converted."""


class JpegError(FastpruneError):
    """The bytes of an image are no whole JPEG."""


class ArtifactMismatch(FastpruneError):  # noqa: N818 - the name is part of the public contract
    """Two artifacts were made from different images."""


class RecipeError(FastpruneError):
    """A recipe has an unknown key or a value outside its domain."""


class MissingDependencyError(FastpruneError, ImportError):
    """An optional package is needed for what was asked; also an ImportError."""


class LoadingError(FastpruneError):
    """A batch could not be loaded: a row failed to decode, a worker died, a file changed."""


class TrainingError(FastpruneError):
    """A training or scoring run cannot go on."""
