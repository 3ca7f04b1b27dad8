"""What probes and steps share on the node: Python 3.6 or newer, standard library only.

This file never runs on the controller: ``reconciler.node.bundle`` sends its source over the
connection. Whatever it imports at the top is paid for by every node in every pass.
"""

import contextlib
import errno
import hashlib
import os
import stat
import subprocess

MAX_TEXT = 64 * 1024  # bytes of a text file that travel back for a diff
EXTRA_PATH = ("~/.local/bin", "~/bin")
LATE_PATH = (
    "/usr/local/bin",
    "/usr/bin",
    "/bin",
    "/usr/local/sbin",
    "/usr/sbin",
    "/sbin",
    "/opt/homebrew/bin",
)


class Refused(Exception):
    """The step must not be taken here; the message is for a person. Nothing was changed."""


class CommandFailed(Exception):
    """A program that a step needs ended badly."""


def expand(path):
    """An absolute path: ``~`` is the home of the account that the connection reached."""
    return os.path.normpath(os.path.expanduser(path))


def search_path(declared=()):
    """Directories in which commands are looked for: declared ones, the account's own, the session's, the usual."""
    found = []
    session = os.environ.get("PATH", "").split(os.pathsep)
    for entry in list(declared) + list(EXTRA_PATH) + session + list(LATE_PATH):
        directory = os.path.expanduser(entry)
        if directory and directory not in found:
            found.append(directory)
    return found


def which(command, declared=()):
    """The first executable file of that name, or None. Unlike ``command -v`` it needs no login shell."""
    if os.sep in command:
        candidates = [os.path.expanduser(command)]
    else:
        candidates = [os.path.join(entry, command) for entry in search_path(declared)]
    for candidate in candidates:
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    return None


def environment(declared=(), **extra):
    """The environment for programs: the session's, with the search path above and plain-English output."""
    env = dict(os.environ, LC_ALL="C.UTF-8", PATH=os.pathsep.join(search_path(declared)))
    env.update(extra)
    return env


def differences(probe, resource):
    """What is not as declared, by the comparison that the controller makes too."""
    declared = {key: resource[key] for key in probe.COMPARED if resource.get(key) is not None}
    return probe.changes(declared, probe.observe(resource, {}))


def pending(probe, resource):
    """The differences that a step may remove."""
    return [change for change in differences(probe, resource) if change.get("fixable", True)]


class Result:
    """How a program ended: exit status, and what it printed (decoded, undecodable bytes replaced)."""

    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    def complaint(self):
        """The last lines of what it said, for an error message."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return " | ".join(line.strip() for line in lines[-4:])[-600:]


def run(argv, timeout=30, env=None, cwd=None):
    """Run a program without a shell, without standard input, in a session of its own, within ``timeout`` seconds.

    On time-out the whole process group is killed: a grandchild that keeps the pipe open hangs nobody.
    """
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=env or environment(), cwd=cwd, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, 9)
        process.stdout.close()
        process.stderr.close()
        process.wait()
        raise
    return Result(process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


def must(argv, timeout=30, env=None, cwd=None):
    """``run``, but a failure is an exception that carries what the program said."""
    try:
        result = run(argv, timeout, env, cwd)
    except subprocess.TimeoutExpired:
        raise CommandFailed("%s did not end within %s s" % (" ".join(argv), timeout)) from None
    except OSError as error:
        raise CommandFailed("%s cannot be started: %s" % (argv[0], error.strerror)) from None
    if result.status != 0:
        raise CommandFailed("%s ended with %s: %s" % (" ".join(argv), result.status, result.complaint()))
    return result


def sha256(path):
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def user_name(uid):
    """The account's name, or the number as text where it has none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid):
    """The group's name, or the number as text where it has none."""
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def describe(path, expected_sha256=None, want_text=True):
    """Type, mode, owner, group and digest of what stands at ``path``, never following a link there.

    The text itself comes along only where it differs from ``expected_sha256`` and is short.
    """
    try:
        info = os.lstat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return {"type": "absent"}
        raise
    if stat.S_ISLNK(info.st_mode):
        return {"type": "symlink", "target": os.readlink(path)}
    if not stat.S_ISREG(info.st_mode):
        return {"type": "directory" if stat.S_ISDIR(info.st_mode) else "special file"}
    facts = {
        "type": "file", "mode": "%04o" % stat.S_IMODE(info.st_mode),
        "owner": user_name(info.st_uid), "group": group_name(info.st_gid), "content": sha256(path),
    }  # fmt: skip
    if want_text and expected_sha256 not in (None, facts["content"]) and info.st_size <= MAX_TEXT:
        with open(path, "rb") as stream:
            content = stream.read()
        with contextlib.suppress(UnicodeDecodeError):
            facts["text"] = content.decode("utf-8")
    return facts
