import pytest

from minidoctor.files.hub_cache import find_partial_download, follow_snapshot


@pytest.fixture
def cache(tmp_path):
    """Return a cache directory with the snapshots "old" and "new", of which refs/main names the second."""
    cache = tmp_path / "models--org--name"
    for name in ("blobs", "refs", "snapshots/old", "snapshots/new"):
        (cache / name).mkdir(parents=True)
    (cache / "refs" / "main").write_text("new\n")
    return cache


def test_cache_directory_is_followed_to_the_snapshot_of_main(cache, monkeypatch):
    assert follow_snapshot(cache) == cache / "snapshots" / "new"
    assert follow_snapshot(str(cache)) == cache / "snapshots" / "new"
    monkeypatch.chdir(cache)
    assert follow_snapshot(".").resolve() == cache / "snapshots" / "new"


def test_other_directories_are_returned_unchanged(cache):
    for directory in (cache / "snapshots" / "old", cache.parent, cache / "nowhere"):
        assert follow_snapshot(directory) == directory
    renamed = cache.rename(cache.with_name("name"))
    assert follow_snapshot(renamed) == renamed


@pytest.mark.parametrize("commit", [None, "", "unknown", "..", "../../..", b"\xff"], ids=str)
def test_cache_without_the_snapshot_of_main_is_rejected_with_the_snapshots(cache, commit):
    (cache / "refs" / "main").unlink()
    if commit is not None:
        (cache / "refs" / "main").write_bytes(commit if isinstance(commit, bytes) else commit.encode())
    with pytest.raises(FileNotFoundError, match=r"refs/main: .*new, old"):
        follow_snapshot(cache)


def test_only_snapshot_is_followed_without_a_ref(cache):
    (cache / "refs" / "main").unlink()
    (cache / "snapshots" / "old").rmdir()
    assert follow_snapshot(cache) == cache / "snapshots" / "new"
    (cache / "refs" / "main").write_text("old")  # an incomplete download of another commit is not passed over
    with pytest.raises(FileNotFoundError, match="refs/main"):
        follow_snapshot(cache)


def test_partial_download_is_found_in_cache_and_local_directory(cache, tmp_path):
    snapshot, local = cache / "snapshots" / "new", tmp_path / "local"
    assert find_partial_download(snapshot) is find_partial_download(local) is None
    (cache / "blobs" / "0a1b.incomplete").touch()
    assert find_partial_download(snapshot) == "0a1b.incomplete"
    assert find_partial_download(local) is None
    (local / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (local / ".cache" / "huggingface" / "download" / "weights.incomplete").touch()
    assert find_partial_download(local) == "weights.incomplete"
