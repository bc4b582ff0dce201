"""A folder that keeps golden's outputs and error scales, so that a case is modelled once.

Most of a verdict is running golden again and again, and nothing of that depends on the subject. A
file's name is the SHA-256 of all that its numbers depend on (`conformance.cache_key`), so it is
never stale: a changed case, profile or line of code has another name. Files are written beside
their place and moved there, which is one step for any reader; processes that write the same file
write the same bytes. A file that cannot be read or is not what it should be counts as absent, with
a warning. When the folder outgrows its limit, the files go that were longest not used.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from conformance.cache_folder import FOLDER_VARIABLE, MEGABYTES
from conformance.cache_key import content_key
from conformance.cases import Case
from conformance.error_model import ErrorScale, Outputs
from conformance.errors import UsageError
from conformance.precision import PrecisionProfile
from conformance.scale_file import (
    pack_outputs,
    pack_scales,
    unpack_outputs,
    unpack_scales,
)

_WORTH = 0.05
"""Seconds of work from which on a value is kept: reading a file back takes a few milliseconds."""
_SUFFIX = ".scale"
_UNFINISHED = ".unfinished-"
_ABANDONED = 60.0
"""Seconds after which an unfinished file has nobody who writes it: it is filled in one call and
moved at once, and its time is that of the last byte. Were it missed, its writer would only warn."""

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class ScaleCache:
    """Golden's outputs and error scales, kept in a folder.

    Attributes:
        folder: where files go; made when the first is written.
        megabytes: what all files together may take.
        worth: seconds of work from which on a value is kept.
    """

    folder: Path
    megabytes: int = MEGABYTES
    worth: float = _WORTH

    def __post_init__(self) -> None:
        if self.megabytes < 1:
            raise UsageError(f"megabytes must be positive, got {self.megabytes}")
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"the cache's folder must be a directory, got {self.folder}")

    def outputs(self, case: Case, inputs: Any, compute: Callable[[], Outputs]) -> Outputs:
        """Return golden's outputs on a case's inputs, computed unless they are kept."""
        return self._kept(
            lambda: content_key("outputs", case, inputs), unpack_outputs, pack_outputs, compute
        )

    def scales(
        self,
        case: Case,
        inputs: Any,
        profile: PrecisionProfile,
        runs: int,
        compute: Callable[[], Mapping[str, ErrorScale]],
    ) -> Mapping[str, ErrorScale]:
        """Return the error scales of a case from so many runs, computed unless they are kept."""
        return self._kept(
            lambda: content_key("scales", case, inputs, profile, runs),
            unpack_scales,
            pack_scales,
            compute,
        )

    def files(self) -> list[tuple[Path, os.stat_result]]:
        """Return the files kept, the one longest not used first."""
        found = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError):  # another process may have removed it
                found.append((path, path.stat()))
        return sorted(found, key=lambda one: one[1].st_mtime)

    def clear(self) -> int:
        """Remove all files kept and what writers that died have left, and return their number."""
        paths = [path for path, _ in self.files()] + self._abandoned()
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def _kept(
        self,
        name: Callable[[], str],
        unpack: Callable[[str, bytes], Any],
        pack: Callable[[str, Any], bytes],
        compute: Callable[[], Found],
    ) -> Found:
        try:
            key = name()
        except TypeError:  # inputs that are not plain data
            return compute()
        path = self.folder / f"{key}{_SUFFIX}"
        try:
            found: Found = unpack(key, path.read_bytes())
            with contextlib.suppress(OSError):  # a folder that only others may write to
                os.utime(path)
            return found
        except (FileNotFoundError, NotADirectoryError):
            pass
        except Exception as error:  # whatever is wrong with a file, its numbers can be had without
            warnings.warn(f"cached file {path} is not used: {error}", RuntimeWarning, stacklevel=3)
        started = time.perf_counter()
        value = compute()
        if time.perf_counter() - started >= self.worth:
            self._write(path, pack(key, value))
        return value

    def _write(self, path: Path, data: bytes) -> None:
        if len(data) > self.megabytes << 20:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=_UNFINISHED, dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
            self._trim()
        except OSError as error:
            warnings.warn(f"{path} cannot be kept: {error}", RuntimeWarning, stacklevel=4)

    def _trim(self) -> None:
        """Remove files longest not used until all fit, and what writers that died have left."""
        files = self.files()
        total = sum(about.st_size for _, about in files)
        for path, about in files:
            if total <= self.megabytes << 20:
                break
            path.unlink(missing_ok=True)
            total -= about.st_size
        for path in self._abandoned():
            with contextlib.suppress(OSError):  # somebody else's
                path.unlink()

    def _abandoned(self) -> list[Path]:
        """Return unfinished files that nobody writes any more."""
        found = []
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            with contextlib.suppress(OSError):  # its writer may have moved it
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    found.append(path)
        return found


def cache_in(folder: str | None, megabytes: int = MEGABYTES) -> ScaleCache | None:
    """Return the cache in a folder, or in the one the environment names; None without any.

    Args:
        folder: None or empty takes `ATTN_CONFORMANCE_CACHE`.
        megabytes: what its files may take.

    Raises:
        UsageError: `megabytes` is not positive, with or without a folder; or a file is there.
    """
    named = folder or os.environ.get(FOLDER_VARIABLE, "")
    found = ScaleCache(Path(named), megabytes)
    return found if named else None
