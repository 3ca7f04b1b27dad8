"""What probes and steps share on the node: Python 3.6 or newer, standard library only.

This file never runs on the controller: ``reconciler.node.bundle`` sends its source over the
connection. Whatever it imports at the top is paid for by every node in every pass.
"""

import errno
import os
import select
import stat
import time

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


class TimedOut(Exception):
    """A program did not end in time, and was ended with all its children."""


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

    On time-out the whole process group is killed: a grandchild that keeps the pipe open hangs nobody. Raises
    TimedOut, or OSError where it cannot be started. (The module subprocess costs every node 6 ms to load, and
    half a millisecond for each program.)
    """
    environ = environment() if env is None else env
    out, out_end = os.pipe()
    err, err_end = os.pipe()
    deadline = time.monotonic() + timeout
    try:
        start = _spawn if cwd is None and hasattr(os, "posix_spawn") else _fork
        pid = start(argv, environ, cwd, (out_end, err_end))
    except BaseException:
        os.close(out)
        os.close(err)
        raise
    finally:
        os.close(out_end)
        os.close(err_end)
    alive = True
    try:
        texts = _read_all((out, err), deadline)
        status = None if texts is None else _wait(pid, deadline)
        if status is None:
            raise TimedOut("%s did not end within %g s" % (" ".join(argv), timeout))
        alive = False
    finally:
        if alive:  # not yet waited for, so the number is still its own
            _kill_group(pid)
            os.waitpid(pid, 0)
        os.close(out)
        os.close(err)
    return Result(status, texts[0].decode("utf-8", "replace"), texts[1].decode("utf-8", "replace"))


def _spawn(argv, env, _cwd, ends):
    """Start a program without copying this process first, which takes a node a millisecond each time."""
    path = argv[0]
    if os.sep not in path:
        entries = env.get("PATH", os.defpath).split(os.pathsep)
        found = [
            os.path.join(entry, path) for entry in entries if os.access(os.path.join(entry, path), os.X_OK)
        ]
        path = found[0] if found else path
    null = os.open(os.devnull, os.O_RDONLY)
    files = [(os.POSIX_SPAWN_DUP2, handle, number) for number, handle in enumerate((null,) + ends)]
    try:
        return os.posix_spawn(path, argv, env, file_actions=files, setsid=True, setsigdef=_broken_pipes())
    except NotImplementedError:  # this system cannot start a session so; a process group will do
        return os.posix_spawn(path, argv, env, file_actions=files, setpgroup=0, setsigdef=_broken_pipes())
    finally:
        os.close(null)


def _fork(argv, env, cwd, ends):
    """The same for other directories, and for Python before 3.8."""
    failed, failed_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            for number, handle in enumerate((os.open(os.devnull, os.O_RDONLY),) + ends):
                os.dup2(handle, number)
            if cwd is not None:
                os.chdir(cwd)
            import _signal

            for number in _broken_pipes():
                _signal.signal(number, _signal.SIG_DFL)
            os.execvpe(argv[0], argv, env)
        except OSError as error:
            os.write(failed_end, b"%d" % error.errno)
        finally:
            os._exit(127)
    os.close(failed_end)
    number = os.read(failed, 16)
    os.close(failed)
    if number:
        os.waitpid(pid, 0)
        raise OSError(int(number), os.strerror(int(number)), argv[0])
    return pid


def _broken_pipes():
    """Signals that Python ignores and that programs expect to end them; they would inherit that."""
    import _signal  # what the module signal wraps, which takes 3 ms to load

    return [getattr(_signal, name) for name in ("SIGPIPE", "SIGXFSZ") if hasattr(_signal, name)]


def _read_all(handles, deadline):
    """What arrives on each handle until its other end is closed; None where that does not happen in time."""
    found = dict.fromkeys(handles, b"")
    waiting = select.poll()
    for handle in handles:
        waiting.register(handle, select.POLLIN | select.POLLHUP)
    left = len(handles)
    while left:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return None
        for handle, _event in waiting.poll(remaining * 1000):
            chunk = os.read(handle, 1 << 16)
            found[handle] += chunk
            if not chunk:
                waiting.unregister(handle)
                left -= 1
    return [found[handle] for handle in handles]


def _wait(pid, deadline):
    """The exit status, negative for a signal; None where the program does not end in time."""
    pause = 0.0005
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def _kill_group(pid):
    """End a program with all that it started in its session."""
    try:
        os.killpg(pid, 9)
    except OSError:
        pass


def must(argv, timeout=30, env=None, cwd=None):
    """``run``, but a failure is an exception that carries what the program said."""
    try:
        result = run(argv, timeout, env, cwd)
    except TimedOut as error:
        raise CommandFailed(str(error)) from None
    except OSError as error:
        raise CommandFailed("%s cannot be started: %s" % (argv[0], error.strerror)) from None
    if result.status != 0:
        raise CommandFailed("%s ended with %s: %s" % (" ".join(argv), result.status, result.complaint()))
    return result


def systemctl(scope):
    """The command to reach systemd's manager of that scope, and the environment it needs."""
    if scope != "user":
        return ["systemctl"], environment()
    return ["systemctl", "--user"], environment(XDG_RUNTIME_DIR="/run/user/%d" % os.getuid())


def show_units(scope, units, properties, absent):
    """What systemd says of these units, one text each, in order. Raises RuntimeError, with ``absent`` where none is."""
    argv, env = systemctl(scope)
    try:
        result = run(argv + ["show"] + units + ["--property=" + ",".join(properties)], env=env, timeout=8)
    except FileNotFoundError:
        raise RuntimeError("no systemctl on this node" + absent) from None
    if result.status != 0:
        hint = "; for user units enable lingering: loginctl enable-linger" if scope == "user" else ""
        raise RuntimeError("systemd does not answer: %s%s" % (result.complaint(), hint))
    return result.out.split("\n\n")


def _new_sha256(size):
    """Python's own SHA-256 for what is small: loading OpenSSL, which is faster on megabytes, takes 3 ms."""
    if size < 1 << 20:
        for module in ("_sha256", "_sha2"):  # until Python 3.11, and since 3.12
            try:
                return __import__(module).sha256()
            except ImportError:
                pass
    import hashlib

    return hashlib.sha256()


def sha256(path):
    """Hex digest of a file's content."""
    digest = _new_sha256(os.path.getsize(path))
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
        try:
            facts["text"] = content.decode("utf-8")
        except UnicodeDecodeError:
            pass
    return facts


def dumps(value):
    """JSON text, in ASCII; the module json costs every node 6 ms to load, most of it for reading."""
    if value is True or value is False or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        from _json import encode_basestring_ascii  # the part of json that is written in C

        return encode_basestring_ascii(value)
    if isinstance(value, (int, float)):
        if not float("-inf") < value < float("inf"):  # nor is it "not a number"
            raise ValueError("%r has no place in JSON" % value)
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[%s]" % ",".join([dumps(item) for item in value])
    if isinstance(value, dict):
        return "{%s}" % ",".join(["%s:%s" % (dumps(_key(key)), dumps(item)) for key, item in value.items()])
    raise TypeError("%s has no place in JSON" % type(value).__name__)


def _key(key):
    if not isinstance(key, str):
        raise TypeError("a key of type %s has no place in JSON" % type(key).__name__)
    return key
