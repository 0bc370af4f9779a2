"""Upload an export to the Hugging Face Hub."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sclite.config import Export
from sclite.errors import NetworkError, UsageError
from sclite.teacher.failures import redact

CREATE_TOKEN = (
    "create one with write access at https://huggingface.co/settings/tokens, then: export HF_TOKEN=..."
)


def open_repository(settings: Export, kind: str = "model") -> str:
    """Create the repository `export.push`, a "model" or a "dataset", unless it exists. Returns its URL.

    The token comes from the environment (HF_TOKEN) or from `hf auth login`; it is not stored. Raises UsageError for an
    invalid name, a missing token or a public repository if `export.private` is set, NetworkError if the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    name = settings.push
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"export.push = {name!r} is not a repository name", "write --push OWNER/NAME")
    if not get_token():
        raise UsageError("no Hugging Face Hub token found", CREATE_TOKEN)
    with _hub_errors(name):
        url = HfApi().create_repo(name, private=settings.private, repo_type=kind, exist_ok=True)
        public = settings.private and not HfApi().repo_info(name, repo_type=kind).private
    if public:
        message = f"{name} on the Hub is public, and export.private is true"
        hint = "choose another name, make that one private, or allow it: --set export.private=false"
        raise UsageError(message, hint)
    return str(url)


def files_of(folder: Path, names: Sequence[str] = ()) -> dict[str, Path]:
    """These files of a folder (default: all), by their names."""
    found = [folder / name for name in names] or sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p for p in found if p.is_file()}


def upload(settings: Export, files: Mapping[str, Path], kind: str = "model") -> None:
    """Upload files, by their names in the repository, in one commit; unchanged files are skipped."""
    from huggingface_hub import CommitOperationAdd, HfApi

    with _hub_errors(settings.push):
        added = [CommitOperationAdd(name, path) for name, path in files.items()]
        HfApi().create_commit(settings.push, added, commit_message="Upload with sclite", repo_type=kind)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Convert errors of the Hub's client to a NetworkError with a hint."""
    import httpx
    from huggingface_hub import get_token

    try:
        yield
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        found: BaseException | None = error
        while found is not None and getattr(found, "response", None) is None:
            found = found.__cause__  # an upload in a thread
        status = getattr(getattr(found, "response", None), "status_code", None)
        text = getattr(found, "server_message", None) or str(found or error) or type(error).__name__
        reason = redact(text.strip().splitlines()[0])
        if token := get_token():  # maybe from a file, which `redact` does not know
            reason = reason.replace(token, "***")
        message = f"cannot upload to {name}: {reason}"
        hint = "check the network, or fix what the Hub names (such as export.license); re-run to resume: uploaded data is kept"
        if status == 401:
            message = f"the Hub rejects the token: {reason}"
            hint = CREATE_TOKEN
        elif status in (403, 404):
            message = f"the Hub does not let this token write to {name}: {reason}"
            hint = "use a token with write access, and your own name or organization in --push OWNER/NAME"
        raise NetworkError(message, hint) from None
