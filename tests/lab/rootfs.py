"""The base all nodes share read-only: a small Debian, built once per recipe and cached."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab.host import LabError, call, check_host, os_release, remove_tree

CACHE = Path("/var/cache/reconciler-lab")
REVISION = 1  # raise it when this module changes what it makes of the same recipe
BUILD_DEADLINE = 540.0
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd", "openssh-server", "sudo"),
    *("python3", "python3-venv", "python3-pip", "nodejs", "ca-certificates", "curl", "rsync"),
    *("iproute2", "procps", "less", "cron"),
)
NPM = "npm@10"  # the last one for the Node.js 18 that Debian 12 ships
# Timers and consoles cost start-up time or change the node behind a test's back; the network and its
# names belong to the machine; ssh.socket would take the machine's port 22.
MASKED = (
    *(
        "apt-daily.timer",
        "apt-daily-upgrade.timer",
        "dpkg-db-backup.timer",
        "e2scrub_all.timer",
        "fstrim.timer",
    ),
    *("systemd-tmpfiles-clean.timer", "e2scrub_reap.service", "ssh.socket", "cron.service"),
    *("getty@tty1.service", "console-getty.service", "container-getty@.service", "getty-static.service"),
    *("systemd-networkd.service", "systemd-networkd.socket", "systemd-resolved.service"),
    *("systemd-timesyncd.service", "systemd-pstore.service", "systemd-binfmt.service"),
    *("proc-sys-fs-binfmt_misc.automount", "dev-hugepages.mount", "sys-fs-fuse-connections.mount"),
    *("systemd-logind-varlink.socket", "systemd-journald-audit.socket"),
)
STRIPPED = (
    *("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/info"),
    *("usr/share/locale", "usr/share/i18n", "usr/share/lintian", "usr/share/bash-completion", "var/log"),
)
FILES = {
    "etc/sudoers.d/agent": (0o440, "agent ALL=(ALL) NOPASSWD: ALL\n"),
    "var/lib/systemd/linger/agent": (0o644, ""),
    # In memory and small: twenty nodes' journals would otherwise be the lab's largest cost.
    "etc/systemd/journald.conf.d/lab.conf": (0o644, "[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\n"),
    # A copy of the machine's would send look-ups off the loopback range; an empty one means 127.0.0.1,
    # where nobody answers, at once.
    "etc/resolv.conf": (0o644, ""),
    "etc/default/locale": (0o644, "LANG=C.UTF-8\n"),
}


def recipe() -> dict[str, object]:
    """Everything the base is made from; its hash names the base."""
    return {
        "revision": REVISION,
        "suite": os_release()["VERSION_CODENAME"],
        "architecture": call(["dpkg", "--print-architecture"]).strip(),
        # Without npm on the machine its tarball cannot be had, and Debian's (large) package takes its place.
        "packages": [*PACKAGES, *([] if shutil.which("npm") else ["npm"])],
        "npm": NPM if shutil.which("npm") else "",
        "masked": MASKED,
        "stripped": STRIPPED,
        "files": FILES,
    }


def _mirror(suite: str) -> str:
    """Where the machine itself gets that suite from."""
    listing = [
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Identifier: Packages",
    ]
    for line in call(listing).splitlines():
        uri, release, component = line.split(" ")
        if (release, component) == (suite, "main"):
            return uri
    raise LabError(f"no mirror of {suite} main in the machine's apt sources")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for another builder of the same base, as long as a build may take."""
    with path.open("w") as handle:
        until = time.monotonic() + BUILD_DEADLINE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise LabError(f"somebody has been building a base for too long (lock {path})") from None
                time.sleep(0.2)
        yield


def ensure_base(cache: Path = CACHE) -> Path:
    """The directory of the base, built when it is not there yet (about a minute, once per recipe).

    A half-built base is never seen: it is built beside and renamed, and what a killed builder left
    is removed by the next one.
    """
    check_host()
    made_from = recipe()
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    base = cache / digest
    if base.is_dir():
        return base
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache / f"{digest}.lock"):
        if base.is_dir():
            return base
        building = cache / f"{digest}.building"
        remove_tree(building)
        _build(building, made_from)
        os.sync()
        building.rename(base)
    return base


def _build(root: Path, made_from: dict[str, object]) -> None:
    suite = str(made_from["suite"])
    packages = made_from["packages"]
    assert isinstance(packages, list)
    # Namespaces of its own: the mounts and processes debootstrap makes go with it, however it ends;
    # and it ends with us, or it would go on writing below the next builder's hands.
    isolated = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]
    bootstrap = [
        "debootstrap",
        "--variant=minbase",
        f"--include={','.join(packages)}",
        suite,
        str(root),
        _mirror(suite),
    ]
    call([*isolated, *bootstrap], deadline=BUILD_DEADLINE)
    call(["chroot", root, "useradd", "--uid", "1000", "--create-home", "--shell", "/bin/bash", "agent"])
    for name, (mode, text) in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
    for unit in MASKED:
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    if made_from["npm"]:
        _add_npm(root, str(made_from["npm"]))
    _strip(root)


def _add_npm(root: Path, spec: str) -> None:
    """Add npm as its own tarball: Debian's package would bring 400 others."""
    modules = root / "usr/lib/node_modules"
    modules.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        call(["npm", "pack", "--silent", "--pack-destination", scratch, spec], deadline=120)
        (tarball,) = Path(scratch).glob("npm-*.tgz")
        with tarfile.open(tarball) as archive:
            archive.extractall(scratch, filter="data")
        shutil.copytree(Path(scratch) / "package", modules / "npm", symlinks=True)
    for part in ("docs", "man"):
        remove_tree(modules / "npm" / part)
    for path in [modules, *modules.rglob("*")]:
        os.chown(path, 0, 0, follow_symlinks=False)
    for name in ("npm", "npx"):
        script = modules / f"npm/bin/{name}-cli.js"
        script.chmod(0o755)
        (root / "usr/bin" / name).symlink_to(f"../lib/node_modules/npm/bin/{name}-cli.js")


def _strip(root: Path) -> None:
    """Remove what no node reads, and what every node must have for itself."""
    for name in STRIPPED:
        for path in (root / name).iterdir() if (root / name).is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    for path in [root / "etc/machine-id", root / "var/lib/dbus/machine-id", *root.glob("etc/ssh/ssh_host_*")]:
        path.unlink(missing_ok=True)
