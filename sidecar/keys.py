"""Provider keys at rest: AES-256-GCM, bound to their place, with a keyring that rotates."""

import hashlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

VERSION = 1
_ID_BYTES = 4
_NONCE_BYTES = 12
_KEY_BYTES = 32
_HEAD_BYTES = 1 + _ID_BYTES
_SHOWN_FIRST, _SHOWN_LAST = 6, 4
_MASK = "..."


class KeyringError(Exception):
    """The keyring cannot be used or cannot open something; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a ciphertext lives; it cannot be moved elsewhere and still open."""

    table: str
    row: str
    column: str

    def data(self) -> bytes:
        """Associated data. Lengths keep `a|b` and `ab|` apart."""
        return b"".join(
            b"%d:%b;" % (len(p), p) for p in (s.encode() for s in (self.table, self.row, self.column))
        )


def key_id(key: bytes) -> bytes:
    """Four bytes that name a key without telling anything about it."""
    return hashlib.sha256(b"sidecar key id" + key).digest()[:_ID_BYTES]


class Keyring:
    """One key to encrypt with, and any number that only decrypt."""

    def __init__(self, primary: bytes, others: Sequence[bytes] = ()) -> None:
        self.primary_id = key_id(primary)
        self._ciphers = {key_id(key): AESGCM(key) for key in (primary, *others)}

    def seal(self, text: str, place: Place) -> bytes:
        """version, key id, nonce, ciphertext."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._ciphers[self.primary_id].encrypt(nonce, text.encode(), place.data())
        return bytes([VERSION]) + self.primary_id + nonce + sealed

    def open(self, blob: bytes, place: Place) -> str:
        """The text. Raises KeyringError."""
        if len(blob) < _HEAD_BYTES + _NONCE_BYTES or blob[0] != VERSION:
            raise KeyringError(f"{place.table}/{place.row}: not a value this version has encrypted")
        name = blob[1:_HEAD_BYTES]
        cipher = self._ciphers.get(name)
        if cipher is None:
            raise KeyringError(
                f"{place.table}/{place.row}: encrypted with key {name.hex()}, which is not in the keyring; "
                "add it to SIDECAR_OLD_ENCRYPTION_KEYS"
            )
        try:
            opened = cipher.decrypt(
                blob[_HEAD_BYTES : _HEAD_BYTES + _NONCE_BYTES],
                blob[_HEAD_BYTES + _NONCE_BYTES :],
                place.data(),
            )
        except InvalidTag:
            raise KeyringError(f"{place.table}/{place.row}: the ciphertext was changed or moved") from None
        return opened.decode()

    def current(self, blob: bytes) -> bool:
        """Whether a value is sealed with the primary key already."""
        return blob[1:_HEAD_BYTES] == self.primary_id


def parse_key(text: str, where: str) -> bytes:
    """64 hex characters. Raises KeyringError naming the place, never the value."""
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise KeyringError(f"{where} must be 64 hex characters; make one with: openssl rand -hex 32")
    return key


def load(text: str, old: str, path: Path, *, anything_encrypted: bool) -> Keyring:
    """The keyring from the environment, else from the file, else freshly made.

    The file holds one key a line, the primary first. A new key is only made while nothing
    is encrypted yet: otherwise it would hide that the right one is missing.
    """
    others = [parse_key(part, "SIDECAR_OLD_ENCRYPTION_KEYS") for part in old.split(",") if part.strip()]
    if text:
        if path.exists():
            others += _read(path)
        return Keyring(parse_key(text, "SIDECAR_ENCRYPTION_KEY"), others)
    if path.exists():
        found = _read(path)
        if not found:
            raise KeyringError(f"{path} is empty; restore it from a backup")
        return Keyring(found[0], [*found[1:], *others])
    if anything_encrypted:
        raise KeyringError(
            f"there are encrypted keys but no key to open them: set SIDECAR_ENCRYPTION_KEY or restore {path} "
            "(or start with --degraded and enter the provider keys anew)"
        )
    key = secrets.token_bytes(_KEY_BYTES)
    write_secret(path, key.hex() + "\n")
    return Keyring(key, others)


def add_primary(path: Path) -> Keyring:
    """Put a fresh key in front of the file's; the old ones stay to decrypt with."""
    found = _read(path) if path.exists() else []
    key = secrets.token_bytes(_KEY_BYTES)
    write_secret(path, "".join(k.hex() + "\n" for k in (key, *found)))
    return Keyring(key, found)


def keep_primary(path: Path) -> None:
    """Drop all keys of the file but the first."""
    write_secret(path, _read(path)[0].hex() + "\n")


def _read(path: Path) -> list[bytes]:
    lines = path.read_text(encoding="ascii", errors="replace").split()
    return [parse_key(line, str(path)) for line in lines]


def write_secret(path: Path, text: str) -> None:
    """Write beside and rename, readable by the owner only from the first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + f".{secrets.token_hex(4)}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def mask(key: str) -> str:
    """First 6 and last 4 characters; short keys show nothing."""
    if len(key) < 2 * (_SHOWN_FIRST + _SHOWN_LAST):
        return _MASK if key else ""
    return f"{key[:_SHOWN_FIRST]}{_MASK}{key[-_SHOWN_LAST:]}"


def is_mask_of(text: str, key: str) -> bool:
    """Whether an admin sent back the mask he was shown."""
    return _MASK in text and text == mask(key)
