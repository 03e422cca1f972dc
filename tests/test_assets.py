"""Data sets come whole and unaltered, once, from the nearest place; all else is an error.

The sources are files of a server of our own, on this machine; no test reaches another.
"""

import errno
import hashlib
import io
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import SimpleITK as sitk

import reglib
from reglib.data import assets
from reglib.data.assets import available, describe, fetch, local
from reglib.data.nifti import read_image

CONTENT = np.random.default_rng(0).bytes(300_000)


class Source(BaseHTTPRequestHandler):
    """Serves ``server.files``; goes on in the middle if asked to, and fails on demand."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        plan = server.plans.get(self.path, {})
        content = server.files.get(self.path)
        status = plan.get("status") or (404 if content is None else 200)
        if status != 200:
            self.send_error(status)
            return
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start, end = 0, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not plan.get("no_range") and self.headers.get("If-Range", tag) == tag:
            start = int(asked[1])
            if start >= end:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", plan.get("type", "application/octet-stream"))
        if not plan.get("no_length"):
            self.send_header("Content-Length", str(end - start))
        if not plan.get("no_tag"):
            self.send_header("ETag", tag)
        self.end_headers()
        if plan.get("cuts", 0) > 0:
            plan["cuts"] -= 1
            self.wfile.write(content[start : start + plan["after"]])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def source():
    """A server; ``files`` by path, ``plans`` for failures, ``requests`` so far."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Source)
    server.files, server.plans, server.requests = {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no mirror, no proxy."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("REGLIB_CACHE", str(folder))
    monkeypatch.delenv("REGLIB_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    return folder


@pytest.fixture
def offer(source, cache, monkeypatch):
    """Offer contents under a name; members, checksums and further keys as in assets.json."""

    def add(name="brains", files=None, **keys):
        entries = []
        for file, content in (files or {"brain.bin": CONTENT}).items():
            source.files[f"/{file}"] = content
            entry = {
                "name": file,
                "urls": [f"{source.url}/{file}"],
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            entries.append(entry | keys)
        asset = {"title": "Brains", "holds": "one", "size": 3e5, "licence": "CC0", "cite": "me"}
        asset |= {"page": "https://example.org", "files": entries}
        monkeypatch.setitem(assets.ASSETS, name, asset)
        return asset

    return add


def names_in(folder):
    """Everything below a folder but the lock, which stays empty."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    return {name for name in found if not name.endswith(".lock")}


def tar(files, mode="w"):
    """A tar archive; a content that is text is the target of a symbolic link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                archive.addfile(entry)
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def debian(files):
    """A Debian package: an ar archive with a member of odd size before the data."""
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        "data.tar.xz": tar(files, "w:xz"),
    }
    package = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        package += header.encode() + content + b"\n" * (len(content) % 2)
    return package


# --- What is in assets.json -----------------------------------------------------------------


def test_every_set_says_what_it_is_and_where_it_comes_from():
    """Either addresses or instructions; checksums have the length of one; nothing is plain http."""
    for name, asset in assets.ASSETS.items():
        assert all(asset[key] for key in ("title", "holds", "licence", "cite", "page")), name
        assert sum(way in asset for way in ("files", "manual", "embedded")) == 1, name
        assert asset["size"] is None or asset["size"] > 1e4, name
        for file in asset.get("files", []):
            assert asset["size"], name
            assert file["urls"], name
            for url in file["urls"]:
                assert urlsplit(url).scheme == "https", url
            assert re.fullmatch("[0-9a-f]{64}", file["sha256"] or "0" * 64), file
            assert re.fullmatch("[0-9a-f]{32}", file.get("md5", "0" * 32)), file
            assert Path(file["name"]).name == file["name"], file
        assert set(asset.get("convert", [])) <= set(assets._CONVERSIONS), name


def test_names_of_files_are_unique_within_a_set():
    for name, asset in assets.ASSETS.items():
        files = [file["name"] for file in asset.get("files", [])]
        assert len(files) == len(set(files)), name


def test_the_list_has_a_line_for_each_set():
    lines = available()
    assert list(lines) == list(assets.ASSETS)
    assert all("\n" not in line and "(" in line for line in lines.values())
    assert lines["mnist"] == "MNIST, handwritten digits (12 MB; CC BY-SA 3.0)"
    assert "obtained by hand" in lines["lgg"]
    assert "(part of reglib; Apache-2.0" in lines["random-shapes-tiny"]


def test_a_description_has_licence_citation_and_source():
    text = describe("hippocampus")
    for part in ("CC BY-SA 4.0", "Antonelli", "labelsTr", "Source: https://msd-for-monai"):
        assert part in text
    assert "Manual: Sign in" in describe("lgg")


def test_layouts_are_those_of_a_mirror(monkeypatch):
    """With a mirror at hand: each of its folders is a set, and is what fetch gives."""
    mirror = os.environ.get("REGLIB_DATA")
    if mirror:
        for folder in filter(Path.is_dir, Path(mirror).iterdir()):
            assert fetch(folder.name) == folder


# --- Where a set is found -------------------------------------------------------------------


def test_what_travels_with_the_package_is_found_without_any_cache(monkeypatch, tmp_path):
    """Also where a mirror has a folder of that name: weights belong to their version of reglib."""
    monkeypatch.setenv("REGLIB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("REGLIB_DATA", str(tmp_path))
    (tmp_path / "random-shapes-tiny").mkdir()
    folder = reglib.fetch("random-shapes-tiny")
    assert folder == local("random-shapes-tiny")
    assert {path.name for path in folder.iterdir()} == {"README.md", "encoder.safetensors"}
    assert not (tmp_path / "none").exists()


def test_a_download_is_unaltered_and_noted(offer, source, cache):
    offer()
    folder = fetch("brains")
    assert folder == cache / "brains" == local("brains")
    assert (folder / "brain.bin").read_bytes() == CONTENT
    assert names_in(cache) == {"brains/brain.bin", "brains/.fetched.json"}
    (note,) = json.loads((folder / ".fetched.json").read_text())
    assert note["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert note["bytes"] == len(CONTENT)
    assert note["url"] == f"{source.url}/brain.bin"


def test_a_cached_set_makes_no_request(offer, source):
    offer()
    fetch("brains")
    source.requests.clear()
    fetch("brains")
    assert source.requests == []


def test_a_mirror_wins_over_the_cache(offer, source, cache, tmp_path, monkeypatch):
    offer()
    fetch("brains")
    source.requests.clear()
    mirror = tmp_path / "mirror" / "brains"
    mirror.mkdir(parents=True)
    monkeypatch.setenv("REGLIB_DATA", str(mirror.parent))
    assert fetch("brains") == local("brains") == mirror
    assert source.requests == []
    mirror.rmdir()
    assert fetch("brains") == cache / "brains"


def test_an_empty_mirror_variable_is_none(offer, cache, tmp_path, monkeypatch):
    """Not the working directory, which may have a folder of this name."""
    offer()
    (tmp_path / "brains").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGLIB_DATA", "")
    assert fetch("brains") == cache / "brains"


def test_a_mirror_that_is_none_is_named(offer, cache, tmp_path, monkeypatch):
    offer()
    monkeypatch.setenv("REGLIB_DATA", str(tmp_path / "typo"))
    with pytest.warns(UserWarning, match=r"REGLIB_DATA: wanted a folder, got .*typo"):
        assert fetch("brains") == cache / "brains"


def test_the_cache_is_the_users_own_without_the_variable(monkeypatch):
    monkeypatch.delenv("REGLIB_CACHE", raising=False)
    assert assets._cache().name == "reglib"
    monkeypatch.setenv("REGLIB_CACHE", "~/somewhere")
    assert assets._cache() == Path.home() / "somewhere"


def test_downloads_at_hand_are_used_and_kept(offer, source, tmp_path):
    """As on a machine without network; what is missing comes to lie there, too."""
    offer(files={"a.bin": b"alpha", "b.bin": b"beta"})
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"alpha")
    result = fetch("brains", downloads=folder)
    assert [path for path, _ in source.requests] == ["/b.bin"]
    assert names_in(folder) == {"a.bin", "b.bin"}
    assert (result / "a.bin").read_bytes() == b"alpha"
    assert [note["url"] is None for note in json.loads((result / ".fetched.json").read_text())] == [
        True,
        False,
    ]


def test_a_wrong_file_among_the_downloads_is_named_and_kept(offer, cache, tmp_path):
    offer()
    (tmp_path / "brain.bin").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"brain\.bin: wanted a file with SHA256 .*, got "):
        fetch("brains", downloads=tmp_path)
    assert (tmp_path / "brain.bin").read_bytes() == b"something else"
    assert names_in(cache) == set()


# --- Interruptions --------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [1, 3])
def test_a_cut_connection_is_resumed_at_once(offer, source, cuts):
    """Each request asks for what is missing, so that all bytes travel once."""
    offer()
    source.plans["/brain.bin"] = {"cuts": cuts, "after": 70_000}
    assert (fetch("brains") / "brain.bin").read_bytes() == CONTENT
    ranges = [headers.get("Range") for _, headers in source.requests]
    assert ranges == [None, *(f"bytes={70_000 * (i + 1)}-" for i in range(cuts))]


def test_a_later_call_goes_on_where_an_earlier_one_stopped(offer, source, cache):
    offer()
    source.plans["/brain.bin"] = {"cuts": 99, "after": 30_000}
    with pytest.raises(ConnectionError, match=r"cut after 150000 of 300000 bytes.*goes on where"):
        fetch("brains")
    assert not (cache / "brains").exists()
    source.plans.clear()
    source.requests.clear()
    assert (fetch("brains") / "brain.bin").read_bytes() == CONTENT
    ((_, headers),) = source.requests
    assert headers["Range"] == "bytes=150000-"
    assert names_in(cache) == {"brains/brain.bin", "brains/.fetched.json"}


@pytest.mark.parametrize(
    "plan", [{"no_range": True}, {"no_tag": True}, {"no_length": True}], ids=str
)
def test_servers_that_can_do_less_serve_as_well(offer, source, plan):
    """One that always sends everything, one that names no version, one that tells no length."""
    offer()
    cut = {} if "no_length" in plan else {"cuts": 1, "after": 70_000}
    source.plans["/brain.bin"] = plan | cut
    assert (fetch("brains") / "brain.bin").read_bytes() == CONTENT


@pytest.mark.filterwarnings("ignore:brains. no checksum")
@pytest.mark.parametrize("no_tag", [False, True])
def test_halves_of_two_versions_are_never_joined(offer, source, no_tag):
    """Without a checksum only the server can tell: by its tag, else all is downloaded again."""
    asset = offer()
    asset["files"][0]["sha256"] = None
    source.plans["/brain.bin"] = {"cuts": 99, "after": 30_000, "no_tag": no_tag}
    with pytest.raises(ConnectionError):
        fetch("brains")
    source.plans["/brain.bin"] = {"no_tag": no_tag}
    source.files["/brain.bin"] = CONTENT[::-1]
    assert (fetch("brains") / "brain.bin").read_bytes() == CONTENT[::-1]


def test_a_part_longer_than_the_file_is_dropped(offer, source, cache):
    offer()
    folder = cache / "downloads" / "brains"
    folder.mkdir(parents=True)
    (folder / "brain.bin.part").write_bytes(CONTENT + b"more")
    assert (fetch("brains") / "brain.bin").read_bytes() == CONTENT


def test_an_interrupt_keeps_what_came(offer, source, cache, monkeypatch):
    offer()
    folder = cache / "downloads" / "brains"

    class Stop:
        def __init__(self, *arguments, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            pass

        def update(self, count):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "tqdm", Stop)
        with pytest.raises(KeyboardInterrupt):
            fetch("brains")
    size = (folder / "brain.bin.part").stat().st_size
    assert 0 < size < len(CONTENT)
    source.requests.clear()
    fetch("brains")
    assert source.requests[0][1]["Range"] == f"bytes={size}-"


# --- What must not be -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_wrong_checksum_leaves_nothing(offer, cache, kind):
    asset = offer()
    wanted = {"sha256": "0" * 64, "md5": "0" * 32}[kind]
    asset["files"][0] |= {"sha256": None} | {kind: wanted}
    with pytest.raises(ValueError, match=rf"brain\.bin: wanted a file with {kind.upper()} 0000"):
        fetch("brains")
    assert names_in(cache) == set()
    assert local("brains") is None


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_a_server_error_names_the_address_and_the_way_on(offer, source, cache, status):
    offer()
    source.plans["/brain.bin"] = {"status": status}
    with pytest.raises(ConnectionError) as caught:
        fetch("brains")
    message = str(caught.value)
    assert message.count(f"{source.url}/brain.bin (the server answers {status}") == 1
    assert "call fetch again" in message
    assert names_in(cache) == set()
    assert len(source.requests) == 1


def test_the_next_address_is_tried(offer, source):
    asset = offer()
    asset["files"][0]["urls"].insert(0, f"{source.url}/gone.bin")
    assert (fetch("brains") / "brain.bin").read_bytes() == CONTENT
    assert [path for path, _ in source.requests] == ["/gone.bin", "/brain.bin"]


def test_an_unreachable_server_is_named(offer):
    asset = offer()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asset["files"][0]["urls"] = [f"http://127.0.0.1:{port}/brain.bin"]
    with pytest.raises(
        ConnectionError, match=rf"http://127\.0\.0\.1:{port}/brain\.bin \(.*refused"
    ):
        fetch("brains")


def test_a_login_page_is_no_file(offer, source, cache):
    asset = offer()
    asset["files"][0]["sha256"] = None
    source.plans["/brain.bin"] = {"type": "text/html; charset=utf-8"}
    with pytest.raises(ConnectionError, match="a web page came instead of the file"):
        fetch("brains")
    assert names_in(cache) == set()


def test_without_a_published_checksum_the_found_one_is_reported(offer, cache):
    asset = offer()
    asset["files"][0]["sha256"] = None
    found = hashlib.sha256(CONTENT).hexdigest()
    with pytest.warns(UserWarning, match=rf"no checksum is published.*brain\.bin {found}"):
        folder = fetch("brains")
    assert json.loads((folder / ".fetched.json").read_text())[0]["sha256"] == found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fetch("brains")


def test_simultaneous_fetches_download_once(offer, source):
    offer(files={"a.bin": CONTENT, "b.zip": zipped({"in/b": b"beta"})}, members={"in/b": "out"})
    del assets.ASSETS["brains"]["files"][0]["members"]
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: fetch("brains"), range(8)))
    assert len(set(folders)) == 1
    assert (folders[0] / "a.bin").read_bytes() == CONTENT
    assert (folders[0] / "out" / "b").read_bytes() == b"beta"
    assert sorted(path for path, _ in source.requests) == ["/a.bin", "/b.zip"]


def test_where_no_lock_is_to_be_had_the_result_is_whole(offer, source, monkeypatch):
    """As on some network file systems: one of them wins, and the checksum guards the content."""

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    offer()
    assert (fetch("brains") / "brain.bin").read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written_is_named(offer, tmp_path, monkeypatch):
    """A file stands where the folder should be: not even root can write into that."""
    offer()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("REGLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"brains: .*set REGLIB_CACHE to a folder.*file") as caught:
        fetch("brains")
    assert caught.value.errno == errno.ENOTDIR


def test_a_full_disk_is_named_and_what_came_is_kept(offer, cache, monkeypatch):
    offer()
    real = open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            self.file.close()

        def write(self, chunk):
            self.file.write(chunk[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    def opener(path, mode="r", *arguments, **options):
        file = real(path, mode, *arguments, **options)
        return Full(file) if str(path).endswith("brain.bin.part") else file

    with monkeypatch.context() as patch:
        patch.setattr(assets, "open", opener, raising=False)
        with pytest.raises(OSError, match="brains: the disk is full; make room and call") as caught:
            fetch("brains")
    assert caught.value.errno == errno.ENOSPC
    assert (cache / "downloads" / "brains" / "brain.bin.part").stat().st_size == 1000
    assert (fetch("brains") / "brain.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("hipocampus", "'hippocampus'"),
        ("IXI", "'ixi_2mm'"),
        ("mnsit", "'mnist'"),
        ("lung", "'lung_ct'"),
    ],
)
def test_an_unknown_name_suggests_near_ones(name, near):
    for function in (fetch, describe, local):
        with pytest.raises(
            ValueError, match=rf"name: wanted one of mnist, .*did you mean .*{near}"
        ):
            function(name)


def test_a_name_like_no_other_lists_them_all():
    with pytest.raises(ValueError, match=r"wanted one of mnist, .*, got '../../etc'$"):
        fetch("../../etc")


def test_a_set_to_be_obtained_by_hand_says_how(cache):
    """And is found once it was."""
    with pytest.raises(FileNotFoundError) as caught:
        fetch("lgg")
    for part in ("Sign in at the page", "kaggle.com", "CC BY-NC-SA", str(cache), "REGLIB_DATA"):
        assert part in str(caught.value)
    (cache / "lgg").mkdir(parents=True)
    assert fetch("lgg") == cache / "lgg"


def test_progress_is_silent_when_not_at_a_terminal(offer, capfd):
    offer()
    fetch("brains", progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [True, False])
def test_progress_can_be_seen_at_a_terminal(offer, capsys, monkeypatch, progress):
    offer()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    fetch("brains", progress=progress)
    assert ("brain.bin" in capsys.readouterr().err) == progress


# --- Archives -------------------------------------------------------------------------------

PACKED = {
    "./top/images/a.nii": b"alpha",
    "./top/images/._a.nii": b"what macOS adds",
    "./top/labels/a.nii": b"beta",
    "./top/readme": b"not wanted",
}
MEMBERS = {"top/images/*": "images", "top/labels/*.nii": ""}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("set.tar", tar(PACKED)),
        ("set.tar.gz", tar(PACKED, "w:gz")),
        ("set.tar.xz", tar(PACKED, "w:xz")),
        ("set.zip", zipped({name[2:]: content for name, content in PACKED.items()})),
        ("set.whl", zipped({name[2:]: content for name, content in PACKED.items()})),
        ("set.deb", debian(PACKED)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_archives_of_every_kind_give_the_members_wanted(offer, cache, file, content):
    offer(files={file: content}, members=MEMBERS)
    folder = fetch("brains")
    assert names_in(folder) == {"images/a.nii", "a.nii", ".fetched.json"}
    assert (folder / "images" / "a.nii").read_bytes() == b"alpha"
    assert (folder / "a.nii").read_bytes() == b"beta"
    mode = (folder / "a.nii").stat().st_mode
    assert mode & (stat.S_IXUSR | stat.S_ISUID) == 0


@pytest.mark.parametrize("path", ["../a.nii", "top/images/../../../a.nii", "/top/images/a.nii"])
@pytest.mark.parametrize("pack", [tar, zipped, debian])
def test_an_archive_that_reaches_outside_is_refused(offer, cache, tmp_path, path, pack):
    """With a right checksum, too: nothing of it is kept."""
    suffix = {tar: "tar", zipped: "zip", debian: "deb"}[pack]
    content = pack({"top/images/b.nii": b"good", path: b"evil"})
    offer(files={f"set.{suffix}": content}, members={"*": "x"})
    with pytest.raises(ValueError, match="wanted files inside the archive, got the path"):
        fetch("brains")
    assert not list(tmp_path.rglob("*.nii"))
    assert local("brains") is None


@pytest.mark.parametrize("path", ["C:\\a.nii", "..\\a.nii", "C:/a.nii"])
def test_paths_of_windows_are_refused(offer, path):
    offer(files={"set.zip": zipped({path: b"evil"})}, members={"*": ""})
    with pytest.raises(ValueError, match="wanted files inside the archive"):
        fetch("brains")


def test_links_are_followed_by_nobody(offer, cache):
    offer(files={"set.tar": tar({"top/images/a.nii": "/etc/passwd"})}, members=MEMBERS)
    with pytest.raises(ValueError, match="wanted a file, got a link or a device"):
        fetch("brains")
    assert local("brains") is None


def test_two_members_of_one_name_do_not_replace_each_other(offer):
    offer(files={"set.tar": tar({"a/x": b"1", "b/x": b"2"})}, members={"?/x": ""})
    with pytest.raises(ValueError, match=r"set\.tar: wanted one file for each name, got two 'x'"):
        fetch("brains")


def test_an_archive_without_the_member_wanted_is_named(offer):
    offer(files={"set.tar": tar(PACKED)}, members=MEMBERS | {"top/masks/*": ""})
    with pytest.raises(ValueError, match=r"set\.tar: wanted top/masks/\* inside, got none of it"):
        fetch("brains")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("set.tar", b"not an archive" * 100),
        ("set.tar.gz", tar(PACKED, "w:gz")[:-30]),
        ("set.tar.xz", tar(PACKED, "w:xz")[:-150]),
        ("set.zip", zipped(PACKED)[:-30]),
        ("set.deb", debian(PACKED)[:-150]),
        ("set.deb", b"!<arch>\n"),
    ],
)
def test_a_damaged_archive_is_named_and_not_kept(offer, cache, file, content):
    offer(files={file: content}, members=MEMBERS)
    with pytest.raises(ValueError, match=rf"{file}: wanted (a complete archive|a Debian package)"):
        fetch("brains")
    assert local("brains") is None
    assert names_in(cache) == set()


# --- Conversions ----------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_metaimages_become_nifti_files_in_the_same_place(offer, tmp_path, compress, dtype):
    """ITK writes an oblique image and says where its voxels are."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 200, (5, 4, 3)).astype(dtype)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((1.5, 0.5, 2.5))
    image.SetOrigin((-7.0, 3.0, 11.0))
    a, b = 0.3, -0.4
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    image.SetDirection(turn.flatten().tolist())
    path = tmp_path / "scan.mha"
    sitk.WriteImage(image, str(path), compress)
    asset = offer(files={"scan.mha": path.read_bytes()})
    asset["convert"] = ["mha_to_nifti"]
    folder = fetch("brains")
    assert names_in(folder) == {"scan.nii.gz", ".fetched.json"}
    found = read_image(folder / "scan.nii.gz", dtype=None)
    np.testing.assert_array_equal(found.tensor[0, 0], values.transpose())
    for index in ((0, 0, 0), (2, 3, 4), (1, 0, 3)):
        world = found.affine.numpy() @ [*index, 1]
        point = np.array(image.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        np.testing.assert_allclose(world[:3], point, atol=1e-4)


def test_sentinel2_becomes_arrays(offer):
    values = np.arange(4 * 3 * 2).reshape(4, 3, 2)
    asset = offer(files={"S2_10m.json": json.dumps(values.tolist()).encode()})
    asset["convert"] = ["sentinel2_to_npz"]
    folder = fetch("brains")
    assert names_in(folder) == {"sentinel2_300x300.npz", ".fetched.json"}
    with np.load(folder / "sentinel2_300x300.npz") as arrays:
        np.testing.assert_array_equal(arrays["data"], values)
        assert arrays["data"].dtype == np.uint16
        assert arrays["bands"].tolist() == ["B02_blue", "B03_green", "B04_red", "B08_nir"]


def test_landmarks_become_a_table(offer):
    script = b"% a comment\nLM    = [\n  5.5   17.25  2 12.5\n  10   21  7   19\n  ];\nmore"
    asset = offer(files={"setup2DhandData.m": script})
    asset["convert"] = ["fair_landmarks_to_csv"]
    table = (fetch("brains") / "hands_landmarks.csv").read_text()
    assert table == "x_T,y_T,x_R,y_R\n5.5,17.25,2,12.5\n10,21,7,19\n"
    asset = offer("others", files={"setup2DhandData.m": b"nothing"})
    asset["convert"] = ["fair_landmarks_to_csv"]
    with pytest.raises(ValueError, match="wanted a list of landmarks, got none"):
        fetch("others")


def test_fetch_is_found_where_the_data_are_and_loads_nothing_before():
    """A GPU job that imports the library's training has no nibabel beside it."""
    lines = (
        "import sys, reglib.training, reglib.data",
        "assert not {'nibabel', 'pooch'} & set(sys.modules)",
        "from reglib.data import assets, fetch",
        "assert fetch is assets.fetch",
    )
    subprocess.run([sys.executable, "-c", "; ".join(lines)], check=True)
