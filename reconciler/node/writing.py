"""What steps share on the node: writing, saving, putting back, and the journal that survives any crash.

Python 3.6 or newer, standard library only. Only steps bring it along; a look at a node never carries it.
"""

import contextlib
import json
import os
import stat
import time

lib = None  # set by the driver


def text_difference(path, declared_sha256, body):
    """Before and after of a managed file in the words of Ansible's --diff; nothing where it is no short text."""
    import base64

    facts = lib.describe(path, declared_sha256)
    known = "text" in facts or facts["type"] == "absent"
    if declared_sha256 in (None, facts.get("content")) or not known or len(body) > lib.MAX_TEXT * 4 // 3:
        return []
    try:
        after = base64.b64decode(body).decode("utf-8")
    except UnicodeDecodeError:
        return []
    return [{"before_header": path, "after_header": path, "before": facts.get("text", ""), "after": after}]


def sync_directory(path):
    """Make a rename in this directory survive a power cut; not every file system can, and that is no error."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def missing_parents(path):
    """Parent directories that do not exist yet, outermost first: on record, an undo can remove them."""
    missing = []
    parent = os.path.dirname(path)
    while parent and not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    return list(reversed(missing))


def make_parents(path):
    """Create missing parent directories."""
    for directory in missing_parents(path):
        os.mkdir(directory, 0o755)


def remove_leftovers(path):
    """Remove what was written beside ``path`` by processes that died before they put it into its place."""
    import re

    directory, base = os.path.split(path)
    mine = re.compile(r"\.?%s\.(\d+)\.new" % re.escape(base))
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            found = mine.match(name)
            if found and found.end() == len(name) and not _is_running(int(found.group(1))):
                os.unlink(os.path.join(directory, name))


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_beside(path, content, mode, uid=-1, gid=-1):
    """Write ``content`` (bytes) to a new file beside ``path``, synced, with its final mode and owner; returns its name.

    Whoever calls renames it over ``path``: nobody ever sees half a file, and a full disk leaves the old one.
    """
    directory, base = os.path.split(path)
    temporary = os.path.join(directory, ".%s.%d.new" % (base, os.getpid()))
    remove_leftovers(path)
    with contextlib.suppress(OSError):
        os.unlink(temporary)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            if (uid, gid) != (-1, -1):
                os.fchown(stream.fileno(), uid, gid)
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
    except BaseException:
        os.unlink(temporary)
        raise
    return temporary


def replace(temporary, path):
    """Put a file written beside into its place. A link there is replaced itself, never what it points to."""
    os.rename(temporary, path)
    sync_directory(os.path.dirname(path))


def write_atomically(path, content, mode=0o644, uid=-1, gid=-1):
    """Replace the content of ``path`` (bytes) in one step."""
    replace(write_beside(path, content, mode, uid, gid), path)


def link_atomically(target, path):
    """Make ``path`` a symbolic link to ``target`` in one step, replacing a file or link that stands there."""
    temporary = "%s.%d.new" % (path, os.getpid())
    remove_leftovers(path)
    with contextlib.suppress(OSError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    replace(temporary, path)


def save(path, attempt):
    """Copy what stands at ``path`` beside it before it is overwritten; returns a record for ``put_back``.

    A file becomes ``NAME.ATTEMPT.bak`` with its mode, owner and times; a link is remembered by its target.
    """
    facts = lib.describe(path, want_text=False)
    record = {"path": path, "type": facts["type"]}
    if facts["type"] == "symlink":
        record["target"] = facts["target"]
    elif facts["type"] == "file":
        record["backup"] = "%s.%s.bak" % (path, attempt)
        record["content"] = facts["content"]
        if not os.path.exists(record["backup"]):
            copy_file(path, record["backup"])
    elif facts["type"] != "absent":
        raise lib.Refused("%s is a %s; only files and links are ever replaced" % (path, facts["type"]))
    return record


def copy_file(source, target):
    """A synced copy with mode, owner and times; it appears under its name only when it is whole."""
    import shutil

    info = os.lstat(source)
    temporary = target + ".part"
    try:
        shutil.copyfile(source, temporary)
        with contextlib.suppress(PermissionError):
            os.chown(temporary, info.st_uid, info.st_gid)
        os.chmod(temporary, stat.S_IMODE(info.st_mode))
        os.utime(temporary, ns=(info.st_atime_ns, info.st_mtime_ns))
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def put_back(record, created=()):
    """Undo an overwrite from the record that ``save`` made; then remove directories that were created for it."""
    path = record["path"]
    remove_leftovers(path)
    if record["type"] == "absent":
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    elif record["type"] == "symlink":
        link_atomically(record["target"], path)
    else:
        if lib.sha256(record["backup"]) != record["content"]:
            raise lib.Refused(
                "the backup %s was changed since it was made; %s is left as it is" % (record["backup"], path)
            )
        if not _are_alike(record["backup"], path):  # where nothing was changed, a full disk is no obstacle
            copy_file(record["backup"], path)
    for directory in reversed(list(created)):
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def _are_alike(backup, path):
    """Whether what stands at ``path`` is the copy's original: a file of the same content, permissions and owner."""
    return lib.describe(path, want_text=False) == lib.describe(backup, want_text=False)


def is_protected(path, protected):
    """Whether writing ``path`` would touch a protected place, by its spelling or through links above it."""
    import fnmatch

    spelled = lib.expand(path)
    real = os.path.join(os.path.realpath(os.path.dirname(spelled)), os.path.basename(spelled))
    target = os.path.realpath(spelled)
    for pattern in protected:
        wanted = lib.expand(pattern) if os.sep in pattern else pattern
        for candidate in (spelled, real, target):
            subject = candidate if os.sep in pattern else os.path.basename(candidate)
            if fnmatch.fnmatch(subject, wanted) or candidate.startswith(wanted.rstrip("/") + "/"):
                return pattern
        if os.sep in pattern and _is_other_name(target, wanted):
            return pattern
    return None


def _is_other_name(path, pattern):
    """Whether ``path`` is a hard link to a protected file: what is written in place would change that."""
    import glob

    try:
        info = os.stat(path)
    except OSError:
        return False
    if info.st_nlink == 1 or stat.S_ISDIR(info.st_mode):
        return False
    names = glob.glob(pattern) + glob.glob(pattern.rstrip("/") + "/**", recursive=True)
    for name in names:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(name), info):
                return True
    return False


def refuse_protected(path, protected):
    """Raise Refused where ``path`` is protected."""
    pattern = is_protected(path, protected)
    if pattern:
        raise lib.Refused("%s is protected (by the entry %s of the desired state)" % (path, pattern))


# --- the journal: what an attempt saved and how far it came, readable after any crash ---------------


def state_directory():
    """Where this account's journal and installed tools are kept on the node."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return os.path.join(lib.expand(base), "reconciler")


def journal_path(kind, name, attempt):
    """One small file per resource and attempt."""
    safe = "".join(c if c.isalnum() or c in "-_." else "%%%02x" % ord(c) for c in "%s.%s" % (kind, name))
    return os.path.join(state_directory(), "journal", attempt, safe[:200] + ".json")


def read_journal(kind, name, attempt):
    """The record of an attempt, or None."""
    try:
        with open(journal_path(kind, name, attempt), encoding="utf-8") as stream:
            return json.load(stream)
    except (FileNotFoundError, ValueError):
        return None


def write_journal(kind, name, attempt, state, saved):
    """Record how far an attempt came and what it saved; on disk before this returns."""
    path = journal_path(kind, name, attempt)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    record = {
        "kind": kind,
        "name": name,
        "attempt": attempt,
        "state": state,
        "saved": saved,
        "at": time.time(),
    }
    write_atomically(path, json.dumps(record).encode(), 0o600)


def prune_journal(keep_days, keep=()):
    """Remove journals, and the backups they name, that are older than ``keep_days`` days.

    An attempt that began to change something and never came to an end is kept, and so are those in ``keep``, which
    the controller has not verified: what they saved may be needed.
    """
    root = os.path.join(state_directory(), "journal")
    limit = time.time() - keep_days * 86400
    for attempt in os.listdir(root) if os.path.isdir(root) else ():
        directory = os.path.join(root, attempt)
        if attempt in keep or os.stat(directory).st_mtime > limit:
            continue
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            try:
                with open(path, encoding="utf-8") as stream:
                    record = json.load(stream)
            except ValueError:  # half of one, from a crash while it was written beside
                os.unlink(path)
                continue
            if record["state"] in ("backed up", "applied", "confirmed", "rolled back"):
                for backup in backups_in(record["saved"]):
                    with contextlib.suppress(OSError):
                        os.unlink(backup)
                os.unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def backups_in(saved):
    """Every backup file named anywhere inside a saved record."""
    if isinstance(saved, dict):
        own = [saved["backup"]] if "backup" in saved else []
        return own + [path for value in saved.values() for path in backups_in(value)]
    if isinstance(saved, list):
        return [path for value in saved for path in backups_in(value)]
    return []


def refuse_stale(epoch, must_remember=True):
    """Raise Refused where a controller with a higher epoch was here; remember this one. By hand there is none.

    An undo does not fail because this cannot be written: a full disk is what it may have to undo.
    """
    if epoch is None:
        return
    seen = highest_epoch()
    if seen > epoch:
        raise lib.Refused(
            "a newer controller (epoch %d) is in charge of this node; this one (epoch %d) may not change it"
            " (if there is none: remove %s)" % (seen, epoch, epoch_path())
        )
    try:
        remember_epoch(epoch)
    except OSError:
        if must_remember:
            raise


def epoch_path():
    """Where the highest epoch that was seen here is kept."""
    return os.path.join(state_directory(), "epoch")


def highest_epoch():
    """The highest epoch that was seen here; 0 where none was."""
    try:
        with open(epoch_path(), encoding="ascii") as stream:
            return int(stream.read())
    except (FileNotFoundError, ValueError):
        return 0


def remember_epoch(epoch):
    """From now on, whoever has a lower epoch changes nothing here."""
    if highest_epoch() < epoch:
        os.makedirs(state_directory(), mode=0o700, exist_ok=True)
        write_atomically(epoch_path(), b"%d" % epoch, 0o600)


def confirm(kind, name, attempt):
    """The controller got in over a new login: an applied change stays. Raises Refused where it was undone already."""
    record = read_journal(kind, name, attempt)
    if record is not None and record["state"] == "rolled back":
        raise lib.Refused("it was not confirmed in time, and this node has undone it")
    # "applying": the step died after its change was made, and somebody has looked at that since.
    if record is not None and record["state"] in ("applying", "applied"):
        write_journal(kind, name, attempt, "confirmed", record["saved"])


def was_superseded(kind, name, attempt):
    """Whether a later attempt at the same resource was confirmed: what this one saved is older than what is right."""
    own = read_journal(kind, name, attempt)
    root = os.path.join(state_directory(), "journal")
    for other in os.listdir(root) if own else ():
        found = read_journal(kind, name, other)
        if found and other != attempt and found["state"] == "confirmed" and found["at"] > own["at"]:
            return True
    return False


def watch(journal, seconds, undo):
    """Leave a process behind that calls ``undo`` unless the attempt was confirmed or undone in time.

    It has nothing to do with the connection any more: no session, no open file, and not the node's lock, which
    it takes itself before it undoes anything.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    os.closerange(0, 1024)
    os.open(os.devnull, os.O_RDWR)
    os.dup2(0, 1)
    os.dup2(0, 2)
    status = 0
    try:
        if _is_unsettled_after(journal, seconds):
            with node_lock(600):
                if _is_unsettled_after(journal, 0):
                    undo()
    except BaseException:
        status = 1
    os._exit(status)


def _is_unsettled_after(journal, seconds):
    """Whether the attempt was neither confirmed nor undone within ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        record = read_journal(*journal)
        if record is None or record["state"] in ("confirmed", "rolled back"):
            return False
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.3)


@contextlib.contextmanager
def node_lock(timeout):
    """Hold this account's lock on the node: two controllers never change the same node at once."""
    import fcntl

    os.makedirs(state_directory(), mode=0o700, exist_ok=True)
    handle = os.open(os.path.join(state_directory(), "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise lib.Refused("another controller is changing this node right now") from None
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)
