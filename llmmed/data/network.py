"""What comes over the network is tried again, with a pause that doubles; every other failure is one line.

A machine without a network is told so within half a minute; one that loses it on the way is given minutes.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import TypeVar

from llmmed.errors import UserError

Result = TypeVar("Result")
Report = Callable[[str], None]

_CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp", "fsspec", "hf_xet"}
_LONGEST_PAUSE = 60.0
_CONNECTION_SECONDS = 5.0  # a network that works needs a fraction of one
_MOST_ATTEMPTS, _MOST_SECONDS = 4, 20.0  # after the first, where there is no network at all


def fetch(action: Callable[[], Result], what: str, retries: int, report: Report, local: bool = False) -> Result:
    """What `action` returns. Raises `UserError`, or what is no error of the network nor of the user.

    Where the Hub cannot be reached, `action` sees the local caches only, instead of the libraries' own long attempts.

    Args:
        action: Calls `datasets` or `huggingface_hub`.
        what: The key and value that it is for.
        retries: After errors of the network.
        report: Takes a line for each.
        local: Whether it needs no network.
    """
    began, reached = time.monotonic(), local or _switched_off()
    most = min(retries, _MOST_ATTEMPTS)
    for failures in itertools.count(1):
        trouble = None if reached else unreachable()
        reached = trouble is None
        try:
            with local_caches_only() if trouble else contextlib.nullcontext():
                result = action()
        except Exception as error:  # sorted by kind in the functions called  # noqa: BLE001
            if trouble is None or not _is_network(error):
                wait_or_raise(error, what, failures, retries, report)
            elif failures > most or time.monotonic() - began > _MOST_SECONDS:
                raise UserError(
                    f"{what}: there is no network: {trouble}, {failures} attempts, and it is not in the local cache; "
                    f"connect this machine and start again"
                ) from None
            else:
                _wait(what, trouble, failures, most, report)
        else:
            if trouble is not None:
                report(f"{what}: {trouble}; it is taken from the local cache")
            return result
    raise AssertionError("unreachable")


def wait_or_raise(error: Exception, what: str, failures: int, retries: int, report: Report) -> None:
    """Waits if it is worth trying again, else raises: a `UserError` for what the library's users can mend."""
    if isinstance(error, UserError):
        raise error
    reason = _first_line(error)
    if _is_network(error) and not _switched_off():
        if failures <= retries:
            _wait(what, reason, failures, retries, report)
            return
        raise UserError(
            f"{what}: the Hugging Face Hub does not answer ({reason}), after {failures} attempts; "
            f"look at the network and start again: what came is kept"
        ) from None
    raise _explained(error, what, reason) from None


def unreachable() -> str | None:
    """Why no connection to the Hub, or to the proxy on the way to it, comes about; None if one does."""
    from huggingface_hub import constants

    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    proxy = _proxy(endpoint.scheme, endpoint.hostname or "")
    target = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else endpoint
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname or "", port), timeout=_CONNECTION_SECONDS).close()
    except OSError as error:
        name = f"the proxy {target.hostname}:{port}" if proxy else f"{target.hostname}:{port}"
        return f"{name} cannot be reached: {error.strerror or error}"
    return None


@contextlib.contextmanager
def local_caches_only() -> Iterator[None]:
    """Within it the libraries ask nobody, as under HF_HUB_OFFLINE."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _wait(what: str, reason: str, failures: int, retries: int, report: Report) -> None:
    pause = min(2.0 ** (failures - 1), _LONGEST_PAUSE)
    report(f"{what}: {reason}; trying again in {pause:g} s ({failures} of {retries})")
    time.sleep(pause)


def _proxy(scheme: str, host: str) -> str | None:
    if urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(scheme) or proxies.get("all")


def _explained(error: Exception, what: str, reason: str) -> Exception:
    if _switched_off() and (_is_network(error) or "offline" in reason.lower()):
        return UserError(f"{what}: it is not in the local cache, and HF_HUB_OFFLINE forbids the network")
    name, status = type(error).__name__, _status(error)
    if "gated" in reason.lower() or name == "GatedRepoError":
        return UserError(f"{what} is gated: ask for access on its page, then log in with hf auth login")
    if name in ("DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError") or status in (
        401,
        403,
        404,
    ):
        return UserError(f"{what}: there is no such thing on the Hugging Face Hub, or it is private ({reason})")
    if isinstance(error, (FileNotFoundError, ValueError)) or type(error).__module__.startswith("datasets"):
        return UserError(f"{what}: {reason}")
    return error


def _is_network(error: Exception) -> bool:
    """Whether this, or what it was raised from, may be gone at the next attempt. A server's answer decides first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    answers = [status for status in map(_status, chain) if status is not None]
    if answers:
        return any(status >= 500 or status in (408, 429) for status in answers)
    return any(
        isinstance(e, (ConnectionError, TimeoutError))
        or type(e).__module__.split(".")[0] in _CLIENTS
        or type(e).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled")
        for e in chain
    )


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _switched_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
