"""What ``reconcile init`` writes: small, commented, and working as it is on this very machine."""

from __future__ import annotations

from pathlib import Path

from reconciler.desired.schema import text as schema_text
from reconciler.model import ConfigurationError, Problem
from reconciler.paths import ansible_home

HERE = Path(__file__).parent
TEMPLATES = HERE / "scaffold_files"
SCHEMA = Path("desired_state/desired_state.schema.json")


def write(directory: Path) -> list[Path]:
    """Write every file, or none where one of them exists already. Raises ConfigurationError."""
    sources = sorted(path for path in TEMPLATES.rglob("*") if path.is_file())
    targets = {
        source: directory / str(source.relative_to(TEMPLATES)).replace("dot_", ".") for source in sources
    }
    standing = [target for target in targets.values() if target.exists()]
    if standing:
        hint = "choose an empty directory, or move these away"
        raise ConfigurationError([Problem(f"{target} exists already", hint=hint) for target in standing])
    try:
        for source, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8")
            text = text.replace("@ANSIBLE_HOME@", str(ansible_home())).replace(
                "@PLUGINS@", str(HERE / "plugins")
            )
            target.write_text(text, encoding="utf-8")
            target.chmod(0o755 if target.suffix == ".sh" else 0o644)
        (directory / SCHEMA).write_text(schema_text(), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write {error.filename}: {error.strerror}") from error
    return [*targets.values(), directory / SCHEMA]
