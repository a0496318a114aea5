"""A killed download leaves nothing that the next one would take for whole."""

import subprocess

import pytest

from recipes.nano import fetch


def test_a_killed_download_is_begun_again(tmp_path, monkeypatch):
    name = "some-emoji-1.0.0.tgz"
    content = b"half"

    def pack(command, **options):
        folder = command[command.index("--pack-destination") + 1]
        with open(f"{folder}/{name}", "wb") as file:
            file.write(content)
        if content == b"half":
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fetch.shutil, "which", lambda name: name)
    monkeypatch.setattr(fetch.subprocess, "run", pack)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_package("@some/emoji@1.0.0", tmp_path)
    content = b"whole"
    tarball = fetch.fetch_package("@some/emoji@1.0.0", tmp_path)
    assert tarball == tmp_path / name and tarball.read_bytes() == b"whole"
    assert [*tmp_path.iterdir()] == [tarball]
