"""Which rows of a mirror are there: a byte for each file's tables and for each row, on disk.

A mirror is a beton, or a folder of shards, whose files are sparse: they have the size of the whole
and hold the rows that were fetched, at their own offsets.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import ArtifactError
from fastprune.base.provenance import Fingerprint
from fastprune.base.untrusted import member, read_json
from fastprune.beton.opening import MIRROR_NAME

MARKS_NAME = "mirror.rows"

_FORMAT = 1


@dataclass(frozen=True)
class MirroredFile:
    """One file of a mirror.

    Attributes:
        name: of the file and of its object.
        num_rows: of the whole file.
        size: of the whole file, in bytes.
        version: the object's when the mirror was made; an object of another one is refused.
    """

    name: str
    num_rows: int
    size: int
    version: str


@dataclass(frozen=True)
class MirrorRecord:
    """What mirror.json says.

    Attributes:
        url: of the beton, or of the folder of its shards, without a slash at its end.
        fingerprint: of the whole beton.
        files: in the order of their rows.
    """

    url: str
    fingerprint: Fingerprint
    files: tuple[MirroredFile, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what mirror.json holds."""
        record = asdict(self)
        return {"format": _FORMAT, **record, "fingerprint": self.fingerprint.to_dict()}

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the record of a folder; None where the folder is no mirror.

        Raises:
            ArtifactError: mirror.json is damaged.
        """
        path = folder / MIRROR_NAME
        try:
            record = read_json(path)
            if member(record, "format", int) != _FORMAT:
                raise ValueError(f"its format is {record['format']}, and {_FORMAT} is read")
            files = tuple(
                MirroredFile(
                    member(entry, "name", str),
                    member(entry, "num_rows", int),
                    member(entry, "size", int),
                    member(entry, "version", str),
                )
                for entry in member(record, "files", list)
            )
            for file in files:
                # Rows are written into these files: a name must not leave the folder.
                if Path(file.name).name != file.name or file.name in ("", ".", ".."):
                    raise ValueError(f"it lists {file.name!r}, which is no file name")
            fingerprint = Fingerprint.from_dict(member(record, "fingerprint", dict))
            return cls(member(record, "url", str), fingerprint, files)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{path} is damaged ({error}). Remove {folder}, and fetch the rows again: "
                "fastprune stage URL SUBSET FOLDER"
            ) from error


def open_marks(folder: Path, record: MirrorRecord, mode: str = "r") -> NDArray[np.uint8]:
    """Map a mirror's marks: (F + N,) uint8, 1 where a file's tables and where a row is there.

    A byte and not a bit: processes that set neighbors at once do not undo each other.

    Raises:
        ArtifactError: the file is missing, or has another size.
    """
    path, num_marks = folder / MARKS_NAME, len(record.files) + record.fingerprint.num_rows
    try:
        marks = np.memmap(path, np.uint8, mode)  # type: ignore[call-overload]
    except (OSError, ValueError) as error:
        marks, why = np.empty(0, np.uint8), f" ({error})"
    else:
        why = ""
    if len(marks) != num_marks:
        raise ArtifactError(
            f"{path} should have {num_marks:,} bytes, but has {len(marks):,}{why}. Remove "
            f"{folder}, and fetch the rows again: fastprune stage {record.url} SUBSET {folder}"
        )
    # A plain array on the same memory: memmap's own methods are slow on small pieces.
    plain: NDArray[np.uint8] = marks.view(np.ndarray)
    return plain


def marks_of(path: Path) -> NDArray[np.uint8] | None:
    """Return the marks of the rows of one beton in a mirror.

    Args:
        path: a folder of shards, or a file.

    Returns:
        (N,) uint8, 1 for rows that are there, which changes as rows are fetched;
        None for a beton that is no mirror's.

    Raises:
        ArtifactError: the mirror's record or marks are damaged.
    """
    folder = path if path.is_dir() else path.parent
    record = MirrorRecord.read(folder)
    if record is None:
        return None
    marks = open_marks(folder, record)[len(record.files) :]
    if path == folder:
        return marks
    first_row = 0
    for file in record.files:
        if file.name == path.name:
            return marks[first_row : first_row + file.num_rows]
        first_row += file.num_rows
    return None
