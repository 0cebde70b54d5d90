"""Signatures of versions with an offline key (OpenSSF Model Signing).

The digests in a version's tags show that files were changed. Who can change files and tags together
is only stopped by a signature. It covers every file but the card and the evidence, which change
with each comparison, and is stored as a tag of the version, next to the files that it covers.
"""

import tempfile
from pathlib import Path
from types import ModuleType

from pipelines.errors import RegistryError, one_line
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.bundle_verification import (
    VersionBundle,
    VersionCheck,
    download_bundle,
    verify_bundle,
)
from pipelines.tracking.connection import connect, editing
from pipelines.tracking.model_card import FILE as CARD
from pipelines.tracking.move_log import ADAPTER_TAG
from pipelines.tracking.references import Reference
from pipelines.tracking.tag_names import stored_name
from pipelines.tracking.version_files import DOWNLOAD_NOTE, EVIDENCE

SIGNATURE_TAG = "signature"
"""A Sigstore bundle as JSON."""
UNSIGNED = (CARD, EVIDENCE, DOWNLOAD_NOTE)
INSTALL = "pip install 'lora-pipeline[signing]'"


class SignedVersion(Values):
    """A version that was signed."""

    name: str
    version: str
    adapter_sha256: str
    files: int
    """Number of files that the signature covers."""


def sign_version(reference: Reference, key: Path, runs: Path) -> SignedVersion:
    """Verify a version, sign its files, and store the signature with it.

    Args:
        reference: the version.
        key: file with a private elliptic-curve key in PEM, as `openssl ecparam -genkey` writes it.
        runs: folder of runs.

    Raises:
        RegistryError: the version was changed, or the key cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch, connect(runs, editing(reference.name)) as client:
        bundle = download_bundle(client, reference, Path(scratch) / "version")
        for check in verify_bundle(bundle).checks:
            if check.problems:
                raise RegistryError(
                    f"version {bundle.version} of {bundle.name} is not signed, because it fails "
                    f"`lora registry verify`: {check.problems[0]}"
                )
        signature = _sign(bundle.folder, key, Path(scratch) / "signature.json")
        tag = stored_name(SIGNATURE_TAG)
        client.set_model_version_tag(bundle.name, bundle.version, tag, signature)
        return SignedVersion(
            name=bundle.name,
            version=bundle.version,
            adapter_sha256=bundle.tags.get(ADAPTER_TAG, ""),
            files=len(_signed_files(bundle.folder)),
        )


def check_signature(bundle: VersionBundle, public_key: Path) -> VersionCheck:
    """Return whether a version's files are those that the owner of a key has signed.

    Raises:
        RegistryError: the public key cannot be read.
    """
    library = _library()
    try:
        verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError) as error:
        raise RegistryError(
            f"{public_key} is not a public elliptic-curve key in PEM: {one_line(error)}"
        ) from error
    text = bundle.tags.get(SIGNATURE_TAG)
    if text is None:
        problem = "the version is not signed; sign it with `lora registry sign`"
        return VersionCheck(name=SIGNATURE_TAG, problems=(problem,))
    with tempfile.TemporaryDirectory() as scratch:
        signature = Path(scratch) / "signature.json"
        signature.write_text(text)
        try:
            verifier.verify(bundle.folder, signature)
        except Exception as error:  # noqa: BLE001 - a signature can be any text
            problem = f"no signature of these files by {public_key.name}: {one_line(error)}"
            return VersionCheck(name=SIGNATURE_TAG, problems=(problem,))
    return VersionCheck(name=SIGNATURE_TAG, problems=())


def _sign(folder: Path, key: Path, signature: Path) -> str:
    """Sign the files in a folder; return the signature, which is written to a file on the way."""
    library = _library()
    unsigned = [folder / name for name in UNSIGNED]
    hashing = library.hashing.Config().set_ignored_paths(paths=unsigned, ignore_git_paths=False)
    try:
        signer = library.signing.Config().use_elliptic_key_signer(private_key=key)
    except (OSError, ValueError, TypeError) as error:
        raise RegistryError(
            f"{key} is not a private elliptic-curve key in PEM without a password: "
            f"{one_line(error)}"
        ) from error
    signer.set_hashing_config(hashing).sign(folder, signature)
    return signature.read_text()


def _signed_files(folder: Path) -> list[Path]:
    """Return the files that a signature covers."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).parts[0] not in UNSIGNED:
            found.append(path)
    return found


def _library() -> ModuleType:
    """Return the library that signs.

    Raises:
        RegistryError: it is not installed.
    """
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise RegistryError(f"signatures need a library that is missing; {INSTALL}") from error
    module: ModuleType = model_signing
    return module
