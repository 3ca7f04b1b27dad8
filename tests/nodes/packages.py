"""Real packages of a small tool, for every install method; made here, so that nothing is downloaded."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

SCRIPT = "#!/bin/sh\necho '{name} {version}'\n"


def npm(directory: Path, name: str, version: str) -> Path:
    """A package as `npm pack` makes it: a tarball with everything below package/."""
    manifest = {"name": name, "version": version, "bin": {name: "cli.js"}}
    script = f"#!/usr/bin/env node\nconsole.log('{name} {version}');\n"
    files = {"package/package.json": json.dumps(manifest), "package/cli.js": script}
    return _tar(directory / f"{name}-{version}.tgz", files, executable={"package/cli.js"})


def wheel(directory: Path, name: str, version: str) -> Path:
    """A pure-Python wheel with a console script."""
    info = f"{name}-{version}.dist-info"
    path = directory / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"def main():\n    print('{name} {version}')\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/entry_points.txt", f"[console_scripts]\n{name} = {name}:main\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def deb(directory: Path, name: str, version: str) -> Path:
    """A Debian package with one executable."""
    root = directory / f"deb-{name}-{version}"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "usr/bin").mkdir(parents=True)
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: t <t@example.invalid>\nDescription: t\n"
    (root / "DEBIAN/control").write_text(control)
    (root / "usr/bin" / name).write_text(SCRIPT.format(name=name, version=version))
    (root / "usr/bin" / name).chmod(0o755)
    path = directory / f"{name}_{version}_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", root, path], check=True, capture_output=True, timeout=60
    )
    return path


def archive(directory: Path, name: str, version: str) -> Path:
    """A release tarball with the command in a directory of its own."""
    inner = f"{name}-{version}/bin/{name}"
    files = {inner: SCRIPT.format(name=name, version=version), f"{name}-{version}/README": "hello\n"}
    return _tar(directory / f"{name}-{version}.tar.gz", files, executable={inner})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tar(path: Path, files: dict[str, str], executable: set[str]) -> Path:
    with tarfile.open(path, "w:gz") as bundle:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(text.encode()), 0o755 if name in executable else 0o644
            bundle.addfile(member, io.BytesIO(text.encode()))
    return path
