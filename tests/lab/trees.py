"""What a node's files look like, so that two looks can be compared."""

import json
from typing import NamedTuple

# Runs on the node, by the node's Python. A directory's size says nothing about its contents: 0.
SCRIPT = r"""
import hashlib, json, os, stat, sys
KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link", stat.S_IFIFO: "fifo",
         stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
roots, without = json.loads(sys.argv[1])
found = {}
def look(path):
    if path in without:
        return
    try:
        seen = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    kind = KINDS[stat.S_IFMT(seen.st_mode)]
    digest = target = ""
    if kind == "file":
        with open(path, "rb") as handle:
            digest = hashlib.sha256(handle.read()).hexdigest()
    elif kind == "link":
        target = os.readlink(path)
    found[path] = [kind, "%04o" % stat.S_IMODE(seen.st_mode), seen.st_uid, seen.st_gid,
                   0 if kind == "directory" else seen.st_size, digest, seen.st_mtime_ns, target]
    if kind == "directory":
        for name in sorted(os.listdir(path)):
            look(os.path.join(path, name))
for root in roots:
    look(root)
json.dump(found, sys.stdout)
"""


class Entry(NamedTuple):
    """One path, links not followed; `mode` as four octal digits, `target` of a link only."""

    type: str
    mode: str
    uid: int
    gid: int
    size: int
    sha256: str
    mtime_ns: int
    target: str


Tree = dict[str, Entry]


def parse(text: str) -> Tree:
    return {path: Entry(*fields) for path, fields in json.loads(text).items()}
