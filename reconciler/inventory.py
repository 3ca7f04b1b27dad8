"""The nodes: Ansible's own inventory, read in this process.

The only importer of Ansible's Python API outside the plugins, so that host patterns and variables mean
here exactly what they mean to Ansible. Ansible is imported inside the functions: it costs a third of a
second, which `reconcile schema` need not pay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from reconciler.model import ConfigurationError, Problem


class Inventory:
    """Hosts, patterns and variables of one inventory (a file or a directory)."""

    def __init__(self, path: Path, loader: Any = None) -> None:
        """``loader`` is that of the Ansible program this runs in, which has set up everything once already."""
        self.path = path
        if not path.exists():
            hint = "name it with --inventory, or make one with: reconcile init"
            raise ConfigurationError([Problem(f"no inventory at {path}", hint=hint)])
        self._load(loader)

    def _load(self, loader: Any) -> None:
        from ansible.errors import AnsibleError
        from ansible.inventory.manager import InventoryManager

        try:
            self._loader = _own_loader() if loader is None else loader
            self._manager = InventoryManager(loader=self._loader, sources=[str(self.path)])
        except AnsibleError as error:
            raise ConfigurationError(
                [Problem(f"the inventory {self.path} cannot be read: {error}")]
            ) from error
        if not self._manager.hosts:
            hint = "list at least one host; `ansible-inventory --graph` shows what Ansible sees"
            raise ConfigurationError([Problem(f"the inventory {self.path} has no hosts", hint=hint)])

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """All host names, in inventory order."""
        return tuple(self._manager.hosts)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """All group names."""
        return tuple(self._manager.groups)

    def match(self, pattern: str) -> tuple[str, ...]:
        """Host names that a host pattern matches, in order. Raises LookupError where some part matches nothing."""
        from ansible.errors import AnsibleError

        try:
            found = self._manager.list_hosts(pattern)
        except AnsibleError as error:
            raise LookupError(str(error.message)) from error
        names = tuple(host.name for host in found)
        if not names:
            raise LookupError(f"the pattern {pattern!r} matches no node")
        return tuple(name for name in self.nodes if name in set(names))

    @cached_property
    def variables(self) -> Mapping[str, Mapping[str, Any]]:
        """Per node: its inventory variables, group_vars and host_vars, templated, without Ansible's magic ones."""
        from ansible.errors import AnsibleError
        from ansible.template import Templar
        from ansible.vars.manager import VariableManager

        # Our own vars plugin must not be asked: it would load the desired state, which asks us.
        before = os.environ.get("RECONCILER_VARS")
        os.environ["RECONCILER_VARS"] = "off"
        try:
            manager = VariableManager(loader=self._loader, inventory=self._manager)
            found = {}
            for name in self.nodes:
                raw = manager.get_vars(host=self._manager.get_host(name), include_hostvars=False)
                templar = Templar(loader=self._loader, variables=raw)
                own = {key: value for key, value in raw.items() if key not in _MAGIC}
                found[name] = {key: _plain(templar, key, value, name) for key, value in own.items()}
                found[name] |= {"inventory_hostname": name, "group_names": sorted(raw.get("group_names", []))}
        except AnsibleError as error:
            raise ConfigurationError(
                [Problem(f"the inventory's variables cannot be read: {error}")]
            ) from error
        finally:
            if before is None:
                del os.environ["RECONCILER_VARS"]
            else:
                os.environ["RECONCILER_VARS"] = before
        return found


_MAGIC = frozenset(
    {
        "ansible_playbook_python", "ansible_version", "ansible_config_file", "groups", "hostvars", "inventory_dir",
        "inventory_file", "inventory_hostname", "inventory_hostname_short", "group_names", "omit", "playbook_dir",
        "ansible_check_mode", "ansible_diff_mode", "ansible_forks", "ansible_inventory_sources", "ansible_limit",
        "ansible_run_tags", "ansible_skip_tags", "ansible_verbosity", "vars", "environment", "ansible_facts",
    }
)  # fmt: skip


def _own_loader() -> Any:
    """Ansible's reader of files, with the vault's passwords where Ansible's settings name them."""
    from ansible import constants
    from ansible.cli import CLI
    from ansible.parsing.dataloader import DataLoader
    from ansible.parsing.vault import VaultSecretsContext
    from ansible.plugins.loader import init_plugin_loader
    from ansible.plugins.vars import host_group_vars

    # Ansible remembers per process which variable files there are; a pass has to see those that came later.
    for memory in (host_group_vars.CANONICAL_PATHS, host_group_vars.FOUND, host_group_vars.NAK):
        memory.clear()
    # A part of a pattern that matches nothing is a typing error until proven otherwise.
    constants.HOST_PATTERN_MISMATCH = "error"
    _initialize(init_plugin_loader)
    loader = DataLoader()
    files = constants.DEFAULT_VAULT_PASSWORD_FILE
    secrets = CLI.setup_vault_secrets(
        loader,
        vault_ids=list(constants.DEFAULT_VAULT_IDENTITY_LIST),
        vault_password_files=[files] if files else [],
        auto_prompt=False,
        initialize_context=False,
    )
    # One per process: a later pass brings its own passwords into it.
    vault = VaultSecretsContext.current(optional=True)
    if vault is None:
        VaultSecretsContext.initialize(VaultSecretsContext(secrets))
    else:
        vault.secrets = secrets
    loader.set_vault_secrets(secrets)
    return loader


_initialized = False


def _initialize(init_plugin_loader: Any) -> None:
    """Ansible's plugin loader may be set up once per process."""
    global _initialized  # noqa: PLW0603 - it is Ansible's global, not ours
    if not _initialized:
        init_plugin_loader()
        _initialized = True


def _plain(templar: Any, key: str, value: Any, node: str) -> Any:
    """The templated value without Ansible's tags; a variable nobody refers to may be broken in peace."""
    from ansible.errors import AnsibleError

    try:
        return _untagged(templar.template(value), VaultedText if _encrypted(value) else str)
    except AnsibleError as error:
        return BrokenVariable(f"the variable {key!r} of {node} cannot be templated: {error.message}")


class BrokenVariable(str):
    """Stands for a variable whose template fails; using it is an error with this text."""

    __slots__ = ()


class VaultedText(str):
    """A value that stood encrypted in the inventory; whoever refers to it deals with a secret."""

    __slots__ = ()


def holds_vaulted(value: Any) -> bool:
    """Whether a vaulted value stands anywhere inside."""
    if isinstance(value, Mapping):
        return any(map(holds_vaulted, value.values()))
    return isinstance(value, VaultedText) or (isinstance(value, list) and any(map(holds_vaulted, value)))


def _encrypted(value: Any) -> bool:
    """Whether a value as it was written holds an encrypted string."""
    from ansible.parsing.vault import EncryptedString

    if isinstance(value, Mapping):
        return any(map(_encrypted, value.values()))
    return isinstance(value, EncryptedString) or (isinstance(value, list) and any(map(_encrypted, value)))


def _untagged(value: Any, text: type[str] = str) -> Any:
    """Plain Python values, strings as ``text``: Ansible marks strings and containers with where they came from."""
    if isinstance(value, Mapping):
        return {str(key): _untagged(item, text) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_untagged(item, text) for item in value]
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return text(value) if isinstance(value, str) else value
