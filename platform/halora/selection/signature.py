"""Detached signatures of bundles: Ed25519 (RFC 8032) over a bundle's checksums, which cover all its files.

Keys are files as `ssh-keygen -t ed25519` and `openssl genpkey -algorithm ed25519` write them. The signed bytes begin
with what they are, so that no signature made for anything else fits a bundle.
"""

import base64
import binascii
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from halora.errors import UserError
from halora.reading import read_regular

_PURPOSE = b"halora bundle, checksums\n"
_MOST_BYTES = 16_384


def private_key(path: Path) -> Ed25519PrivateKey:
    """The private key in a file.

    Raises:
        UserError: The file cannot be read or others can read it, or holds no Ed25519 key, or one under a password.
    """
    content = read_regular(path.resolve(), _MOST_BYTES)
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        raise UserError(f"key '{path}' may be read by others (mode {mode:o})", f"chmod 600 {path}")
    for load in (load_ssh_private_key, load_pem_private_key):
        try:
            key = load(content, password=None)
        except (ValueError, UnsupportedAlgorithm):
            continue
        except TypeError:
            raise UserError(f"key '{path}' is under a password", "give a key file without one") from None
        if isinstance(key, Ed25519PrivateKey):
            return key
    raise UserError(f"key '{path}' is no private Ed25519 key", "make one: ssh-keygen -t ed25519 -N '' -f FILE")


def public_key(path: Path) -> Ed25519PublicKey:
    """The public key in a file.

    Raises:
        UserError: The file cannot be read, or holds none.
    """
    content = read_regular(path.resolve(), _MOST_BYTES)
    for load in (load_ssh_public_key, load_pem_public_key):
        try:
            key = load(content)
        except (ValueError, UnsupportedAlgorithm):
            continue
        if isinstance(key, Ed25519PublicKey):
            return key
    raise UserError(
        f"key '{path}' is no public Ed25519 key", "ssh-keygen writes it beside the private one, as FILE.pub"
    )


def sign(key: Ed25519PrivateKey, checksums: bytes) -> str:
    """The signature of a bundle's checksums, as a line of base64."""
    return base64.b64encode(key.sign(_PURPOSE + checksums)).decode() + "\n"


def fits(key: Ed25519PublicKey, signature: bytes, checksums: bytes) -> bool:
    """Whether a signature was made with a key's private half over these checksums."""
    try:
        key.verify(base64.b64decode(signature.strip(), validate=True), _PURPOSE + checksums)
    except (InvalidSignature, binascii.Error):
        return False
    return True
