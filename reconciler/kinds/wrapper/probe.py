"""Look at a managed file; node side, read-only, Python 3.6 or newer."""

lib = None  # set by the driver

COMPARED = ("type", "content", "mode", "owner", "group")


def observe(args, _connection):
    """Type, digest, mode, owner and group of what stands at ``dest``; short differing text comes along."""
    return lib.describe(lib.expand(args["dest"]), args.get("content"))


# --- from here on only for steps: a look leaves it away ---


def changes(declared, facts):
    """Declared fields that differ. Where no file stands yet, that alone is said."""
    if facts["type"] == "absent":
        if "content" in declared:
            return [{"field": "content", "desired": declared["content"], "observed": "absent"}]
        note = "its content is not declared"
        found = {"field": "content", "desired": "a file", "observed": "absent"}
        return [dict(found, fixable=False, note=note)]
    if facts["type"] != "file" and "type" in declared:
        seen = facts["type"] + (" to " + facts["target"] if "target" in facts else "")
        fixable = facts["type"] == "symlink"
        note = "" if fixable else "only files and links are ever replaced"
        return [{"field": "type", "desired": "file", "observed": seen, "fixable": fixable, "note": note}]
    if facts["type"] != "file":
        return []
    return [
        {"field": field, "desired": declared[field], "observed": facts.get(field)}
        for field in COMPARED
        if field in declared and declared[field] != facts.get(field)
    ]
