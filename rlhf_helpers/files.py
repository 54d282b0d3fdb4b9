"""What is written appears whole or not at all: a kill, a full disk or a power cut leaves the last whole one. A manifest in a
folder, `manifest.json`, tells byte for byte whether its files are still those that were written."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import reprlib
import shutil
import warnings
from pathlib import Path

from rlhf_helpers.errors import InputError, MissingInput

MANIFEST = "manifest.json"
FORMAT = 1
MACHINES_OWN = {".DS_Store", ".ipynb_checkpoints"}  # nobody's files: they go with the folder


class NotWritten(InputError, OSError):
    """A file or folder that could not be written: a full disk, no permission. What stood there before still does."""


# ---------------------------------------------------------------- write


@contextlib.contextmanager
def whole_folder(folder, sign):
    """Gives a new folder beside `folder` to write into, `.<name>.part`, which takes the place of `folder` when all went well.

    The old folder is `aside(folder)` between two renames, where `find_whole` looks; left-overs of killed saves are removed. A
    folder that holds something and no file `sign` is nobody's former save: InputError, and it is not touched; so is one that
    another process is saving to. Files that the old folder's manifest does not list are somebody else's, and kept
    (`_keep_others`). An OSError becomes NotWritten, one sentence with its reason."""
    place = Path(os.path.realpath(folder))
    beside, old = place.with_name(f".{place.name}.part"), aside(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with alone_at(place, f"{folder}: another save to it is under way; expected one at a time, or another folder"):
            try:
                if old.is_dir() and not place.exists():  # a save was killed between its two renames
                    old.rename(place)
                check_own(folder, sign)
                _remove(beside)
                beside.mkdir()
                yield beside
                flush(beside)
                if place.exists():
                    _keep_others(place)
                    _remove(old)
                    place.rename(old)
                beside.rename(place)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                if old.is_dir() and not place.exists():
                    old.rename(place)
                raise
            _flush_folder(place.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        raise_written(folder, error)
        raise


def check_own(folder, sign):
    """Raises InputError for a file, and for a folder that holds something and no file `sign`."""
    place = Path(os.path.realpath(folder))
    if place.is_file():
        raise InputError(f"{folder}: is a file; expected a folder, or a new name")
    if place.exists() and any(place.iterdir()) and not (place / sign).exists():
        raise InputError(f"{folder}: holds other things and no {sign}; expected a new folder, or one made by an earlier save")


@contextlib.contextmanager
def whole_file(path):
    """Gives a path beside `path`, `.<name>.part`, to write one file to, which takes the place of `path` when all went well."""
    place = Path(os.path.realpath(path))
    beside = place.with_name(f".{place.name}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        _flush_file(beside)
        beside.replace(place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise_written(path, error)
        raise
    _flush_folder(place.parent)


def write_text(path, text):
    """A whole file of UTF-8 text, with the line ends that the text has."""
    with whole_file(path) as beside:
        beside.write_bytes(text.encode("utf-8"))


def raise_written(path, error):
    """Raise NotWritten in place of an error of the disk: an OSError, or what a library makes of one. Else do nothing."""
    if isinstance(error, NotWritten):  # of a file in a folder that is now not written either
        error = error.__cause__
    code = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors reports it
    if isinstance(error, InputError) or not (isinstance(error, OSError) or code):
        return
    why = os.strerror(int(code[1])) if code else reason(error)
    raise NotWritten(f"{path}: could not be written ({why}); the last whole one, if there was one, is kept") from error


def lock(file):
    """Take a lock on an open file that ends with this process; BlockingIOError or PermissionError if another has it. Where the file
    system has none, nobody is kept out."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems
        pass


@contextlib.contextmanager
def alone_at(place, refusal):
    """Inside, nobody else is at this place: a file `.<name>.lock` beside it is locked, and removed afterwards. Raises InputError,
    `refusal`, if somebody is."""
    path = place.with_name(f".{place.name}.lock")
    while True:
        file = open(path, "ab")
        try:
            lock(file)
            with contextlib.suppress(FileNotFoundError):  # whoever was there has removed it since we opened it
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        except (BlockingIOError, PermissionError):
            file.close()
            raise InputError(refusal) from None
        file.close()
    try:
        yield
    finally:
        if os.name == "nt":  # an open file cannot be removed there
            file.close()
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def flush(folder):
    """Have every file below `folder`, and the folders themselves, on the disk before this returns."""
    for below, _, names in os.walk(folder):
        for name in names:
            _flush_file(os.path.join(below, name))
        _flush_folder(below)


def _flush_file(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(path):
    with contextlib.suppress(OSError):  # Windows, and some network drives, cannot
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _keep_others(place):
    """Move what a folder's manifest does not list, hidden files too, to `<name>.others` beside it, with a warning: the folder is
    written anew. One of the same name that is there already stays."""
    try:
        listed = _manifest(place / MANIFEST)
    except InputError:  # without one nobody can tell
        return
    others, moved = place.with_name(f"{place.name}.others"), []
    try:
        for path in _unlisted(place, listed):
            name = path.relative_to(place).as_posix()
            free = (others / f"{name}{f'.{number}' if number else ''}" for number in itertools.count())
            kept = next(here for here in free if not os.path.lexists(here))
            kept.parent.mkdir(parents=True, exist_ok=True)
            path.rename(kept)
            moved.append(path)
    finally:
        if moved:
            more = f" and {len(moved) - 1} more" if moved[1:] else ""
            said = f"{moved[0]}{more}: not of a save, which writes this folder anew; moved to {others}"
            warnings.warn(said, stacklevel=2)


def _unlisted(folder, listed, below=""):
    """Files, and folders as a whole, of which a manifest lists nothing. What a machine puts there by itself does not count."""
    for path in sorted(folder.iterdir()):
        name = below + path.name
        if name in listed or name == MANIFEST or path.name in MACHINES_OWN:
            continue
        if path.is_dir() and any(file.startswith(f"{name}/") for file in listed):
            yield from _unlisted(path, listed, f"{name}/")
        else:
            yield path


def _remove(folder):
    if folder.exists():
        shutil.rmtree(folder)


# ---------------------------------------------------------------- read


def aside(folder):
    """Where a folder stands between a save's two renames: `.<name>.old`, hidden, so that nobody's own `<name>.old` is in the way."""
    return Path(folder).parent / f".{Path(folder).name}.old"


def find_whole(folder):
    """`folder`, or `aside(folder)` if a save was killed between its two renames: the last whole one."""
    folder, old = Path(folder), aside(os.path.realpath(folder))  # beside what a link points to
    return old if old.is_dir() and not folder.exists() else folder


def reason(error):
    """An exception in one line."""
    why = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return " ".join(why.splitlines()[0].split())


def is_no_place(error):
    """Whether an OSError says that a path which was given cannot be used: no right to look there, or a name that no file can have."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP) and error.filename is not None


def is_full(error):
    """Whether an OSError says that there is no room any more."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shown(value):
    """A value in an error message: its beginning, on one line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return re.sub(r"\s*\n\s*", " ", short.repr(value))


def is_whole_unicode(text):
    """Whether a str has no half of a surrogate pair, which JSON and a command line can hold and no tokenizer takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def checked_path(what, folder):
    """A folder that was given, as a Path. Raises InputError for what names none."""
    if not isinstance(folder, (str, os.PathLike)) or "\0" in str(folder) or not str(folder).strip():
        raise InputError(f"{what} is {shown(folder)}; expected the path of a folder")
    return Path(folder)


def read_bytes(path, expected):
    """The content of a file. Raises MissingInput where there is none, InputError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file; expected {expected}") from None
    except (OSError, ValueError) as error:  # ValueError: of a name that no file can have
        raise InputError(f"{path}: cannot be read ({reason(error)}); expected {expected}") from None


def parse_json(text, where, expected):
    """What a JSON text says. Raises InputError for all else, too many brackets and too many digits included."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        why = f"not JSON ({error.msg}, column {error.colno})"
    except RecursionError:
        why = "brackets nested too deeply"
    except ValueError:
        why = "a number of too many digits"
    raise InputError(f"{where}: {why}; expected {expected}")


def read_json(path, expected="JSON"):
    """What a JSON file says. Raises InputError."""
    try:
        text = read_bytes(path, expected).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start + 1}); expected {expected}") from None
    return parse_json(text, path, expected)


# ---------------------------------------------------------------- manifest


def write_manifest(folder):
    """Write manifest.json: the size and sha256 of every file below `folder`. To be called when all others are written."""
    files = {name: dict(size=path.stat().st_size, sha256=_sha256(path)) for name, path in _files(folder).items()}
    write_text(Path(folder) / MANIFEST, json.dumps(dict(format=FORMAT, files=files), indent=1) + "\n")


def check_manifest(folder):
    """Raise InputError, naming folder and file, unless `folder` holds just the files of its manifest, byte for byte. Names that
    begin with a dot, such as .DS_Store or .git, do not count."""
    folder = Path(folder)
    listed, found = _manifest(folder / MANIFEST), _files(folder)
    for name in sorted(listed.keys() - found.keys()):
        raise MissingInput(f"{folder / name}: missing; expected the file that {MANIFEST} lists")
    for name in sorted(found.keys() - listed.keys()):
        raise InputError(f"{folder / name}: a foreign file; expected only those that {MANIFEST} lists")
    for name, about in listed.items():
        try:
            size, sha256 = found[name].stat().st_size, _sha256(found[name])
        except OSError as error:
            raise InputError(
                f"{folder / name}: cannot be read ({reason(error)}); expected the file that {MANIFEST} lists"
            ) from None
        if size != about["size"]:
            raise InputError(f"{folder / name}: {size} bytes; expected the {about['size']} that were written")
        if sha256 != about["sha256"]:
            raise InputError(
                f"{folder / name}: not what was written (sha256 {sha256[:12]}...); expected {about['sha256'][:12]}..."
            )


def _manifest(path):
    """{name: {"size", "sha256"}} of a manifest, all types checked."""
    expected = f'an object with "format": {FORMAT} and "files", a size and a sha256 for each'
    manifest = read_json(path, expected)
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int or not isinstance(manifest.get("files"), dict):
        raise InputError(f"{path}: not a manifest; expected {expected}")
    if manifest["format"] != FORMAT:
        raise InputError(f"{path}: format {manifest['format']}; expected {FORMAT}")
    for number, about in enumerate(manifest["files"].values(), start=1):
        if not (isinstance(about, dict) and type(about.get("size")) is int and isinstance(about.get("sha256"), str)):
            raise InputError(f"{path}: entry {number} has no size and sha256; expected {expected}")
    return manifest["files"]


def _files(folder):
    """{name: path} of all files below `folder`, the manifest and hidden ones left out."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    hidden = lambda name: name.startswith(".") or "/." in name
    return {name: path for name, path in paths.items() if name != MANIFEST and not hidden(name)}


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
