"""Files are replaced whole: after a kill or on a full disk the old one is still there."""

from __future__ import annotations

import errno
import os

import pytest

from conlens_jax.config import ExperimentConfig, with_changes
from conlens_jax.files.whole import naming_full_disk, reason_of, write_whole
from conlens_jax.training.run_folder import claim_folder


def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_old_file_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "metrics.json"
    write_whole(file, "old \u00e9")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"No space left.*metrics\.json .*{tmp_path} .*MiB free"):
            write_whole(file, "new")
    assert file.read_text(encoding="utf-8") == "old \u00e9"
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.json"]


def test_links_keep_pointing_and_devices_are_written_to(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "text"
    write_whole("/dev/null", "text")
    with pytest.raises(OSError, match="No space left on device: full could not be written in /dev"):
        write_whole("/dev/full", "text")


def test_the_reason_is_told_in_a_few_words():
    storage = (
        f'RESOURCE_EXHAUSTED: Error writing "/a": {os.strerror(errno.ENOSPC)} [code=28] \n' * 9
    )
    assert reason_of(ValueError(storage)) == "No space left on device"
    assert reason_of(OSError(errno.EFBIG, "File too large")) == "File too large"
    assert reason_of(ValueError("one\ntwo")) == "one"
    assert reason_of(ValueError()) == "ValueError"


def test_other_errors_are_left_alone(tmp_path):
    with pytest.raises(OSError, match="broken") as caught, naming_full_disk(tmp_path / "file"):
        raise OSError(errno.EIO, "broken")
    assert caught.value.errno == errno.EIO


def test_a_kill_while_a_run_is_claimed_leaves_its_config(tmp_path, monkeypatch):
    """config.json is written at every start; without a whole one a run cannot go on."""
    first = with_changes(ExperimentConfig(), {"train.seed": 3})
    claim_folder(tmp_path / "run", first)
    before = (tmp_path / "run" / "config.json").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="config.json could not be written"):
        claim_folder(tmp_path / "run", ExperimentConfig())
    assert (tmp_path / "run" / "config.json").read_bytes() == before
