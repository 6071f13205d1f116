"""The archive of CIFAR-100: what is in it, and what is refused."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.command.requirements import CannotRunError
from benchmarks.paper.cifar100.archive import NAME, OFFICIAL, PACKED, read
from benchmarks.paper.cifar100.pickles import load_data

from small_cifar100 import CLASSES, SmallArchive, md5_of, write_archive

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@pytest.mark.parametrize("packed", [False, True])
def test_the_archive_is_read(tmp_path, packed):
    written = write_archive(tmp_path, packed=packed)
    archive = read(tmp_path, written.checksums)
    assert archive.classes == CLASSES
    for name in ("train", "test"):
        split, entries = getattr(archive, name), written.entries[name]
        assert split.images.dtype == np.uint8
        assert split.labels.tolist() == entries[b"fine_labels"]
        red, green, blue = np.split(entries[b"data"], 3, axis=1)  # rows of pixels, plane by plane
        for channel, plane in enumerate((red, green, blue)):
            np.testing.assert_array_equal(split.images[..., channel].reshape(len(plane), -1), plane)


def test_the_unpacked_folder_comes_first(tmp_path):
    written = write_archive(tmp_path)
    (tmp_path / PACKED).write_bytes(b"no archive")
    assert read(tmp_path, written.checksums).classes == CLASSES


def test_nothing_is_unpacked_on_the_disk(tmp_path):
    written = write_archive(tmp_path, packed=True)
    read(tmp_path, written.checksums)
    assert [path.name for path in tmp_path.iterdir()] == [PACKED]


def test_an_empty_folder_is_told_what_to_download(tmp_path):
    with pytest.raises(CannotRunError) as error:
        read(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} holds neither {PACKED} nor the folder {NAME}: download "
        f'"CIFAR-100 python version" from {PAGE} and save it as {tmp_path / PACKED}'
    )


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_missing_file_is_named(tmp_path, name):
    written = write_archive(tmp_path)
    written.path(name).unlink()
    with pytest.raises(CannotRunError, match=f"{written.path(name)} is missing: .*{PAGE}"):
        read(tmp_path, written.checksums)


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _tamper(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _empty(_: bytes) -> bytes:
    return b""


def _another_file(_: bytes) -> bytes:
    return b"<html>404</html>"


DAMAGES = [_truncate, _tamper, _empty, _another_file]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    written = write_archive(tmp_path)
    _check_damage(written, written.path(name), written.checksums.files[name], damage)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_archive_is_named(tmp_path, damage):
    written = write_archive(tmp_path, packed=True)
    _check_damage(written, tmp_path / PACKED, written.checksums.packed, damage)


def _check_damage(
    written: SmallArchive, path: Path, checksum: str, damage: Callable[[bytes], bytes]
) -> None:
    content = damage(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(CannotRunError) as error:
        read(written.folder, written.checksums)
    message = str(error.value)
    assert message.startswith(f"{path} is incomplete, was changed or is another file")
    assert f"{len(content)} bytes" in message
    assert md5_of(content) in message
    assert f"ought to be {checksum}" in message
    assert PAGE in message
    assert f"save it as {written.folder / PACKED}" in message
    is_unpacked = (written.folder / NAME).is_dir()  # and would be read again
    assert (f"delete the folder {written.folder / NAME}, and " in message) == is_unpacked


def test_a_file_in_the_place_of_another_is_refused(tmp_path):
    written = write_archive(tmp_path)
    shutil.copy(written.path("test"), written.path("train"))
    with pytest.raises(CannotRunError, match=re.escape(str(written.path("train")))):
        read(tmp_path, written.checksums)


@pytest.mark.parametrize("packed", [False, True])
def test_only_the_official_archive_is_read_by_default(tmp_path, packed):
    write_archive(tmp_path, packed=packed)
    expected = OFFICIAL.packed if packed else OFFICIAL.files["train"]
    with pytest.raises(CannotRunError, match=expected):
        read(tmp_path)


class _Runs:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("how", [os.mkdir, exec], ids=["function", "builtin"])
def test_a_pickle_that_runs_code_is_refused_though_its_checksum_is_right(tmp_path, protocol, how):
    trace = tmp_path / "trace"
    argument = str(trace) if how is os.mkdir else f"import os; os.mkdir({str(trace)!r})"
    bad = pickle.dumps(_Runs(how, argument), protocol=protocol)
    written = write_archive(tmp_path / "data", other={"train": bad})
    with pytest.raises(pickle.UnpicklingError, match="no part of a data set"):
        read(written.folder, written.checksums)
    assert not trace.exists()
    pickle.loads(bad)
    assert trace.exists()


def test_a_pickle_cannot_reach_through_an_allowed_module(tmp_path):
    # From protocol 4 on, a name may have dots: numpy.ndarray is allowed, and nothing inside it.
    bad = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."
    assert callable(pickle.loads(bad))
    with pytest.raises(pickle.UnpicklingError, match=r"numpy\.ndarray\.tofile"):
        load_data(bad)
