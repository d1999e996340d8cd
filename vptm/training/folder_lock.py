"""One process at a time trains in a run folder."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """`flock` of a folder, which the system lets go of where a process is killed.

    Nothing is locked where the platform or the file system has no `flock` of folders, as Windows and some network file
    systems: two runs in one folder there overwrite each other, as they would without it.

    Example:
        >>> import tempfile
        >>> folder, lock, other = Path(tempfile.mkdtemp()), FolderLock(), FolderLock()
        >>> lock.take(folder)
        >>> other.take(folder)
        Traceback (most recent call last):
        ValueError: run folder ... is in use: another process trains in it
        >>> lock.release()
        >>> other.take(folder)
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._closed: weakref.finalize[..., FolderLock] | None = None

    def take(self, folder: Path) -> None:
        """Lock `folder`; nothing happens where it is not there, or this object has it.

        Raises:
            ValueError: another holds it.
        """
        if fcntl is None or self._descriptor is not None:
            return
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:  # what reads and writes in the folder says why
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"run folder {folder} is in use: another process trains in it") from None
        except OSError:
            os.close(descriptor)
            return
        self._descriptor, self._closed = descriptor, weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Unlock what was taken."""
        if self._descriptor is None or self._closed is None:
            return
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # workers that were forked hold the descriptor, too
        self._closed()
        self._descriptor = self._closed = None
