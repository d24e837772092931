"""An import of what others may hand over: altered, cut or crafted, it is refused and not seen."""

import hashlib
import io
import os
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from small_trio import contents, refused

from trimix_gguf.errors import TrioFileError
from trimix_gguf.trios import store
from trimix_gguf.trios.bundle import export_trio, import_trio
from trimix_gguf.trios.plain_tar import read_members
from trimix_gguf.trios.triofile import to_toml


def member(name, content=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(content), link
    return info, io.BytesIO(content)


def crafted(small, path, *more, text=None, without=()):
    """A tar of the small trio, with more members, another trio.toml, or some left out."""
    models = {}
    for role, content in contents(small).items():
        digest = hashlib.sha256(content).hexdigest()
        models[role] = replace(small.models[role], path=f"{role}.gguf", sha256=digest)
    text = to_toml(replace(small, models=models)) if text is None else text
    with tarfile.open(path, "w") as tar:
        own = {"trio.toml": text.encode()}
        own |= {f"{role}.gguf": content for role, content in contents(small).items()}
        for name in own.keys() - set(without):
            tar.addfile(*member(name, own[name]))
        for info, content in more:
            tar.addfile(info, content)
    return path


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (member("../evil", b"x"), "leads out"),
        (member("a/../../evil", b"x"), "leads out"),
        (member("/tmp/evil", b"x"), "leads out"),
        (member("C:\\evil", b"x"), "leads out"),
        (member("evil", kind=tarfile.SYMTYPE, link="/etc/passwd"), "not a plain file"),
        (member("evil", kind=tarfile.LNKTYPE, link="trio.toml"), "not a plain file"),
        (member("evil", kind=tarfile.CHRTYPE), "not a plain file"),
        (member("evil", kind=tarfile.BLKTYPE), "not a plain file"),
        (member("evil", kind=tarfile.FIFOTYPE), "not a plain file"),
        (member("evil", kind=tarfile.DIRTYPE), "not a plain file"),
        (member("large_ins.gguf", b"x"), "twice"),
        (member("evil", b"x"), "does not name"),
    ],
)
def test_a_tar_with_anything_but_its_files_is_refused(home, small, tmp_path, more, words):
    refused(crafted(small, tmp_path / "x.tar", more), words, home)
    assert not (tmp_path / "evil").exists() and not Path("/tmp/evil").exists()


def test_a_sparse_member_is_refused(home, small, tmp_path):
    info, content = member("evil")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.size": "9", "GNU.sparse.map": "0,9"}
    refused(crafted(small, tmp_path / "x.tar", (info, content)), "not a plain file", home)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("version = 1", "version = 2", "update trimix-gguf"),
        ('name = "small"', 'name = "nano"', "ships in the package"),
        ('name = "small"', 'name = "../small"', "name"),
        ('path = "small_cpt.gguf"', 'path = "../small_cpt.gguf"', "leads out"),
        ('path = "small_cpt.gguf"', 'path = "/etc/passwd"', "leads out"),
        ('path = "small_cpt.gguf"', 'path = "other.gguf"', "ends before other.gguf"),
        ('licence = "CC0"\nsha256', 'licence = "CC0"\nn_bytes = 7\nsha256', "altered"),
        ("[models.small_cpt]", "[models.large_base]", "models.small_cpt is missing"),
    ],
)
def test_a_trio_file_that_asks_for_more_is_refused(home, small, tmp_path, old, new, words):
    whole = crafted(small, tmp_path / "whole.tar")
    with tarfile.open(whole) as tar:
        text = tar.extractfile("trio.toml").read().decode()
    assert old in text
    refused(crafted(small, tmp_path / "x.tar", text=text.replace(old, new, 1)), words, home)
    bare = "\n".join(line for line in text.splitlines() if not line.startswith("sha256"))
    refused(crafted(small, tmp_path / "x.tar", text=bare), "sha256 is missing", home)


def test_what_is_no_bundle_is_refused(home, small, tmp_path, nano_files):
    refused(crafted(small, tmp_path / "x.tar", without=["trio.toml"]), "no trio.toml", home)
    refused(crafted(small, tmp_path / "x.tar", without=["small_cpt.gguf"]), "small_cpt.gguf", home)
    refused(tmp_path / "nowhere.tar", "no such file", home)
    refused(nano_files["small_cpt"], "not a plain tar", home)
    refused(tmp_path, "trio.toml", home)
    (tmp_path / "empty.tar").touch()
    refused(tmp_path / "empty.tar", "not a plain tar", home)


@pytest.mark.skipif(os.name == "nt", reason="signals, limits or pipes as POSIX has them")
def test_links_and_pipes_in_a_folder_are_refused(home, small, tmp_path):
    folder = tmp_path / "x"
    export_trio(small, folder)
    path = folder / "small_cpt.gguf"
    path.rename(tmp_path / "moved")
    refused(folder, "is missing", home)
    path.symlink_to(tmp_path / "moved")
    refused(folder, "is a link", home)
    path.unlink()
    os.mkfifo(path)
    refused(path, "neither a plain file nor a folder", home)
    refused(folder, "not a plain file", home)


def test_a_cut_or_altered_tar_is_refused_or_whole(home, small, tmp_path):
    """Any byte turned, any length: one line and nothing seen, or just the trio it was."""
    whole, x = tmp_path / "whole.tar", tmp_path / "x.tar"
    export_trio(small, whole)
    good, draw = whole.read_bytes(), random.Random(0)
    n_refused = 0
    for i in range(400):
        bad = bytearray(good)
        if i % 4 == 0:
            del bad[draw.randrange(len(good)) :]
        elif i % 4 == 1:  # in a header
            starts = [
                at for at in range(0, len(good), 512) if good[at + 257 : at + 262] == b"ustar"
            ]
            bad[draw.choice(starts) + draw.randrange(512)] = draw.randrange(256)
        else:
            bad[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        x.write_bytes(bad)
        try:
            there = import_trio(x, name="x")
        except TrioFileError as error:
            n_refused += 1
            assert "\n" not in str(error)
            assert store.installed() == [] and not any(home.glob("*"))
        else:
            assert contents(there) == contents(small)
            store.remove("x")
    assert n_refused > 200


def test_an_altered_folder_is_refused(home, small, tmp_path):
    export_trio(small, tmp_path / "x")
    path = tmp_path / "x" / "small_base.gguf"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(tmp_path / "x", f"{path} is not what trio.toml says", home)
    path.write_bytes(content[:-1])
    refused(tmp_path / "x", f"{path} is not what trio.toml says", home)


@pytest.mark.skipif(os.name == "nt", reason="links as POSIX has them")
@pytest.mark.parametrize("target", ["x.tar", "x"])
@pytest.mark.parametrize("way", ["absolute", "dots", "link", "linked folder"])
def test_an_export_takes_nothing_from_outside_the_trios_folder(small, tmp_path, way, target):
    """A stranger's trio file named /etc/passwd as a model, and the export carried it."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("mine")
    (small.folder / "link").symlink_to(secret / "key")
    (small.folder / "linked").symlink_to(secret)
    names = {
        "absolute": str(secret / "key"),
        "dots": "../secret/key",
        "link": "link",
        "linked folder": "linked/key",
    }
    with pytest.raises(TrioFileError, match="models.small_cpt: .* is not in the trio's folder"):
        export_trio(small.with_model("small_cpt", path=names[way]), tmp_path / target)
    assert not (tmp_path / target).exists()


def header(name, size, kind=b"0"):
    """A tar's header with any size field, and the sum that fits it."""
    raw = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    raw[124:136], raw[156:157], raw[148:156] = size, kind, b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


PAX = header("x", b"00000000020\0", b"x")
HOSTILE = {
    "a size below zero": header("trio.toml", b"\xff" * 12),
    "a size beyond all": header("trio.toml", b"\x80" + b"\xff" * 11),
    "a size that is none": header("trio.toml", b"x" * 12),
    "a header for a header": (PAX + b"16 size=1234567\n".ljust(512, b"\0")) * 3,
    "a size of another kind": PAX + b"16 size=-123456\n".ljust(512, b"\0") + header("a", b"0" * 12),
    "a record that is none": PAX + b"99999 x=1\n".ljust(512, b"\0") + header("a", b"0" * 12),
    "a long name": header("././@LongLink", b"00000000005\0", b"L") + bytes(512),
    "a folder as a file": header("trio.toml/", b"00000000000\0"),
    "a wrong sum": header("trio.toml", b"00000000000\0").replace(b"trio", b"rtio"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_tarfile_would_follow_are_refused(home, tmp_path, name):
    (tmp_path / "x.tar").write_bytes(HOSTILE[name] + bytes(1024))
    refused(tmp_path / "x.tar", "x.tar", home)


def test_a_model_of_more_than_eight_gib_is_read(tmp_path):
    """Its size does not fit into a plain header: pax and GNU have ways of their own."""
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        info = tarfile.TarInfo("large.gguf")
        info.size = 9 << 30
        head = info.tobuf(form)
        with open(tmp_path / "x.tar", "wb") as file:
            file.write(head)
            file.truncate(len(head) + info.size + 1024)  # it takes no room
        (found,) = read_members(tmp_path / "x.tar")
        assert (found.name, found.n_bytes, found.offset) == ("large.gguf", 9 << 30, len(head))
