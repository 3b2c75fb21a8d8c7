"""Writing files so that a kill leaves either the old or the new one, never a half."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hmar_mega.errors import UserError

#: What the system says of a place that takes no more, as opposed to a mistake of ours.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

#: What file systems without locks answer.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

#: What it says where a file can have one name only.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

log = logging.getLogger(__name__)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file through a temporary beside it, fsync and rename.

    Raises:
        UserError: when the folder cannot be written.
    """
    with open_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def create_atomic(path: Path, data: str) -> bool:
    """Write a file unless there is one: of several processes that do so at once one does, whole.

    Returns:
        Whether this call wrote it.

    Raises:
        UserError: when the folder cannot be written.
    """
    created = False

    def give_name(temporary: Path, path: Path) -> None:
        nonlocal created
        created = _link(temporary, path)

    with open_atomic(path, give_name) as file:
        file.write(data.encode())
    return created


def _link(temporary: Path, path: Path) -> bool:
    """Give a file its name unless that is taken: a rename would replace what another process wrote meanwhile."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as err:
        if err.errno not in NO_LINKS:
            raise
        if path.exists():
            return False
        log.warning(
            "the file system of %s has no hard links: if another process writes %s at this very moment, the last one "
            "wins", path.parent, path.name,
        )  # fmt: skip
        temporary.rename(path)
    return True


@contextlib.contextmanager
def open_atomic(path: Path, give_name: Callable[[Path, Path], object] = Path.replace) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that becomes it when the block ends well, and vanishes when it does not.

    Args:
        give_name: how the finished temporary becomes `path`, whatever is there.

    Raises:
        UserError: when the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        give_name(temporary, path)
        sync_path(path.parent)
    except OSError as err:
        raise cannot_write(path, err) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        UserError: when `path` exists and is not empty, or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder; choose another output or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as err:
        raise cannot_write(path, err) from None
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            file.chmod(0o755 if file.is_dir() else 0o644)
        sync_folder(temporary)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        sync_path(path.parent)
    except OSError as err:
        if err.errno in FULL:
            raise cannot_write(path, err) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raise UserError unless `folder` is, or could be made as, a folder to write in."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise cannot_write(folder, NotADirectoryError(errno.ENOTDIR, f"{existing} is not a folder"))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise cannot_write(folder, PermissionError(errno.EACCES, f"no permission to write in {existing}"))


def cannot_write(path: Path, err: OSError) -> UserError:
    """The error to show when the system refuses to write `path`."""
    return UserError(f"cannot write {path}: {err.strerror}; choose a folder you can write to with space left")


def sync_folder(folder: Path) -> None:
    """fsync every file below a folder, and the folder itself."""
    for file in sorted(folder.rglob("*")):
        sync_path(file)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """fsync one file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
