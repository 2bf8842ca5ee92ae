"""How placer writes files: claim the target, write next to it, rename.

A command claims its target first (:func:`claimed`): no other process may write it, nothing
that exists is replaced without ``--force``, and nothing is written over an input. Files and
directories are then written under random names next to the target, flushed to the disk and
renamed last, so a command that fails or is ended leaves nothing that looks complete.
"""

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from placer.arrays import AnyArray
from placer.errors import PlacerError, UsageError
from placer.run.documents import parse_json
from placer.run.files import canonical_json, read_bytes

# What marks a directory that placer wrote, and all that such a directory may hold.
_WRITTEN = (
    ("trace.json", ("trace.json", "chunk-*.safetensors")),
    ("frontier.csv", ("frontier.csv", "plan-*.json")),
    ("rank-00000", ("rank-*",)),
    ("placer.json", ("*",)),
    (
        "text",
        (
            *("text", "profile", "heldout", "checkpoint", "plan-*.json"),
            *("sglang.json", "report.html"),
        ),
    ),
)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A target that only this process may write.

    Attributes
    ----------
    force
        Replace what is there.
    stream
        The locked file next to the target: empty, or the journal of a directory whose
        writing can continue (:mod:`placer.run.resumable`).
    """

    force: bool
    stream: IO[str]


_claims: dict[Path, Claim] = {}


@contextmanager
def claimed(
    out: Path, inputs: Iterable[Path] = (), *, directory: bool, force: bool = False
) -> Iterator[Claim]:
    """Keep other processes from writing ``out`` inside the block.

    A target that is claimed already, by the command that is running, stays as it is.

    Parameters
    ----------
    out
        What will be written.
    inputs
        Files and directories that are read.
    directory
        Whether a directory is written, or a file.
    force
        Whether an existing target may be replaced.

    Raises
    ------
    UsageError
        If ``out`` is an input, or one of the two is inside the other.
    PlacerError
        If ``out`` exists and may not be replaced, or another process is writing it.
    """
    if (found := _claims.get(_place(out))) is not None:
        yield found
        return
    require_target(out, inputs, directory=directory, force=force)
    place = _place(out)
    with _noting_what_is_written(place), _parents_of(place), _locked(place, out) as stream:
        # Another process may have written it since.
        require_target(out, directory=directory, force=force)
        claim = _claims[place] = Claim(force=force, stream=stream)
        try:
            yield claim
        finally:
            del _claims[place]


def require_target(
    out: Path, inputs: Iterable[Path] = (), *, directory: bool, force: bool = False
) -> None:
    """Refuse a target as :func:`claimed` does, but claim nothing."""
    if out.name in ("", ".."):
        raise UsageError(
            f"{out} is not the name of a file or directory", ("choose another path")
        )
    for source in inputs:
        if (relation := _relation(out, source)) is not None:
            raise UsageError(f"{out} {relation} the input {source}", "choose another path")
    # What the journal is of was complete, but the run was killed before it said so.
    if not os.path.lexists(out) or journal_head(out).get("inode") == os.lstat(out).st_ino:
        return
    kind, wanted = _kind(out), "a directory" if directory else "a file"
    # A link is replaced, not what it leads to.
    if kind != wanted and (directory or kind != "a link"):
        raise PlacerError(
            f"{out} is {kind}, but the command writes {wanted} there", "choose another path"
        )
    if directory:
        _require_written_by_placer(out)
    if not force:
        raise PlacerError(
            f"{out} already exists", "choose another path, or replace it: --force"
        )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a file to write to; it becomes ``path`` on success, else it is removed."""
    place = _place(path)
    require_target(path, directory=False, force=True)
    with _parents_of(place):
        temporary = _temporary(place)
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
            yield temporary
            # Temporary files may be read only by their owner.
            temporary.chmod(0o666 & ~_umask())
            flush_to_disk(temporary)
            temporary.replace(place)
            flush_to_disk(place.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; it becomes ``path`` on success, else it is removed.

    Raises
    ------
    PlacerError
        If ``path`` exists, unless it was claimed with ``force`` and placer wrote it.
    """
    with claimed(path, directory=True) as claim:
        place = _place(path)
        temporary = _temporary(place)
        try:
            temporary.mkdir(0o700)
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            rename_directory(temporary, place, claim)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def rename_directory(written: Path, out: Path, claim: Claim) -> None:
    """Flush a directory and give it its name; an older one of placer is replaced."""
    for path in (*written.rglob("*"), written):
        if path.is_dir() or path.is_file():
            flush_to_disk(path)
    require_target(out, directory=True, force=claim.force)
    old = _temporary(out) if os.path.lexists(out) else None
    try:
        if old is not None:
            out.rename(old)
        written.rename(out)
        flush_to_disk(out.parent)
    except BaseException:
        if old is not None and not os.path.lexists(out):
            old.rename(out)
        raise
    finally:
        if old is not None and os.path.lexists(out):
            _remove_wholly(old)


def write_tensors(
    path: Path, tensors: Mapping[str, "AnyArray"], header: object = None
) -> None:
    """Write a safetensors file; the same tensors and header give the same bytes.

    Parameters
    ----------
    path
        Where to write.
    tensors
        Contiguous arrays by name.
    header
        Written as canonical JSON under the one metadata key ``placer``: with two keys or
        more, safetensors orders them at random.

    Raises
    ------
    PlacerError
        If the file cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    metadata = None if header is None else {"placer": canonical_json(header)}
    with atomic_file(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except SafetensorError as error:
            raise PlacerError(
                f"{path} cannot be written: {error}",
                (f"is there free space? df -h {path.parent}"),
            ) from error


def require_free_space(path: Path, num_bytes: int) -> None:
    """Refuse to start writing ``num_bytes`` at ``path`` where they cannot fit.

    Raises
    ------
    PlacerError
        With the bytes that are needed and that are free.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise PlacerError(
            f"{path} needs {num_bytes} bytes, but {place} has {free} bytes free",
            f"free some space or choose another path: df -h {place}",
        )


def flush_to_disk(path: Path) -> None:
    """Wait until a file or the entries of a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_path(out: Path) -> Path:
    """Return the file next to a target that its writer locks."""
    return out.with_name(f".{out.name}.placer")


def journal_head(out: Path) -> dict[str, Any]:
    """Return the first line of the journal next to ``out``, empty if there is none."""
    try:
        head = parse_json(read_bytes(lock_path(out)).partition(b"\n")[0], "journal")
    except (OSError, PlacerError):
        return {}
    return head if isinstance(head, dict) else {}


def _place(out: Path) -> Path:
    """Return where ``out`` is; what it is itself is not followed where it is a link."""
    return out.parent.resolve() / out.name


def _temporary(place: Path) -> Path:
    """Return a name beside ``place`` that nobody can guess.

    It is known before anything has it: a signal cannot come between the two.
    """
    return place.with_name(f".{place.name[:40]}.{secrets.token_hex(8)}")


def _relation(out: Path, source: Path) -> str | None:
    """Say how a target and an input meet, through links too; ``None`` if they do not."""
    real, own = out.resolve(), source.resolve()
    if _same(real, own):
        return "is"
    if any(_same(parent, own) for parent in real.parents):
        return "is inside"
    if any(_same(parent, real) for parent in own.parents):
        return "holds"
    if real.is_file() and own.is_dir() and any(_same(real, one) for one in own.rglob("*")):
        return "is a file in"
    return None


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _kind(out: Path) -> str:
    mode = os.lstat(out).st_mode
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFREG: "a file", stat.S_IFLNK: "a link"}
    return kinds.get(stat.S_IFMT(mode), "a pipe, socket or device")


def _require_written_by_placer(out: Path) -> None:
    names = sorted(os.listdir(out))
    if not names:
        return
    known = next((known for telling, known in _WRITTEN if telling in names), ())
    odd = [name for name in names if not any(fnmatch(name, one) for one in known)]
    if odd:
        raise PlacerError(
            f"{out} already exists and holds {odd[0]}, which placer did not write",
            "choose another path, or move the directory away",
        )


@contextmanager
def _parents_of(place: Path) -> Iterator[None]:
    """Make the parents of a target; of those, none that stays empty is left."""
    made = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def _noting_what_is_written(place: Path) -> Iterator[None]:
    """Note on a failure that the target was written before it."""
    before = _inode(place)
    try:
        yield
    except BaseException as error:
        if _inode(place) not in (None, before):
            error.add_note(f"{place} was written before this")
        raise


def _inode(place: Path) -> int | None:
    try:
        return os.lstat(place).st_ino
    except OSError:
        return None


def _remove_wholly(folder: Path) -> None:
    """Remove a directory, though a signal comes."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _locked(place: Path, out: Path) -> Iterator[IO[str]]:
    path = lock_path(place)
    with _opened_lock(path, out) as stream:
        try:
            yield stream
        finally:
            # A journal stays for the run that continues.
            if not os.fstat(stream.fileno()).st_size:
                path.unlink(missing_ok=True)


def _opened_lock(path: Path, out: Path) -> IO[str]:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise PlacerError(
                f"{out} cannot be written: {error.strerror} ({path})",
                "choose another path",
            ) from error
        stream = os.fdopen(descriptor, "a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                stream.close()
                raise PlacerError(
                    f"another process is writing {out}",
                    "wait for it, or choose another path",
                ) from error
        # The process that held the lock removes the file before it lets go.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), path.lstat()):
                return stream
        stream.close()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
