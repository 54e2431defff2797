import pytest


@pytest.fixture
def write(tmp_path):
    """Write text or bytes unchanged to a file and return its path."""

    def write(content, name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
