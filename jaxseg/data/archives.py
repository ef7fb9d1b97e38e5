"""Archives of data sets, unpacked so that nothing lands outside of their folder.

Files and folders are all that is unpacked: links and devices are refused, wherever they point.
"""

import hashlib
import io
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from jaxseg.errors import InputError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
RATIO = 200  # what is unpacked over the archive: more is taken for a decompression bomb,
SMALL = 100_000_000  # from so many bytes on
MARK = ".archive"  # in the folder: which archive it was unpacked from
END = 2**20  # bytes
HEADER = 512  # bytes that a member counts for beside its own, so that empty ones are not free


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def folder_of(archive: Path) -> Path:
    """Where an archive is unpacked: beside it, by its name without the suffixes."""
    suffix = max((s for s in SUFFIXES if archive.name.lower().endswith(s)), key=len)
    return archive.with_name(archive.name[: -len(suffix)])


def unpack(archive: Path, folder: Path) -> Path:
    """The folder with what is in a .tar (.gz, .bz2, .xz) or .zip; it appears whole or not at all.

    A folder that this archive was unpacked into is left as it is. Raises InputError for any other
    folder of that name; before anything is written, for a member that would land outside of the
    folder, is no file or folder, or is one of a decompression bomb; and for an archive that cannot
    be read or does not fit on the disk.
    """
    mark = identity(archive)
    if folder.exists():
        found = folder / MARK
        if not found.is_file() or found.read_text() != mark:
            raise InputError(
                f"{folder} is not what {archive.name} holds now: remove that folder, and it is "
                "unpacked anew, or name the folder instead of the archive"
            )
        return folder
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking") as temporary:
            inside = Path(temporary) / "inside"
            inside.mkdir()
            if zipfile.is_zipfile(archive):
                _unzip(archive, inside)
            else:
                _untar(archive, inside)
            (inside / MARK).write_text(mark)
            try:
                inside.rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    except InputError:
        raise
    except Exception as error:  # the formats raise many kinds where they are broken
        raise InputError(f"cannot unpack {archive} into {folder}: {error}") from error
    return folder


def identity(archive: Path) -> str:
    """Tells archives apart: their size and end, where all but plain tar keep checksums."""
    with archive.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - END))
        return f"{size} {hashlib.sha256(file.read()).hexdigest()}\n"


def _untar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        # One by one: the headers of a bomb tell before its contents are read.
        members = _checked(archive, folder, ((m.name, m.size, _tar_kind(m), m) for m in tar))
        tar.extractall(folder, members, filter="data")


def _tar_kind(member: tarfile.TarInfo) -> str:
    if member.isreg() or member.isdir():
        return ""
    return "a link" if member.issym() or member.islnk() else "a device or another special file"


def _unzip(archive: Path, folder: Path) -> None:
    def kind(info: zipfile.ZipInfo) -> str:
        mode = info.external_attr >> 16  # of Unix; 0 where another system made it
        return "" if stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR) else "a link or device"

    with zipfile.ZipFile(archive) as zipped:
        infos = ((i.filename, i.file_size, kind(i), i) for i in zipped.infolist())
        zipped.extractall(folder, _checked(archive, folder, infos))


def _checked(archive: Path, folder: Path, members: Iterator[tuple]) -> list:
    """The members of (name, bytes, "" or what is wrong with it, member)."""
    most = max(SMALL, RATIO * archive.stat().st_size)
    room = shutil.disk_usage(folder).free
    total, kept = 0, []
    for name, size, wrong, member in members:
        names = (PurePosixPath(name), PureWindowsPath(name))
        if any(n.is_absolute() or n.drive or ".." in n.parts for n in names):
            wrong = "outside of its folder"
        if wrong:
            raise InputError(
                f"{archive} holds {name!r}, which is {wrong}: not unpacked. Unpack it yourself "
                "where you trust it"
            )
        total += size + HEADER
        if total > most:
            raise InputError(
                f"{archive} would unpack to more than {most / 1e6:.0f} MB, {RATIO} times its size: "
                "taken for a decompression bomb. Unpack it yourself where you trust it"
            )
        if total > room:
            raise InputError(
                f"{archive} needs more than the {room / 1e9:.1f} GB that are free at {folder}"
            )
        kept.append(member)
    return kept
