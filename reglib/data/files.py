"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file so that nobody ever sees half of it.

    The content goes into a hidden temporary file of the same folder, which then takes the name.
    Whatever happens before (a full disk, an interrupt), the temporary file is removed and a file
    that had the name stays as it was. A symbolic link stays one: its target is replaced.

    Args:
        path: the file; its folder must exist.
        content: all of it.

    Raises:
        OSError: naming ``path``, if the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{secrets.token_hex(6)}.part")
    try:
        # Not tempfile: its files are private, whatever the user's umask allows.
        with open(part, "xb") as file:
            file.write(content)
        os.replace(part, target)
    except OSError as error:
        # The message would name the temporary file, which means nothing to the reader.
        raise OSError(error.errno, f"{error.strerror}, nothing was written", str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # mostly it is no longer there, or never was
            part.unlink()
