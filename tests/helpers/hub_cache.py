"""A folder as the hub's cache keeps it."""

from __future__ import annotations

from pathlib import Path

from edgewright.system.hashes import of_file

REVISION = "0123456789abcdef0123456789abcdef01234567"


def in_the_hubs_cache(bundle: Path, cache: Path) -> Path:
    """A bundle's files as huggingface_hub keeps them: links from a snapshot to blobs named by their hashes."""
    repository = cache / "models--owner--bundle"
    snapshot = repository / "snapshots" / REVISION
    (repository / "blobs").mkdir(parents=True)
    for file in sorted(p for p in bundle.rglob("*") if p.is_file()):
        name = file.relative_to(bundle)
        blob = repository / "blobs" / of_file(file)
        blob.write_bytes(file.read_bytes())
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(name.parts) + 1), "blobs", blob.name))
    return snapshot
