"""What the controller found out about the connection; node side only in that the answer came through it."""

lib = None  # set by the driver

COMPARED = ("control_socket", "login")


def observe(_args, connection):
    """State of the control socket before this conversation, and how a fresh login went if one was due."""
    return {
        "connection": connection.get("connection", "unknown"),
        "control_socket": connection.get("control_socket", "none"),
        "login": connection.get("login", "this one"),
    }


# --- from here on only for steps: a look leaves it away ---


def changes(declared, facts):
    """A dead or hung socket is replaced; a login that fails beside a living session is for a person."""
    found = []
    if "control_socket" in declared and facts["control_socket"] in ("dead", "hung"):
        found.append({"field": "control_socket", "desired": "alive", "observed": facts["control_socket"]})
    if "login" in declared and facts["login"].startswith("failed"):
        note = "an old session still works, a new login does not: look at sshd and the keys on the node"
        found.append(
            {
                "field": "login",
                "desired": "working",
                "observed": facts["login"],
                "fixable": False,
                "note": note,
            }
        )
    return found
