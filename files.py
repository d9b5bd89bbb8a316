"""Files that are written whole or not at all, and what torch.save wrote, read again.

Needs torch; imports nothing of ours, so it can be copied alone.
"""
import contextlib
import ctypes
import mmap
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager: yields a temporary path to write; it replaces `path` if the block ends without an error."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, content: str | bytes | memoryview) -> None:
    """Replace the file whole: a reader, or a crash, meets the old content or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def save_atomic(path: str | os.PathLike, state: dict) -> None:
    """torch.save, replacing the file whole. Raises OSError for a full disk, which torch hides behind a RuntimeError."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def read_file(path: str | os.PathLike, wanted: str, mapped: bool = False) -> object:
    """What torch.save wrote, on the CPU, loaded with weights_only; mapped: tensors stay in the file until used.

    Raises ValueError with what was wanted if there is no such file or torch cannot load it, OSError if the disk fails.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: wanted {wanted}, got no such file") from None
    except OSError:  # the disk fails, not the file: a resumed run must not fall back to an older checkpoint
        raise
    except Exception as error:  # whatever unpickling or the zip reader raise
        raise ValueError(f"{path}: wanted {wanted}, got what torch cannot load ({type(error).__name__})") from None


def release(tensors: Sequence[Tensor]) -> None:
    """Let go of the memory of tensors in mapped files, which is read again where they are used again, and of freed
    memory. Other tensors stay as they are, and so do all where there is no /proc (macOS)."""
    if not os.path.exists("/proc/self/maps"):
        return
    files = []  # first and last address of each that is mapped
    with open("/proc/self/maps") as lines:
        for line in lines:
            addresses, _, _, _, inode = line.split()[:5]
            if inode != "0":
                files.append([int(address, 16) for address in addresses.split("-")])
    for x in tensors:
        first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of it only
        last = (x.data_ptr() + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and any(start <= first and last <= stop for start, stop in files):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
    trim()


def trim() -> None:
    """Let go of freed memory, of which glibc keeps what lies between blocks in use. Linux only."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
