"""Install a command-line tool and take it back; node side, Python 3.6 or newer.

Every method but apt installs into a directory of this attempt and then links the command into the bin
directory in one step: undoing is linking back, and no half-installed tool is ever on PATH.
"""

import base64
import contextlib
import os
import shutil
import tarfile
import zipfile

lib = writing = None  # set by the driver
probe = None  # this kind's probe, set by the driver

INSTALL_SECONDS = 900
DOWNLOAD_SECONDS = 60


def bin_directory(resource):
    """Where the command is linked: on the account's PATH by the usual profile, or on everybody's for root."""
    return lib.expand(resource.get("bin_dir") or ("/usr/local/bin" if os.geteuid() == 0 else "~/.local/bin"))


def payload_directory(resource, attempt):
    """Where this attempt installs."""
    for_everybody = os.geteuid() == 0 and not resource.get("bin_dir")
    base = "/opt/reconciler/tools" if for_everybody else lib.expand("~/.local/share/reconciler/tools")
    return os.path.join(base, resource["name"], attempt)


def link_path(resource):
    """The name under which the command appears."""
    return os.path.join(bin_directory(resource), resource["command"])


def paths(resource):
    """What a step may write."""
    return [link_path(resource)]


def backup(resource, attempt):
    """Save the command that is replaced, and for apt the package's present state."""
    saved = {"link": writing.save(link_path(resource), attempt), "created": [], "payload": None}
    if not resource.get("install"):  # somebody's commands stand in for a method
        return saved
    if resource["install"]["method"] == "apt":
        if os.geteuid() != 0:
            raise lib.Refused("apt needs privilege: set allow_become for this resource")
        saved["packages"] = _packages()
        saved["package"] = _package_name(resource["install"]["source"])
    else:
        saved["payload"] = payload_directory(resource, attempt)
        parents = writing.missing_parents(link_path(resource)) + writing.missing_parents(saved["payload"])
        saved["created"] = list(dict.fromkeys(parents))
    return saved


def apply(resource, saved):
    """Install by the declared method; the command appears only when everything before has worked."""
    method = resource["install"]["method"]
    if method == "apt":
        return _apt_install(resource["install"]["source"])
    writing.make_parents(link_path(resource))
    writing.make_parents(saved["payload"])
    if not os.path.isdir(saved["payload"]):
        os.mkdir(saved["payload"], 0o755)
    try:
        executable = {"pip": _pip, "pipx": _pip, "npm": _npm, "url": _url, "file": _file}[method](
            resource, saved
        )
    except BaseException:
        shutil.rmtree(saved["payload"], ignore_errors=True)
        raise
    writing.link_atomically(executable, link_path(resource))
    _drop_old_payloads(saved["payload"])
    return "installed %s by %s" % (executable, method)


def _drop_old_payloads(payload):
    """Keep this installation and the one before it, which an undo may need."""
    directory = os.path.dirname(payload)
    entries = sorted(
        (os.stat(os.path.join(directory, name)).st_mtime, name) for name in os.listdir(directory)
    )
    for _mtime, name in entries[:-2]:
        shutil.rmtree(os.path.join(directory, name), ignore_errors=True)


def rollback(_resource, saved):
    """Link back what was replaced and remove what this attempt installed."""
    if "packages" in saved:
        return _apt_restore(saved)
    writing.put_back(saved["link"])
    if saved["payload"]:
        shutil.rmtree(saved["payload"], ignore_errors=True)
    for directory in reversed(saved.get("created", ())):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    return "restored %s" % saved["link"]["path"]


def _pip(resource, saved):
    """A virtual environment of its own, made by the node's Python."""
    python = lib.which("python3")
    if python is None:
        raise lib.CommandFailed("no python3 on the node's PATH")
    try:
        lib.must([python, "-m", "venv", saved["payload"]], timeout=120)
    except lib.CommandFailed as error:
        if "ensurepip" in str(error) or "No module named venv" in str(error):
            raise lib.CommandFailed(
                "the node's Python has no venv module: install the package python3-venv"
            ) from None
        raise
    installer = [
        os.path.join(saved["payload"], "bin", "python"),
        "-m",
        "pip",
        "install",
        "--no-input",
        "--quiet",
    ]
    installer.append("--disable-pip-version-check")
    lib.must(installer + [_local(resource["install"]["source"])], timeout=INSTALL_SECONDS)
    return _command_in(saved["payload"], resource)


def _npm(resource, saved):
    """A prefix of its own: a global installation without touching the global one."""
    npm = lib.which("npm", resource.get("path") or ())
    if npm is None:
        raise lib.CommandFailed("npm is not installed on the node")
    argv = [
        npm,
        "install",
        "--global",
        "--prefix",
        saved["payload"],
        "--no-audit",
        "--no-fund",
        "--loglevel=error",
    ]
    lib.must(argv + [_local(resource["install"]["source"])], timeout=INSTALL_SECONDS)
    return _command_in(saved["payload"], resource)


def _local(source):
    """A path of the node for what begins with ~ or file://; anything else is for the installer to understand."""
    if source.startswith("file://"):
        source = source[len("file://") :]
    return os.path.expanduser(source) if source.startswith("~") else source


def _command_in(payload, resource):
    executable = os.path.join(payload, "bin", resource["command"])
    if not os.access(executable, os.X_OK):
        there = (
            sorted(os.listdir(os.path.dirname(executable)))
            if os.path.isdir(os.path.dirname(executable))
            else []
        )
        raise lib.CommandFailed(
            "%s brings no command %s (it brings %s)"
            % (resource["install"]["source"], resource["command"], ", ".join(there) or "none")
        )
    return executable


def _file(resource, saved):
    """The file as declared."""
    executable = os.path.join(saved["payload"], resource["command"])
    writing.write_atomically(executable, base64.b64decode(resource["install"]["body"]), 0o755)
    return executable


def _url(resource, saved):
    """Download, check the digest, and only then unpack."""
    install = resource["install"]
    download = os.path.join(saved["payload"], "download")
    _fetch(install["source"], download)
    seen = lib.sha256(download)
    if seen != install["sha256"]:
        raise lib.CommandFailed(
            "%s has the SHA-256 %s, declared is %s" % (install["source"], seen, install["sha256"])
        )
    name = install["source"].split("?")[0]
    if name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar", ".zip")):
        tree = os.path.join(saved["payload"], "tree")
        os.mkdir(tree)
        _unpack(name, download, tree)
        os.unlink(download)
        executable = _member(tree, install.get("member"), resource["command"])
    else:
        executable = os.path.join(saved["payload"], resource["command"])
        os.rename(download, executable)
    os.chmod(executable, 0o755)
    return executable


def _fetch(url, target):
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as answer, open(target, "wb") as stream:
            shutil.copyfileobj(answer, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except (urllib.error.URLError, OSError) as error:
        raise lib.CommandFailed(
            "%s cannot be downloaded: %s" % (url, getattr(error, "reason", error))
        ) from None


def _unpack(name, archive, tree):
    """Unpack without ever writing outside ``tree``."""
    if name.endswith(".zip"):
        with zipfile.ZipFile(archive) as bundle:
            bundle.extractall(tree)  # refuses absolute and upward names itself
        return
    with tarfile.open(archive) as bundle:
        for member in bundle.getmembers():
            target = os.path.realpath(os.path.join(tree, member.name))
            linked = os.path.realpath(os.path.join(os.path.dirname(target), member.linkname or "."))
            inside = all(
                os.path.commonpath([tree, path]) == os.path.realpath(tree) for path in (target, linked)
            )
            if not inside or not (member.isfile() or member.isdir() or member.issym()):
                raise lib.CommandFailed("the archive has a suspicious member: %s" % member.name)
        # The check above is the filter; asking for it again only quiets newer Pythons.
        bundle.extraction_filter = lambda found, _path: found
        bundle.extractall(tree)


def _member(tree, member, command):
    if member:
        path = os.path.realpath(os.path.join(tree, member))
        if not path.startswith(os.path.realpath(tree) + os.sep) or not os.path.isfile(path):
            raise lib.CommandFailed("the archive has no member %s" % member)
        return path
    found = [os.path.join(root, command) for root, _dirs, files in os.walk(tree) if command in files]
    if len(found) != 1:
        raise lib.CommandFailed("the archive has %d files named %s: declare member" % (len(found), command))
    return found[0]


# --- apt --------------------------------------------------------------------------------------------


def _apt(*args):
    argv = [
        "apt-get",
        "--yes",
        "--quiet",
        "-o",
        "DPkg::Lock::Timeout=120",
        "-o",
        "Dpkg::Options::=--force-confold",
    ]
    env = lib.environment(DEBIAN_FRONTEND="noninteractive", NEEDRESTART_SUSPEND="1")
    return lib.must(argv + list(args), timeout=INSTALL_SECONDS, env=env)


def _packages():
    """Installed packages and their versions."""
    out = lib.must(["dpkg-query", "-W", "-f", "${Package}\t${Version}\t${db:Status-Abbrev}\n"]).out
    rows = [line.split("\t") for line in out.splitlines()]
    return {row[0]: row[1] for row in rows if row[2].startswith("ii")}


def _package_name(source):
    """The package's name of NAME, NAME=VERSION or a .deb."""
    if source.endswith(".deb"):
        return lib.must(["dpkg-deb", "--field", _local(source), "Package"]).out.strip()
    return source.split("=")[0]


def _apt_install(source):
    local = _local(source)
    if not source.endswith(".deb"):
        try:
            _apt("install", "--no-install-recommends", "--allow-downgrades", local)
        except lib.CommandFailed:
            # An index that is old or was never fetched is the usual reason; the second failure counts.
            _apt("update")
            _apt("install", "--no-install-recommends", "--allow-downgrades", local)
    else:
        _apt("install", "--no-install-recommends", "--allow-downgrades", local)
    return "installed %s by apt" % source


def _apt_restore(saved):
    """Remove packages that were not there; bring back the version that was, where it can still be had."""
    before, now = saved["packages"], _packages()
    added = sorted(set(now) - set(before))
    if added:
        lib.must(["dpkg", "--purge"] + added, timeout=INSTALL_SECONDS)
    changed = sorted(name for name in now if name in before and now[name] != before[name])
    if changed:
        _apt(
            "install",
            "--no-install-recommends",
            "--allow-downgrades",
            *["%s=%s" % (n, before[n]) for n in changed],
        )
    return "removed %s; restored %s" % (", ".join(added) or "nothing", ", ".join(changed) or "nothing")
