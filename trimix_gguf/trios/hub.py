"""The Hugging Face hub: what a repository holds, and its files, fetched whole or not at all.

Client, token and errors are huggingface_hub's. Its downloads are not: after a kill they begin
anew, and they compare a file's size but not its hash (2.4, _download_to_tmp_and_move). Here a
commit and a hash are known before the first byte, so that what is there already can be gone on
from by Range alone, and the hash of the whole decides; an ETag could add nothing to that.
"""

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from trimix_gguf.errors import HubError
from trimix_gguf.machine.files import ByteProgress, advancing, put_in_place
from trimix_gguf.machine.hashes import sha256_of

Notify = Callable[[str], None]  # a line for the person who waits

N_TRIES = 5  # without a new byte between them
PAUSES = (0.2, 1.0, 2.0, 4.0)  # seconds, where the hub names none
LONGEST_PAUSE = 600.0  # seconds that the hub may ask for


@dataclass(frozen=True)
class RemoteFile:
    """A file at one commit. `digest` is hexadecimal: SHA-256 in LFS, else git's SHA-1 of it."""

    repo: str
    commit: str
    name: str  # with '/'
    n_bytes: int
    digest: str
    lfs: bool


@dataclass(frozen=True)
class Repository:
    """A repository at one commit; `n_weights` by dtype, where the hub has counted them."""

    repo: str
    commit: str
    files: dict[str, RemoteFile]
    licence: str | None
    gated: bool
    n_weights: dict[str, int]

    def file(self, name: str) -> RemoteFile:
        """The file of that name; raises HubError with the nearest ones."""
        if name not in self.files:
            near = get_close_matches(name, self.files, 3, cutoff=0.5)
            raise HubError(
                f"{self.repo} has no file {name!r} at {self.commit[:12]}; "
                f"it has {', '.join(near or sorted(self.files)[:8]) or 'none'}"
            )
        return self.files[name]


def read_repository(
    repo: str, revision: str = "main", *, notify: Notify = lambda text: None
) -> Repository:
    """Ask the hub for a model repository's commit, files, sizes and hashes; raises HubError."""
    from huggingface_hub import HfApi, constants

    subject = f"{repo} at {revision}" if revision != "main" else repo
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    ask = partial(HfApi().model_info, repo, revision=revision, files_metadata=True, timeout=timeout)
    try:
        info = _Patience(subject, repo, notify).answer_to(ask, away=False)
    except (ValueError, KeyError, TypeError):
        raise HubError(
            f"{subject}: what answers is not the hub (no JSON came); "
            "if this network has a login page, open it in a browser first"
        ) from None
    if not info.sha:
        raise HubError(f"{subject}: the hub names no commit; set revision to one")
    weights = getattr(info, "safetensors", None)
    return Repository(
        repo=repo,
        commit=info.sha,
        files={s.rfilename: _remote_file(repo, info.sha, s) for s in info.siblings or ()},
        licence=getattr(info.card_data, "license", None) if info.card_data else None,
        gated=bool(info.gated),
        n_weights=dict(weights.parameters) if weights else {},
    )


def _remote_file(repo: str, commit: str, sibling: Any) -> RemoteFile:
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if sibling.size is None or digest is None:
        raise HubError(
            f"{repo}: the hub says neither size nor hash of {sibling.rfilename}; "
            "HF_ENDPOINT may name a mirror that leaves them out: unset it"
        )
    name, lfs = sibling.rfilename, bool(sibling.lfs)
    return RemoteFile(repo, commit, name, sibling.size, digest, lfs)


def check_access(file: RemoteFile, *, notify: Notify = lambda text: None) -> None:
    """Raise HubError where the hub would not hand the file over: consent, or a token."""
    from huggingface_hub import get_hf_file_metadata

    patience = _Patience(file.repo, file.repo, notify)
    patience.answer_to(partial(get_hf_file_metadata, _url(file)))


def fetch(
    file: RemoteFile,
    out: Path,
    *,
    progress: ByteProgress = lambda name, done, total: None,
    notify: Notify = lambda text: None,
) -> None:
    """Bring a file to `out`, which is there only once its hash, read from the disk, is right.

    Until then it grows as `out`.part, which a later call continues; wrong bytes are removed
    and fetched once more. Raises HubError, which says so where the disk is full.
    """
    part = out.with_name(f"{out.name}.part")
    for is_last in (False, True):
        _fetch_bytes(file, part, progress, notify)
        if _is_right(file, part, progress):
            # Else a power cut could leave the name in place, and not the bytes.
            with part.open("r+b") as written:
                os.fsync(written.fileno())
            put_in_place(part, out)
            return
        part.unlink()
        if not is_last:
            notify(f"{file.name} of {file.repo} came with wrong bytes; fetching it again")
    raise HubError(
        f"{file.name} of {file.repo} came twice with bytes that are not those the hub declares "
        "(its hash differs), and was removed; pull again later, or over another network"
    )


def _is_right(file: RemoteFile, part: Path, progress: ByteProgress) -> bool:
    """Whether the bytes on the disk have the hash that the hub declares."""
    if file.lfs:
        advance = advancing(progress, file.n_bytes)
        return sha256_of(part, partial(advance, f"checking {file.name}")) == file.digest
    blob = hashlib.sha1(b"blob %d\0" % file.n_bytes + part.read_bytes(), usedforsecurity=False)
    return blob.hexdigest() == file.digest


def _fetch_bytes(file: RemoteFile, part: Path, progress: ByteProgress, notify: Notify) -> None:
    """Let `part` grow to the file's size; beyond it where what comes is not the file."""
    what = f"{file.name} of {file.repo}"
    patience = _Patience(what, file.repo, notify, kept="; what came is kept")
    part.touch()
    if part.stat().st_size > file.n_bytes:
        os.truncate(part, 0)
    furthest = part.stat().st_size
    while (n_have := part.stat().st_size) < file.n_bytes:
        progress(file.name, n_have, file.n_bytes)
        error: Exception = ConnectionError("the connection was cut")
        try:
            for n_done in _stream(file, part, n_have):
                if n_done > furthest:
                    furthest, patience.n_failed = n_done, 0
                progress(file.name, n_done, file.n_bytes)
        except client_errors() as raised:
            error = raised
        if part.stat().st_size < file.n_bytes:
            patience.wait(error)
    progress(file.name, file.n_bytes, file.n_bytes)


def _stream(file: RemoteFile, part: Path, n_have: int) -> Iterator[int]:
    """Append what the hub sends from byte `n_have` on; yields the bytes that `part` then holds."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(library_name="trimix-gguf"), "Accept-Encoding": "identity"}
    if n_have:
        headers["Range"] = f"bytes={n_have}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # of one read, not of the file
    with get_session().stream("GET", _url(file), headers=headers, timeout=timeout) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        n_done = _first_byte(response.headers, file, n_have)
        if n_done < n_have:
            os.truncate(part, n_done)
        with part.open("ab", buffering=0) as out:  # what was written outlives a kill
            for chunk in response.iter_bytes():
                _append(out, chunk, part, file.n_bytes)
                n_done += len(chunk)
                yield n_done
                if n_done > file.n_bytes:
                    return  # not our file, which its hash will say


def _first_byte(headers: Mapping[str, str], file: RemoteFile, n_have: int) -> int:
    """Where in the file an answer begins; ConnectionError where it is an answer of another kind.

    Who passes over Range sends the whole file. A network's login page must not be taken for
    that: it would cost all that came before.
    """
    came = re.match(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
    first = int(came[1]) if came else 0
    total = came[2] if came else headers.get("Content-Length")
    if first > n_have or total != str(file.n_bytes) and (n_have or total is not None):
        raise ConnectionError(
            f"expected another part of the file; got {total} bytes from byte {first}"
        )
    return first


def _append(out: FileIO, chunk: bytes, part: Path, n_bytes: int) -> None:
    rest = memoryview(chunk)
    try:
        while rest:
            rest = rest[out.write(rest) :]  # near a disk's end it takes less than it was given
    except OSError as error:
        mend = {
            errno.ENOSPC: "free {} MB and pull again, it continues from there",
            errno.EDQUOT: "free {} MB of your quota and pull again, it continues from there",
            errno.EFBIG: "it takes no file of {} MB; set TRIMIX_HOME to a folder on another disk",
        }.get(error.errno or 0, "look to the disk, and pull again")
        size = n_bytes if error.errno == errno.EFBIG else n_bytes - part.stat().st_size
        raise HubError(
            f"cannot write {part}: {error.strerror}; {mend.format(f'{size / 1e6:,.1f}')}"
        ) from None


def _url(file: RemoteFile) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(file.repo, file.name, revision=file.commit)


# -- what goes wrong --------------------------------------------------------------------------


class _Patience:
    """How often the hub is asked again: N_TRIES times without a new byte, then HubError."""

    def __init__(self, what: str, repo: str, notify: Notify, kept: str = "") -> None:
        self.what, self.page, self.notify = what, f"https://huggingface.co/{repo}", notify
        self.kept = kept
        self.n_failed = 0

    def answer_to(self, ask: Callable[[], Any], *, away: bool = True) -> Any:
        """What `ask` gives, once it does; see wait()."""
        while True:
            try:
                return ask()
            except client_errors() as error:
                self.wait(error, away=away)

    def wait(self, error: Exception, *, away: bool = True) -> None:
        """Sleep before another try; raises HubError where none would help, or enough were made.

        Without `away` a hub that cannot be reached at all is not waited for.
        """
        asked = _asked_pause(error)
        pause = PAUSES[min(self.n_failed, len(PAUSES) - 1)] if asked is None else asked
        self.n_failed += 1
        gone = _is_away(error) and not away
        if gone or not _passes(error) or self.n_failed >= N_TRIES or pause > LONGEST_PAUSE:
            raise HubError(f"{self.what}: {explain(error, self.page)}{self.kept}") from None
        if pause >= 1:
            self.notify(f"{self.what}: {_brief(error)}; trying again in {pause:.0f} s")
        time.sleep(pause)


def client_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub and its HTTP client raise."""
    from huggingface_hub.errors import HfHubHTTPError

    transport_error: Any = HfHubHTTPError.__bases__[0]  # httpx's, of the version in use
    return (OSError, transport_error)


def explain(error: Exception, page: str) -> str:
    """Why the hub gave nothing, and the mend; `page` is where a person can see the repository."""
    from huggingface_hub import errors

    login = "run `hf auth login`"
    reasons: dict[type[Exception], str] = {  # a subclass before its base
        errors.GatedRepoError: f"its authors ask for consent: accept it at {page}, then {login}",
        errors.RevisionNotFoundError: "the hub has no such revision; name a branch, tag or commit",
        errors.LocalEntryNotFoundError: "it is not cached, and the hub does not answer: run once "
        "with a network",
        errors.EntryNotFoundError: "the hub has no such file",
        errors.RepositoryNotFoundError: "the hub has no such repository, or it is private; mend "
        f"its name, or {login}",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it to use the network",
    }
    for kind, why in reasons.items():
        if isinstance(error, kind):
            return why
    status = _status(error)
    if status == 401:
        return f"the hub does not take your token; {login}"
    if status == 403:
        return f"the hub refuses it to you; see {page}, and {login}"
    if status == 429:
        pause = _asked_pause(error)
        when = f"in {pause / 60:.0f} min" if pause and pause >= 60 else "later"
        return f"the hub asks for fewer requests (429); try again {when}"
    if status >= 500:
        return f"the hub has a fault (HTTP {status}); try again later"
    if _is_away(error):
        return f"the hub does not answer ({_brief(error)}); connect to a network and try again"
    if _passes(error):
        return f"the connection fails ({_brief(error)}); try again"
    return _brief(error)


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _passes(error: Exception) -> bool:
    """Whether the same request may do later."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return _status(error) in (408, 416, 429) or _status(error) >= 500
    lost = (ConnectionError, TimeoutError, HfHubHTTPError.__bases__[0])
    return isinstance(error, lost) and not isinstance(error, OfflineModeIsEnabled)


def _is_away(error: Exception) -> bool:
    return type(error).__name__ == "ConnectError"  # httpx's and its successors'


def _asked_pause(error: Exception) -> float | None:
    """Seconds that the hub asks to wait: Retry-After, or t of its own RateLimit."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    if headers.get("Retry-After", "").isdecimal():
        return float(headers["Retry-After"])
    left = re.search(r"\bt=(\d+)", headers.get("RateLimit", "")) if _status(error) == 429 else None
    return float(left[1]) if left else None


def _brief(error: Exception) -> str:
    if status := _status(error):
        return f"HTTP {status}"
    return " ".join(str(error).split()) or type(error).__name__
