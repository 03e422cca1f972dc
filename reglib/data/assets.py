"""Full data sets by name: from a local mirror, else from a cache, else from the official source.

``assets.json`` lists, for each set, its licence, how to cite it, what its folder holds and where it
comes from; for some sources (a form to sign, files to prepare) that is an instruction to people.
Small weights of the library's own travel with the package: they are ``embedded``.

A checksum in ``assets.json`` is the one that the source or a package registry publishes. Where
none is published, what came is hashed, reported in a warning and noted in ``.fetched.json`` in the
folder of the set, so that two machines can be compared.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fnmatch
import hashlib
import http.client
import json
import lzma
import os
import re
import secrets
import shutil
import ssl
import sys
import tarfile
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import pooch
import torch
from tqdm import tqdm

from reglib import REPOSITORY, __version__
from reglib.data.files import write_bytes
from reglib.data.nifti import Image, write_image

ASSETS: dict[str, dict[str, Any]] = json.loads(
    (resources.files("reglib.data") / "assets.json").read_text(encoding="utf-8")
)

_RECORD = ".fetched.json"
_SECONDS = 30.0  # without a byte from the server
_ATTEMPTS = 5  # while each of them brings something
_CHUNK = 1 << 18
_NETWORK = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError)


def available() -> dict[str, str]:
    """The names that :func:`fetch` knows, each with a line about the set."""
    return {
        name: f"{asset['title']} ({_way(asset)}; {asset['licence']})"
        for name, asset in ASSETS.items()
    }


def _way(asset: dict[str, Any]) -> str:
    """In short, how one gets it."""
    if "embedded" in asset:
        return "part of reglib"
    return "obtained by hand" if "manual" in asset else f"{asset['size'] / 1e6:.2g} MB"


def describe(name: str) -> str:
    """What a set is and holds, its licence, how to cite it, where it comes from.

    Raises:
        ValueError: if there is no set of this name.
    """
    asset = _asset(name)
    keys = ("holds", "licence", "cite", "page", "manual")
    lines = [f"{key.capitalize()}: {asset[key]}" for key in keys if key in asset]
    sources = [f"Source: {url}" for file in asset.get("files", []) for url in file["urls"]]
    return "\n".join([f"{name}: {asset['title']}", *lines, *sources])


def fetch(name: str, *, progress: bool = True, downloads: str | Path | None = None) -> Path:
    """The folder of a data set, downloaded if this machine does not have it yet.

    What travels with the package is there at once. Otherwise looks for ``$REGLIB_DATA/NAME`` (a
    local mirror, used as it is), then for the folder ``NAME`` of the cache (``$REGLIB_CACHE``, else
    the user's cache folder), and only then downloads into the cache. A download that was cut off
    goes on where it stopped. The folder appears whole or not at all, also when several processes
    fetch it at once.

    Args:
        name: one of :func:`available`.
        progress: show a progress bar where the standard error is a terminal.
        downloads: folder with files that were downloaded before; what is missing there comes to
            lie there. ``None`` downloads into the cache and removes the files once they are
            unpacked.

    Returns:
        The folder. It is laid out the same wherever it comes from; a mirror may hold fewer cases.

    Raises:
        ValueError: if there is no set of this name, or a file is not the one it should be.
        FileNotFoundError: if the set must be obtained by hand; the message says how.
        ConnectionError: if no source answers as it should.
        OSError: if the cache cannot be written, or the disk is full.
    """
    asset = _asset(name)
    found = local(name)
    if found is not None:
        return found
    cache = _cache()
    if "manual" in asset:
        raise FileNotFoundError(
            f"{name}: this set is not downloaded for you. {asset['manual']} "
            f"Put the folder {name} into {cache}, or into a folder that REGLIB_DATA names. "
            f"Licence: {asset['licence']}. See {asset['page']}"
        )
    final = cache / name
    folder = cache / "downloads" / name if downloads is None else Path(downloads)
    part = cache / f".{name}.{secrets.token_hex(6)}.part"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f".{name}.lock"):
            if not final.is_dir():
                try:
                    notes = _collect(name, asset, folder, part, progress)
                except ValueError:
                    if downloads is None:  # so that the next call starts afresh
                        shutil.rmtree(folder, ignore_errors=True)
                    raise
                with contextlib.suppress(FileExistsError):
                    _publish(part, final)
                    _report(name, notes, final)
            if downloads is None:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if error.errno is None:  # already says all
            raise
        raise _disk_error(name, cache, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def local(name: str) -> Path | None:
    """The folder of a data set if this machine has it (package, mirror, cache), else ``None``.

    Raises:
        ValueError: if there is no set of this name.
    """
    asset = _asset(name)
    if "embedded" in asset:
        return Path(__file__).parent.parent / asset["embedded"]
    mirror = os.environ.get("REGLIB_DATA")
    if mirror and not Path(mirror).expanduser().is_dir():
        warnings.warn(f"REGLIB_DATA: wanted a folder, got {mirror}: not used", stacklevel=3)
    places = [Path(mirror).expanduser() / name] if mirror else []
    return next((p for p in (*places, _cache() / name) if p.is_dir()), None)


def _asset(name: str) -> dict[str, Any]:
    if name not in ASSETS:
        near = difflib.get_close_matches(str(name).lower(), ASSETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"name: wanted one of {', '.join(ASSETS)}, got {name!r}; {hint}".rstrip("; ")
        )
    return ASSETS[name]


def _cache() -> Path:
    chosen = os.environ.get("REGLIB_CACHE")
    return Path(chosen).expanduser() if chosen else Path(pooch.os_cache("reglib"))


def _disk_error(name: str, cache: Path, error: OSError) -> OSError:
    """The same error with a sentence that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "the disk is full; make room and call fetch again, it goes on where it stopped"
    else:
        advice = f"{error.strerror}; set REGLIB_CACHE to a folder that can be written"
    return OSError(error.errno, f"{name}: {advice}", str(error.filename or cache))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process or thread is here; the system frees what a killed one held."""
    with open(path, "ab") as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError:  # after ten seconds
                    continue
        else:
            import fcntl

            # Some network file systems have no locks; the final rename is atomic there, too.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- From files to a folder -----------------------------------------------------------------


def _collect(
    name: str, asset: dict[str, Any], folder: Path, part: Path, progress: bool
) -> list[dict[str, Any]]:
    """Download what is missing and lay the folder ``part`` out; returns where each file is from."""
    notes, paths = [], []
    for file in asset["files"]:
        path = folder / file["name"]
        url = None if path.is_file() else _download(name, file, path, progress)
        digests = _digests(path)
        _check_digests(path, url, file, digests)
        notes.append(
            {
                "file": file["name"],
                "url": url,
                "bytes": path.stat().st_size,
                "sha256": digests["sha256"],
                "known": bool(file.get("sha256") or file.get("md5")),
            }
        )
        paths.append(path)
    part.mkdir()
    for file, path in zip(asset["files"], paths, strict=True):
        if "members" not in file:
            shutil.copyfile(path, part / file["name"])
            continue
        try:
            _unpack(path, file["members"], part)
        except _DAMAGED as error:
            raise ValueError(f"{path}: wanted a complete archive, got: {error}") from error
    for conversion in asset.get("convert", []):
        _CONVERSIONS[conversion](part)
    write_bytes(part / _RECORD, (json.dumps(notes, indent=1) + "\n").encode())
    return notes


def _publish(part: Path, final: Path) -> None:
    """Give the finished folder its name, unless another process was faster."""
    try:
        os.rename(part, final)
    except OSError as error:
        if final.is_dir():
            raise FileExistsError(str(final)) from error
        raise


def _report(name: str, notes: list[dict[str, Any]], final: Path) -> None:
    """Warn about the files that nothing vouches for."""
    unknown = [note for note in notes if not note["known"]]
    if unknown:
        sums = ", ".join(f"{note['file']} {note['sha256']}" for note in unknown)
        warnings.warn(
            f"{name}: no checksum is published for what came; compare the SHA-256 with that of "
            f"another machine, it is noted in {final / _RECORD}: {sums}",
            stacklevel=3,
        )


def _digests(path: Path) -> dict[str, str]:
    hashes = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            for digest in hashes.values():
                digest.update(chunk)
    return {kind: digest.hexdigest() for kind, digest in hashes.items()}


def _check_digests(
    path: Path, url: str | None, file: dict[str, Any], digests: dict[str, str]
) -> None:
    """Raise ``ValueError`` unless a file is the published one; remove it if it was downloaded."""
    for kind, found in digests.items():
        wanted = file.get(kind)
        if wanted and found != wanted:
            if url is not None:
                path.unlink()
            raise ValueError(
                f"{url or path}: wanted a file with {kind.upper()} {wanted}, got {found}"
                + ("; it was removed: call fetch again, or report it at " if url else "; see ")
                + f"{REPOSITORY}/issues"
            )


# --- Download -------------------------------------------------------------------------------


def _download(name: str, file: dict[str, Any], path: Path, progress: bool) -> str:
    """Download a file from the first address that gives it, which is returned."""
    part, origin = path.with_name(path.name + ".part"), path.with_name(path.name + ".source")
    reasons = []
    for url in file["urls"]:
        for _ in range(_ATTEMPTS):
            before = _size(part)
            try:
                _transfer(url, part, origin, file, progress)
            except urllib.error.HTTPError as error:
                reason = f"the server answers {error.code} {error.reason}"
                if error.code == 416:  # what is here is longer than the file there
                    part.unlink(missing_ok=True)
                    continue
            except _NETWORK as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
                if _size(part) > before:
                    continue
            else:
                os.replace(part, path)
                origin.unlink(missing_ok=True)
                return str(url)
            break
        reasons.append(f"{url} ({reason})")
    raise ConnectionError(
        f"{name}: {file['name']} could not be downloaded from {', nor from '.join(reasons)}; "
        "check the connection and call fetch again, it goes on where it stopped, "
        "or download the file by other means and pass its folder as downloads"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _transfer(url: str, part: Path, origin: Path, file: dict[str, Any], progress: bool) -> None:
    """Append to ``part`` what it lacks of the file at ``url``, or start again where it must be."""
    start, headers = _size(part), {"Accept-Encoding": "identity"}
    headers["User-Agent"] = f"reglib/{__version__} (+{REPOSITORY})"
    known = json.loads(origin.read_bytes()) if origin.exists() else {}
    validator = known.get("validator") if known.get("url") == url else None
    # Two halves of different files would go unnoticed without a checksum or a validator.
    if start and (validator or file.get("sha256") or file.get("md5")):
        headers["Range"] = f"bytes={start}-"
        headers |= {"If-Range": validator} if validator else {}
    with urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=_SECONDS
    ) as response:
        if response.headers.get_content_type() == "text/html" and file["name"][-5:] != ".html":
            raise http.client.HTTPException("a web page came instead of the file")
        goes_on = response.status == 206
        if goes_on and not (response.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
            raise http.client.HTTPException("the server sends another part than the one asked for")
        start = start if goes_on else 0
        tag = response.headers["ETag"] or ""
        validator = tag if tag and not tag.startswith("W/") else response.headers["Last-Modified"]
        write_bytes(origin, json.dumps({"url": url, "validator": validator}).encode())
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None
        with (
            open(part, "ab" if goes_on else "wb") as out,
            tqdm(
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                desc=file["name"],
                disable=None if progress else True,
            ) as bar,
        ):
            while chunk := response.read(_CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(part) != total:
        raise http.client.HTTPException(
            f"the connection was cut after {_size(part)} of {total} bytes"
        )


# --- Archives -------------------------------------------------------------------------------


def _unpack(path: Path, members: dict[str, str], folder: Path) -> None:
    """Take files out of a tar or zip archive, a wheel or a Debian package.

    Args:
        path: the archive.
        members: patterns of the paths in the archive, and the folder below ``folder`` that the
            files go to, without the folders they had.
        folder: where to put them.

    Raises:
        ValueError: if a path leads out of the archive, a file taken is none, or one is missing.
    """
    missing = set(members)
    entries = _zip_entries if path.suffix in (".zip", ".whl") else _tar_entries
    for name, content in entries(path):
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or "\\" in name or ":" in name[:2]:
            raise ValueError(f"{path}: wanted files inside the archive, got the path {name!r}")
        if place.name.startswith("._"):  # what macOS adds
            continue
        for pattern in members:
            if not fnmatch.fnmatchcase(str(place), pattern):
                continue
            if content is None:
                raise ValueError(f"{path}: wanted a file, got a link or a device: {name!r}")
            below = folder / members[pattern]
            below.mkdir(parents=True, exist_ok=True)
            if (below / place.name).exists():
                raise ValueError(f"{path}: wanted one file for each name, got two {place.name!r}")
            with open(below / place.name, "wb") as out:
                shutil.copyfileobj(content, out)
            missing.discard(pattern)
            break
    if missing:
        raise ValueError(f"{path}: wanted {', '.join(sorted(missing))} inside, got none of it")


def _zip_entries(path: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Path and content of everything in a zip archive but its folders."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                with archive.open(info) as content:
                    yield info.filename, content


def _tar_entries(path: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Path and content (``None``: no plain file) of everything in a tar archive but its folders."""
    with open(path, "rb") as file:
        if file.read(8) == b"!<arch>\n":
            _seek_debian_data(file, path)
        else:
            file.seek(0)
        with tarfile.open(fileobj=file, mode="r:*") as archive:
            for info in archive:
                if not info.isdir():
                    yield info.name, archive.extractfile(info) if info.isreg() else None


def _seek_debian_data(file: IO[bytes], path: Path) -> None:
    """Go to the data of a Debian package: an ar archive, each member after 60 bytes of header."""
    while header := file.read(60):
        if header.startswith(b"data.tar"):
            return
        size = int(header[48:58])
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"{path}: wanted a Debian package with data, got none")


# --- From the files of a source to the common layout ----------------------------------------


def _mha_to_nifti(folder: Path) -> None:
    """Replace MetaImage files (``.mha``, in LPS) by NIfTI files of the same voxels and places."""
    types = {"MET_SHORT": "<i2", "MET_UCHAR": "<u1", "MET_FLOAT": "<f4"}
    for path in sorted(folder.glob("*.mha")):
        content = path.read_bytes()
        text, _, rest = content.partition(b"ElementDataFile = LOCAL\n")
        header = dict(line.split(" = ", 1) for line in text.decode("ascii").splitlines())
        raw = zlib.decompress(rest) if header.get("CompressedData") == "True" else rest
        shape = tuple(map(int, header["DimSize"].split()))
        values = np.frombuffer(raw, types[header["ElementType"]]).reshape(shape, order="F")
        axes = np.array(header["TransformMatrix"].split(), float).reshape(3, 3)
        affine = np.eye(4)
        affine[:3, :3] = (np.array(header["ElementSpacing"].split(), float)[:, None] * axes).T
        affine[:3, 3] = np.array(header["Offset"].split(), float)
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        image = Image(torch.tensor(np.ascontiguousarray(values))[None, None], torch.tensor(affine))
        write_image(path.with_suffix(".nii.gz"), image)
        path.unlink()


def _sentinel2_to_npz(folder: Path) -> None:
    """Replace ``S2_10m.json``, nested lists of four bands, by arrays."""
    path = folder / "S2_10m.json"
    bands = np.array(["B02_blue", "B03_green", "B04_red", "B08_nir"])
    data = np.array(json.loads(path.read_text()), np.uint16)
    np.savez_compressed(folder / "sentinel2_300x300.npz", data=data, bands=bands)
    path.unlink()


def _fair_landmarks_to_csv(folder: Path) -> None:
    """Replace ``setup2DhandData.m`` by the seven pairs of points that it lists."""
    path = folder / "setup2DhandData.m"
    table = re.search(r"LM\s*=\s*\[(.*?)\]", path.read_text(encoding="utf-8"), re.DOTALL)
    if table is None:
        raise ValueError(f"{path}: wanted a list of landmarks, got none")
    rows = [",".join(line.split()) for line in table[1].splitlines() if line.strip()]
    (folder / "hands_landmarks.csv").write_text("\n".join(["x_T,y_T,x_R,y_R", *rows]) + "\n")
    path.unlink()


_CONVERSIONS = {
    "mha_to_nifti": _mha_to_nifti,
    "sentinel2_to_npz": _sentinel2_to_npz,
    "fair_landmarks_to_csv": _fair_landmarks_to_csv,
}
