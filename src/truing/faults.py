"""What the system may do to a command, as errors that say how to go on: full disks, places that
cannot be written, too little memory, Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path

from truing import interrupt
from truing.core import files
from truing.errors import Damaged, InputError, Stopped, TruingError, Unread
from truing.tables import WRITTEN

AGAIN = "Mend the file, or fetch or save the model again"
ELSEWHERE = "Name a folder that you may write in, or change its rights"
SPACE = 16 << 20  # bytes that a step needs to write its journal
FULL = (errno.ENOSPC, errno.EDQUOT)
# Of GPUs that PyTorch sees and cannot use.
NO_GPU = ("no kernel image is available", "devices are busy or unavailable")
# What a place that the user named or that holds the user's files may be.
PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,
    errno.ENODEV,
)


def of_system(error: BaseException, where: str = "") -> TruingError | None:
    """An error of the operating system as one that a user can act on; None for all others.

    Args:
        where: what it concerns, where the error itself names no file.
    """
    number = getattr(error, "errno", None)
    if number in FULL or "No space left on device" in str(error):
        return Stopped(
            "the disk is full",
            where=where,
            fix="Free some space; the same command goes on from here",
        )
    if isinstance(error, OSError) and number in PLACE and error.filename:
        return InputError(
            f"cannot be used: {error.strerror}",
            where=where,
            seen=str(error.filename),
            fix="Give another place; files of truing's own lie under TRUING_HOME",
        )
    return None


def check_space(folder: Path) -> None:
    """Raise before a step that could not even write its journal."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < SPACE:
        raise OSError(errno.ENOSPC, f"No space left on device ({free >> 20} MiB free)")


def _refused(error: OSError, said: str, where: str, seen: str) -> TruingError:
    """Why a place of the user's choice cannot be had: the disk, or the place."""
    if error.errno in FULL:
        return Stopped("the disk is full", where=where, fix="Free some space")
    fix = "Give it a shorter name" if error.errno == errno.ENAMETOOLONG else ELSEWHERE
    return InputError(f"{said}: {error.strerror}", where=where, seen=seen or None, fix=fix)


@contextlib.contextmanager
def placing() -> Generator[None]:
    """Turn what says that a place of the user's choice cannot be written into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*PLACE, errno.ENOENT):
            raise
        said, where = "nothing can be written there", str(error.filename or "")
        raise _refused(error, said, where, "") from None


def make_folder(folder: Path, where: str) -> None:
    """Make a folder of the user's choice, those above it too; `where` says who chose it.

    Raises:
        InputError: it cannot be made there.
        Stopped: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(error, "no folder can be made there", where, str(folder)) from None


@contextlib.contextmanager
def told(where: str) -> Generator[None]:
    """Turn what the system may do to a step into errors that say how to go on."""
    try:
        with interrupt.heard():
            yield
    except KeyboardInterrupt:
        raise Stopped(
            "interrupted", where=where, fix="The same command goes on from here"
        ) from None
    except TruingError:
        raise
    except MemoryError as error:
        raise Stopped("this machine has not enough memory", where=where) from error
    except Exception as error:  # libraries have their own kinds: safetensors, Arrow, torch
        known = of_system(error, where)
        if known is not None:
            raise known from error
        if short_of_memory(error):
            raise Stopped(
                "this machine has not enough memory",
                where=where,
                seen=str(error).splitlines()[0],
                fix="Take a smaller model, or lower budget or max_length where the method has them",
            ) from error
        if any(words in str(error) for words in NO_GPU):
            raise InputError(
                "the GPU cannot be used",
                where=where,
                seen=str(error).splitlines()[0],
                fix="Free it where others use it, install a build of PyTorch for it, or set "
                "CUDA_VISIBLE_DEVICES= to compute on the CPU",
            ) from error
        raise


def short_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended, of the machine or of a device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory", "_alloc_failed")
    )


def unreadable(error: BaseException, said: str, where: str, fix: str = AGAIN) -> InputError:
    """Why something cannot be read: Damaged, or Unread where it is the machine that fails.

    A missing right, a disk that fails, too many open files: what they hide may be whole. Formats
    raise an OSError without a number for what they cannot make sense of. `fix` is of the former.
    """
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if number not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            later = "It is left as it is; try again when the machine can read it"
            return Unread(f"{said}: {cause}", where=where, fix=later)
        cause = cause.__cause__ or cause.__context__
    return Damaged(f"{said}: {error}", where=where, fix=fix)


def free_file(to: str, noun: str, where: str) -> Path:
    """The new file for a table or a report's samples, known to be fit before anything is done.

    Nothing is made: folders above it that are missing come with the file.

    Args:
        to: as the user wrote it; its ending says which sort of file.
        noun: what is to be written.
        where: what errors name.
    Raises:
        InputError: it is neither, no such file is written, there is something of that name, or
            it cannot be written.
        Stopped: the disk is full.
    """
    path = files.expanded(to).absolute()
    if noun not in ("Table", "Report"):
        fix = f"Name a folder, without {path.suffix}"
        raise InputError(f"a {noun} is written into a folder", where=where, seen=to, fix=fix)
    if path.suffix not in WRITTEN:
        low, packed = path.suffix.lower(), Path(path.stem).suffix in WRITTEN  # rows.jsonl.gz
        near = path.stem + ("" if packed else low if low in WRITTEN else ".jsonl")
        raise InputError(
            f"a table is written as {', '.join(WRITTEN)}, or into a folder",
            where=where,
            seen=to,
            fix=f"Name it {near}",
        )
    if os.path.lexists(path):
        what = "a folder is in the place of the file" if path.is_dir() else "there is such a file"
        fix = f"Name a new file, or move the {'folder' if path.is_dir() else 'one that is there'}"
        raise InputError(what, where=where, seen=to, fix=fix)
    try:
        # Whether it can be written is known by writing it, with all that is missing above it.
        there = _nearest(path)
        with tempfile.TemporaryDirectory(dir=there, prefix=".truing-") as own:
            twin = own / path.relative_to(there)
            twin.parent.mkdir(parents=True, exist_ok=True)
            twin.touch()
    except OSError as error:
        raise _refused(error, "the file cannot be written", where, to) from None
    return path


def _nearest(path: Path) -> Path:
    """The nearest of the folders above that is there."""
    return next(p for p in path.parents if p.exists())


def free_folder(to: str, marks: Iterable[str], where: str) -> Path:
    """The folder to write a result to, known to be fit before anything is done for it.

    Args:
        to: as the user wrote it.
        marks: files that tell an earlier result, which may be replaced.
        where: what errors name.
    Raises:
        InputError: the folder holds something else than an earlier result, or cannot be written.
        Stopped: the disk is full.
    """
    folder = files.expanded(to).absolute()
    try:
        if folder.exists() and not folder.is_dir():
            fix = "Name a new folder, or move the file"
            raise InputError("a file is in the place of the folder", where=where, seen=to, fix=fix)
        others = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        if others and not any(mark in others for mark in marks):
            raise InputError(
                "the folder holds other files",
                where=where,
                seen=others[:6],
                fix="Give a new or empty folder, or that of an earlier result, which is replaced",
            )
        # Whether a folder can be written is known by writing there: permissions do not tell all.
        there = _nearest(folder)
        for place in {there, folder if folder.is_dir() else there}:
            # As long a name as `files.new_folder` gives what is not whole yet.
            tempfile.TemporaryDirectory(
                dir=place, prefix=f".{folder.name}.", suffix=".0.old"
            ).cleanup()
    except OSError as error:
        raise _refused(
            error, "the folder cannot be written", where, str(error.filename or to)
        ) from None
    return folder
