import io
import re
import subprocess
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_iterator

from astropt_ds.data.tars import BadTarError, members

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=130)


def archive(files, fmt=tarfile.PAX_FORMAT):
    """A tar file of {name: bytes}."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=fmt) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=700)), max_size=6, unique_by=lambda f: f[0]),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_keys_suffixes_and_bytes_are_those_of_webdataset(files, fmt):
    data = archive(files, fmt)
    theirs = {
        (sample["__key__"], suffix, value)
        for file in tar_file_iterator(io.BytesIO(data))
        for sample in group_by_keys([{**file, "__url__": ""}])
        for suffix, value in sample.items()
        if not suffix.startswith("__")
        if not re.search(r"(^|/)\._", file["fname"])  # what macOS adds is no sample here
    }
    ours = [
        (m.key, m.suffix, data[m.offset : m.offset + m.size]) for m in members(io.BytesIO(data))
    ]
    assert set(ours) == theirs


@pytest.fixture(scope="module")
def sound():
    """Six samples with pax headers, as webdataset writes them by default: times are no integers."""
    file = io.BytesIO()
    with TarWriter(file) as tar:
        for i in range(6):
            tar.write({"__key__": f"{i}" * 120, "jpg": bytes([i + 1]) * 600, "txt": "x"})
    return file.getvalue()


def headers(data):
    """Where each block of header starts: the 512 bytes before a member and its extensions."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.offset, m.offset_data) for m in tar]


def test_a_header_of_any_kind_that_is_damaged_anywhere_is_an_error(sound):
    for start, stop in headers(sound):
        for block in (start, stop - 512):  # of the extension, and of the member
            for byte in (block, block + 130, block + 149):
                damaged = bytearray(sound)
                damaged[byte] ^= 0x01
                with pytest.raises(BadTarError) as error:
                    list(members(io.BytesIO(damaged)))
                assert start <= error.value.byte <= stop


def test_wherever_it_is_cut_off_it_is_an_error(sound):
    end = len(sound.rstrip(b"\0"))
    end += -end % 512 + 1024
    for cut in range(0, end, 256):
        with pytest.raises(BadTarError):
            list(members(io.BytesIO(sound[:cut])))
    assert len(list(members(io.BytesIO(sound[:end])))) == 12


def test_members_before_a_damage_are_told_first(sound):
    damaged = bytearray(sound)
    damaged[headers(sound)[7][0]] ^= 0x01
    found = []
    with pytest.raises(BadTarError):
        found.extend(member for member in members(io.BytesIO(damaged)))
    iterator = members(io.BytesIO(damaged))
    assert [next(iterator).key for _ in range(7)] == [f"{i // 2}" * 120 for i in range(7)]


def test_two_archives_in_one_file_are_an_error(sound):
    with pytest.raises(BadTarError, match="zeros in place of a tar header"):
        list(members(io.BytesIO(sound + sound)))


def test_an_empty_archive_has_no_members():
    assert list(members(io.BytesIO(archive([])))) == []


def test_links_are_told_and_what_macos_adds_is_passed_over():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (("a.png", tarfile.REGTYPE), ("b.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("train/._a.png"))
    assert [(m.key, m.link) for m in members(file)] == [("a", False), ("b", True)]


def test_a_sparse_member_is_an_error(tmp_path):
    """Its bytes in the tar file are not those of the file."""
    with (tmp_path / "a.npy").open("wb") as file:
        file.truncate(1 << 20)
    subprocess.run(["tar", "-S", "-cf", "a.tar", "a.npy"], cwd=tmp_path, check=True)
    with pytest.raises(BadTarError, match="a.npy is a sparse file"):
        list(members((tmp_path / "a.tar").open("rb")))
