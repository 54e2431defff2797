"""The download cache of the Hugging Face hub: directories `models--org--name` with blobs/, refs/ and snapshots/."""

from pathlib import Path


def follow_snapshot(directory: str | Path) -> Path:
    """Return the snapshot that refs/main of a cache directory names, or its only one. Other directories are unchanged.

    Raises FileNotFoundError if there is no such snapshot.
    """
    directory = Path(directory)
    snapshots, ref = directory / "snapshots", directory / "refs" / "main"
    if not directory.absolute().name.startswith("models--") or not snapshots.is_dir():
        return directory
    commits = sorted(path.name for path in snapshots.iterdir())
    commit = commits[0] if len(commits) == 1 else ""
    if ref.is_file():
        commit = ref.read_bytes().decode(errors="replace").strip()
    if commit not in commits:
        choices = ", ".join(commits) or "none"
        raise FileNotFoundError(f"{ref}: does not name a snapshot; choose one in {snapshots} (found: {choices:.200})")
    return snapshots / commit


def find_partial_download(directory: Path) -> str | None:
    """Return the name of a file in the directory's cache whose download was interrupted, or None."""
    caches = (directory / ".cache" / "huggingface" / "download", directory.absolute().parent.parent / "blobs")
    return min((path.name for cache in caches for path in cache.glob("*.incomplete")), default=None)
