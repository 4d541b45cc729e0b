"""Mounts a file system that shows a folder, and that sticks or gives errors when a test orders it.

    with FaultyDisk(folder) as disk:      # files made under disk.path lie in `folder` too
        disk.stick()                      # no request is answered; whoever waits for one cannot be killed
        disk.release()

A separate process answers the kernel over /dev/fuse, without any library. Mounting needs root. When that process ends,
the kernel releases all that wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.support.repository import ROOT

_FORCE, _DETACH = 1, 2  # flags of umount2: requests fail at once; the mount point goes at once
_LARGEST_WRITE = 1 << 17
_ROOT_NODE = 1
_VALID_SECONDS = 1  # how long the kernel may cache names and sizes


class NoFaultyDisk(Exception):
    """The file system cannot be mounted on this machine; the text says why."""


class FaultyDisk:
    """Mounts and controls the file system; a missing `folder` is made.

    Args:
        path: where it is mounted; None stands for a path beside `folder`.
    """

    def __init__(self, folder: Path, path: Path | None = None) -> None:
        self._folder = folder
        self.path = path or folder.with_name(f"{folder.name}-faulty")

    def __enter__(self) -> Self:
        """
        Raises:
            NoFaultyDisk: it cannot be mounted here.
        """
        for path in (self._folder, self.path):
            path.mkdir(parents=True, exist_ok=True)
        try:
            device = os.open("/dev/fuse", os.O_RDWR)
        except OSError as error:
            raise NoFaultyDisk(f"/dev/fuse cannot be opened: {error.strerror}") from error
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.mount(b"faulty_disk", os.fsencode(self.path), b"fuse.faulty_disk", 0, options.encode())
        if done != 0:
            os.close(device)
            raise NoFaultyDisk(f"it cannot be mounted: {os.strerror(ctypes.get_errno())}")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faulty_disk", str(device), str(self._folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[device],
            text=True,
        )
        os.close(device)
        # Waits for the kernel's first request. A disk that sticks before its answer lets waiting processes be killed.
        self.path.stat()
        return self

    def __exit__(self, *exception: object) -> None:
        ctypes.CDLL(None).umount2(os.fsencode(self.path), _FORCE | _DETACH)
        self._process.kill()
        self._process.wait()

    def stick(self, *, killable: bool = False) -> None:
        """Answers no request from now on; what the kernel has cached cannot be read either.

        Args:
            killable: leaves requests with the kernel, which then lets waiting processes be killed.
        """
        self._order(order="stick", killable=killable)

    def release(self) -> None:
        """Answers the requests that wait, and all later ones."""
        self._order(order="release")

    def fail(self, name: str, first: int = 0) -> None:
        """Answers EIO to reads beyond byte `first` of files whose paths end with `name`; their cache is dropped."""
        self._order(order="fail", name=name, first=first)

    def heal(self) -> None:
        """Stops giving errors."""
        self._order(order="heal")

    def num_waiting(self) -> int:
        """Returns how many requests were taken from the kernel and not answered: who asked cannot be killed."""
        return int(self._order(order="count"))

    def _order(self, **order: Any) -> str:
        """Returns the program's answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError("the file system's program has failed")
        return answer


# --- The program that answers the kernel: include/uapi/linux/fuse.h has the numbers and structures. ---

_IN, _OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4Q2I")
_SETATTR = struct.Struct("<2I6Q8I")
_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _ATIME_NOW, _MTIME_NOW = 1, 2, 4, 8, 16, 32, 128, 256
_FORGET, _INIT, _INTERRUPT, _DESTROY, _BATCH_FORGET = 2, 26, 36, 38, 42
_INVALIDATE_INODE = 2
_RENAME_FLAGS = ctypes.c_uint


class _Server:
    """Answers the kernel's requests from the files of `folder`."""

    def __init__(self, device: int, folder: str) -> None:
        self._device = device
        # A descriptor that only names the file, so that it may be renamed or deleted; and the way back.
        self._nodes = {_ROOT_NODE: os.open(folder, os.O_PATH)}
        self._by_id = {self._id(self._nodes[_ROOT_NODE]): _ROOT_NODE}
        self._lookups: dict[int, int] = {}
        self._next_node = _ROOT_NODE + 1
        self._files: dict[int, int] = {}
        self._held: list[bytes] | None = None  # requests of a disk that sticks
        self._reads = True
        self._failing: tuple[str, int] | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._orders: list[dict[str, Any]] = []
        self._wake, self._woken = os.pipe()
        self._answers: dict[int, Callable[[int, bytes], bytes]] = {
            1: self._lookup,
            3: self._getattr,
            4: self._setattr,
            5: self._readlink,
            6: self._symlink,
            9: self._mkdir,
            10: lambda node, rest: self._done(os.unlink(_name(rest), dir_fd=self._nodes[node])),
            11: lambda node, rest: self._done(os.rmdir(_name(rest), dir_fd=self._nodes[node])),
            12: lambda node, rest: self._rename(node, struct.unpack_from("<Q", rest)[0], 0, rest[8:]),
            13: self._link,
            14: self._open,
            15: self._read,
            16: self._write,
            17: self._statfs,
            18: self._release,
            20: self._fsync,
            26: self._init,
            27: lambda node, rest: struct.pack("<QII", 0, 0, 0),
            28: self._readdir,
            29: lambda node, rest: b"",
            30: lambda node, rest: b"",
            35: self._create,
            45: lambda node, rest: self._rename(node, *struct.unpack_from("<QI", rest), rest[16:]),
        }

    def run(self) -> None:
        threading.Thread(target=self._hear_orders, daemon=True).start()
        while True:
            waited_for = [self._wake, self._device] if self._reads else [self._wake]
            ready, _, _ = select.select(waited_for, [], [])
            if self._wake in ready:
                os.read(self._wake, 1)
                self._obey(self._orders.pop(0))
            elif ready:
                try:
                    request = os.read(self._device, _LARGEST_WRITE + 4096)
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                        continue
                    return  # unmounted
                if self._held is None:
                    self._answer(request)
                else:
                    self._held.append(request)

    def _hear_orders(self) -> None:
        for line in sys.stdin:
            order = json.loads(line)
            if order["order"] in ("stick", "fail"):
                self._forget_pages()
            self._orders.append(order)
            os.write(self._woken, b".")

    def _obey(self, order: dict[str, Any]) -> None:
        match order["order"]:
            case "stick":
                self._held, self._reads = [], not order["killable"]
                # What came back to memory meanwhile; may wait for what is being read, so beside.
                threading.Thread(target=self._forget_pages, daemon=True).start()
            case "release":
                held, self._held, self._reads = self._held or [], None, True
                for request in held:
                    self._answer(request)
            case "fail":
                self._failing = (order["name"], order["first"])
                threading.Thread(target=self._forget_pages, daemon=True).start()
            case "heal":
                self._failing = None
            case "count":
                kinds = [_IN.unpack_from(request)[1] for request in self._held or []]
                print(sum(kind not in (_FORGET, _BATCH_FORGET, _INTERRUPT) for kind in kinds), flush=True)
                return
        print("done", flush=True)

    def _forget_pages(self) -> None:
        """Makes the kernel drop its cache of all files; it waits for reads that are under way."""
        for node in list(self._nodes):
            body = struct.pack("<Qqq", node, 0, 0)
            with contextlib.suppress(OSError):
                os.write(self._device, _OUT.pack(_OUT.size + len(body), _INVALIDATE_INODE, 0) + body)

    def _answer(self, request: bytes) -> None:
        _, operation, unique, node, *_ = _IN.unpack_from(request)
        rest = request[_IN.size :]
        if operation == _FORGET:
            self._forget(node, struct.unpack_from("<Q", rest)[0])
            return
        if operation == _BATCH_FORGET:
            for place in range(struct.unpack_from("<I", rest)[0]):
                self._forget(*struct.unpack_from("<QQ", rest, 8 + 16 * place))
            return
        if operation in (_INTERRUPT, _DESTROY):
            return
        body, number = b"", 0
        try:
            body = self._answers[operation](node, rest) if operation in self._answers else b""
            number = 0 if operation in self._answers else errno.ENOSYS
        except OSError as error:
            number = error.errno or errno.EIO
        with contextlib.suppress(OSError):  # who asked was killed
            os.write(self._device, _OUT.pack(_OUT.size + len(body), -number, unique) + body)

    def _init(self, node: int, rest: bytes) -> bytes:
        _, _, readahead, _ = struct.unpack_from("<4I", rest)
        big_writes = 1 << 5
        head = struct.pack("<4I2H2I2H8I", 7, 31, readahead, big_writes, 16, 12, _LARGEST_WRITE, 1, 32, *[0] * 9)
        return head

    @staticmethod
    def _id(descriptor: int) -> tuple[int, int]:
        status = os.fstat(descriptor)
        return status.st_dev, status.st_ino

    def _path(self, node: int) -> str:
        return f"/proc/self/fd/{self._nodes[node]}"

    @staticmethod
    def _done(nothing: None) -> bytes:
        return b""

    def _attributes(self, descriptor: int) -> bytes:
        at = os.fstat(descriptor)
        seconds, rests = zip(
            *(divmod(stamp, 10**9) for stamp in (at.st_atime_ns, at.st_mtime_ns, at.st_ctime_ns)), strict=True
        )
        of_file = (at.st_mode, at.st_nlink, at.st_uid, at.st_gid, at.st_rdev, at.st_blksize, 0)
        return _ATTRIBUTES.pack(at.st_ino, at.st_size, at.st_blocks, *seconds, *rests, *of_file)

    def _entry(self, parent: int, name: bytes) -> bytes:
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._nodes[parent])
        known = self._by_id.get(self._id(found))
        if known is None:
            known = self._next_node
            self._next_node += 1
            self._nodes[known] = found
            self._by_id[self._id(found)] = known
        else:
            os.close(found)
        self._lookups[known] = self._lookups.get(known, 0) + 1
        return _ENTRY.pack(known, 0, _VALID_SECONDS, _VALID_SECONDS, 0, 0) + self._attributes(self._nodes[known])

    def _forget(self, node: int, lookups: int) -> None:
        if node == _ROOT_NODE or node not in self._nodes:
            return
        self._lookups[node] -= lookups
        if self._lookups[node] <= 0:
            descriptor = self._nodes.pop(node)
            del self._by_id[self._id(descriptor)], self._lookups[node]
            os.close(descriptor)

    def _lookup(self, node: int, rest: bytes) -> bytes:
        return self._entry(node, _name(rest))

    def _getattr(self, node: int, rest: bytes) -> bytes:
        return struct.pack("<QII", _VALID_SECONDS, 0, 0) + self._attributes(self._nodes[node])

    def _setattr(self, node: int, rest: bytes) -> bytes:
        valid, _, _, size, _, atime, mtime, _, atime_rest, mtime_rest, _, mode, _, uid, gid, _ = _SETATTR.unpack_from(
            rest
        )
        path = Path(self._path(node))
        now = path.stat()
        if valid & _MODE:
            path.chmod(mode & 0o7777)
        if valid & (_UID | _GID):
            os.chown(path, uid if valid & _UID else -1, gid if valid & _GID else -1)
        if valid & _SIZE:
            os.truncate(path, size)
        if valid & (_ATIME | _MTIME):
            stamps = [now.st_atime_ns, now.st_mtime_ns]
            for place, (bit, at_now, seconds, part) in enumerate(
                ((_ATIME, _ATIME_NOW, atime, atime_rest), (_MTIME, _MTIME_NOW, mtime, mtime_rest))
            ):
                if valid & bit and not valid & at_now:
                    stamps[place] = seconds * 10**9 + part
            if valid & (_ATIME_NOW | _MTIME_NOW):
                os.utime(path)
            else:
                os.utime(path, ns=(stamps[0], stamps[1]))
        return self._getattr(node, b"")

    def _readlink(self, node: int, rest: bytes) -> bytes:
        return os.fsencode(os.readlink("", dir_fd=self._nodes[node]))

    def _symlink(self, node: int, rest: bytes) -> bytes:
        name, target, _ = rest.split(b"\0", 2)
        os.symlink(target, name, dir_fd=self._nodes[node])
        return self._entry(node, name)

    def _mkdir(self, node: int, rest: bytes) -> bytes:
        mode, _ = struct.unpack_from("<II", rest)
        os.mkdir(_name(rest[8:]), mode, dir_fd=self._nodes[node])
        return self._entry(node, _name(rest[8:]))

    def _link(self, node: int, rest: bytes) -> bytes:
        (old,) = struct.unpack_from("<Q", rest)
        os.link(self._path(old), _name(rest[8:]), dst_dir_fd=self._nodes[node], follow_symlinks=True)
        return self._entry(node, _name(rest[8:]))

    def _rename(self, node: int, to: int, flags: int, names: bytes) -> bytes:
        old, new, _ = names.split(b"\0", 2)
        if self._libc.renameat2(self._nodes[node], old, self._nodes[to], new, _RENAME_FLAGS(flags)) != 0:
            raise OSError(ctypes.get_errno(), "rename")
        return b""

    def _open(self, node: int, rest: bytes) -> bytes:
        (flags,) = struct.unpack_from("<I", rest)
        return self._opened(os.open(self._path(node), flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)))

    def _opened(self, descriptor: int) -> bytes:
        self._files[descriptor] = descriptor
        return struct.pack("<QII", descriptor, 0, 0)

    def _create(self, node: int, rest: bytes) -> bytes:
        flags, mode, _, _ = struct.unpack_from("<4I", rest)
        name = _name(rest[16:])
        descriptor = os.open(name, flags | os.O_CREAT, mode, dir_fd=self._nodes[node])
        return self._entry(node, name) + self._opened(descriptor)

    def _read(self, node: int, rest: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", rest)
        if self._failing:
            name, first = self._failing
            if str(Path(self._path(node)).readlink()).endswith(name) and offset + size > first:
                raise OSError(errno.EIO, "by order")
        return os.pread(handle, size, offset)

    def _write(self, node: int, rest: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", rest)
        written = rest[40 : 40 + size]
        # A file that was opened to append has its own idea of the place, which is the kernel's too.
        return struct.pack("<II", os.pwrite(handle, written, offset), 0)

    def _statfs(self, node: int, rest: bytes) -> bytes:
        at = os.statvfs(self._path(node))
        return struct.pack(
            "<5Q10I",
            *(at.f_blocks, at.f_bfree, at.f_bavail, at.f_files, at.f_ffree, at.f_bsize, at.f_namemax, at.f_frsize),
            *[0] * 7,
        )

    def _release(self, node: int, rest: bytes) -> bytes:
        (handle,) = struct.unpack_from("<Q", rest)
        os.close(self._files.pop(handle))
        return b""

    def _fsync(self, node: int, rest: bytes) -> bytes:
        os.fsync(struct.unpack_from("<Q", rest)[0])
        return b""

    def _readdir(self, node: int, rest: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", rest)
        paths, found = sorted(Path(self._path(node)).iterdir()), b""
        for place, path in enumerate(paths[offset:], start=offset + 1):
            encoded = os.fsencode(path.name)
            padding = -len(encoded) % 8
            entry = struct.pack("<QQII", place + 1000, place, len(encoded), 0) + encoded + bytes(padding)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found


def _name(rest: bytes) -> bytes:
    return rest.partition(b"\0")[0]


if __name__ == "__main__":
    os.umask(0)
    _Server(int(sys.argv[1]), sys.argv[2]).run()
