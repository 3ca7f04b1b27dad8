"""Put a managed file in place and take it back; node side, Python 3.6 or newer."""

import base64
import contextlib
import os

lib = writing = None  # set by the driver
probe = None  # this kind's probe, set by the driver


def paths(resource):
    """What a step may write."""
    return [lib.expand(resource["dest"])]


def difference(resource):
    """The text that is there and the declared one."""
    return writing.text_difference(lib.expand(resource["dest"]), resource.get("content"), resource["body"])


def backup(resource, attempt):
    """Copy what stands there beside it."""
    dest = lib.expand(resource["dest"])
    return {"file": writing.save(dest, attempt), "created": writing.missing_parents(dest)}


def apply(resource, _saved):
    """Write beside, validate, rename. Nothing under the old name changes until the new file is whole and valid."""
    dest = lib.expand(resource["dest"])
    current = lib.describe(dest, want_text=False)
    writing.make_parents(dest)
    mode = int(resource.get("mode") or current.get("mode") or "0644", 8)
    temporary = writing.write_beside(dest, _content(resource, dest, current), mode, *_ids(resource, current))
    try:
        if resource.get("validate"):
            lib.must([word.replace("%s", temporary) for word in resource["validate"]], timeout=30)
        writing.replace(temporary, dest)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return "wrote %s" % dest


def _content(resource, dest, current):
    """The declared bytes; where content is not declared (ignored), the bytes that are there."""
    if resource.get("content") is not None:
        return base64.b64decode(resource["body"])
    if current["type"] != "file":
        raise lib.Refused("%s is no file and its content is not declared" % dest)
    with open(dest, "rb") as stream:
        return stream.read()


def _ids(resource, current):
    """Numeric owner and group: the declared ones, else those of the file that is replaced."""
    import grp
    import pwd

    owner = resource.get("owner") or current.get("owner")
    group = resource.get("group") or current.get("group")
    try:
        uid = pwd.getpwnam(owner).pw_uid if owner else -1
        gid = grp.getgrnam(group).gr_gid if group else -1
    except KeyError as error:
        raise lib.Refused("no such account on this node: %s" % error) from None
    own = uid in (-1, os.geteuid()) and (gid == -1 or gid == os.getegid() or gid in os.getgroups())
    if not own and os.geteuid() != 0 and (resource.get("owner") or resource.get("group")):
        raise lib.Refused("changing the owner needs privilege: set allow_become for this resource")
    return (uid, gid) if own or os.geteuid() == 0 else (-1, -1)


def rollback(_resource, saved):
    """Put back what was saved, or remove what had not been there."""
    writing.put_back(saved["file"], saved.get("created", ()))
    return "restored %s" % saved["file"]["path"]
