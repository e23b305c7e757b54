"""Counts what happens to files below a folder, by Linux's inotify."""

import ctypes
import os
import pathlib
import struct

_CREATE, _DELETE, _MODIFY, _CLOSED = 0x100, 0x200, 0x2, 0x8
_MOVED_FROM, _MOVED_TO = 0x40, 0x80
_KINDS = _CREATE | _DELETE | _MODIFY | _CLOSED | _MOVED_FROM | _MOVED_TO
_IS_FOLDER, _OVERFLOW = 0x40000000, 0x4000
_EVENT = struct.Struct("iIII")  # watch, kind, cookie, length of the name


class FileEvents:
    """Files and folders made, written, closed, renamed and deleted below `folder`.

    A folder that appears is watched from then on, and what is in it by then counts as made. With
    `within`, only what happens in folders of that name, and below them, counts. `fileno` is for
    `select`; `read` never waits.
    """

    def __init__(self, folder: pathlib.Path, *, within: str | None = None):
        self._within = within
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.inotify_init1(os.O_NONBLOCK)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._folders: dict[int, pathlib.Path] = {}
        self._watch(folder)

    def fileno(self) -> int:
        return self._file

    def read(self) -> int:
        """How many events came since the last call."""
        count = 0
        while True:
            try:
                content = os.read(self._file, 1 << 16)
            except BlockingIOError:
                return count
            while content:
                watch, kind, _, length = _EVENT.unpack_from(content)
                name = content[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode()
                content = content[_EVENT.size + length :]
                assert not kind & _OVERFLOW, "more events than the kernel keeps"
                count += bool(kind & _KINDS) and self._counts(self._folders[watch])
                if kind & _IS_FOLDER and kind & (_CREATE | _MOVED_TO):
                    count += self._watch(self._folders[watch] / name)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()

    def _watch(self, folder: pathlib.Path) -> int:
        """Watches the folder and those in it; how many entries it had already."""
        number = self._libc.inotify_add_watch(self._file, os.fsencode(folder), _KINDS)
        if number < 0:  # gone again
            return 0
        self._folders[number] = folder
        try:
            entries = list(os.scandir(folder))
        except OSError:
            return 0
        inner = (self._watch(pathlib.Path(entry.path)) for entry in entries if entry.is_dir())
        return (len(entries) if self._counts(folder) else 0) + sum(inner)

    def _counts(self, folder: pathlib.Path) -> bool:
        return self._within is None or self._within in folder.parts
