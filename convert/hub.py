"""From what the user calls a checkpoint to a path: a local one, or a repository of the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import re
import shutil
from pathlib import Path
from typing import Any

from .errors import BadInput
from .writer import marker_of

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FORMATS = (
    ("model.safetensors",), ("model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin",), ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "*.model", "preprocessor_config.json")


def resolve(source: str, revision: str | None) -> tuple[Path, str | None]:
    """The local path of ``source`` and, for a hub repository, the commit it was pinned to.

    Downloads one weight format only, after looking at the free disk. Raises :class:`BadInput` when the source
    is neither here nor on the hub.
    """
    path = Path(source)
    if path.exists():
        if revision:
            raise BadInput(f"--revision is for hub ids; {source} is a local path.")
        if path.is_dir() and "target_digest" in marker_of(path):
            raise BadInput(f"{source} is a Paddle checkpoint that a conversion of ours made, not a torch one. Give "
                           f"what it was made from, or go back: python -m convert.back --source {source}")
        return path, None
    if path.is_absolute() or source.startswith(".") or not HUB_ID.fullmatch(source):
        raise BadInput(f"{source} does not exist, and it is not a hub id such as EleutherAI/gpt-j-6b.")
    return _download(source, revision)


def _download(repository: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from requests.exceptions import RequestException
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        wanted = _files_of_one_format(repository, sizes)
        needed = sum(sizes[name] for name in wanted
                     if not isinstance(try_to_load_from_cache(repository, name, revision=info.sha), str))
        _require_space(Path(HF_HUB_CACHE), needed, repository)
        return Path(snapshot_download(repository, revision=info.sha, allow_patterns=wanted)), info.sha
    except GatedRepoError as error:
        raise BadInput(f"{repository} is gated: accept its terms on its page, then run: "
                       "huggingface-cli login") from error
    except RevisionNotFoundError as error:
        raise BadInput(f"{repository} has no revision {revision!r} on the hub.") from error
    except RepositoryNotFoundError as error:
        raise BadInput(f"{repository} is neither a path here nor a repository on the hub.") from error
    except HFValidationError as error:
        raise BadInput(f"{repository} does not exist, and it is not a hub id such as EleutherAI/gpt-j-6b.") from error
    except (RequestException, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        cached = _cached(repository, revision)
        if cached is not None:
            return cached, cached.name
        raise BadInput(f"{repository} is not a path here, and the hub cannot be reached ({type(error).__name__}). "
                       "Connect, set HF_ENDPOINT to a mirror, or give a directory.") from error


def _cached(repository: str, revision: str | None) -> Path | None:
    """The snapshot that an earlier download left, if it holds a config and one whole format."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    try:
        snapshot = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    whole = (snapshot / "config.json").is_file() and any((snapshot / patterns[0]).is_file() for patterns in FORMATS)
    return snapshot if whole else None


def _files_of_one_format(repository: str, sizes: dict[str, Any]) -> list[str]:
    for patterns in FORMATS:
        if patterns[0] in sizes:
            wanted = (*patterns, *COMPANIONS)
            return [name for name in sizes
                    if _is_code(name) or any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)]
    raise BadInput(f"{repository} has no safetensors and no pytorch_model.bin; its files are {', '.join(sizes)[:200]}.")


def _is_code(name: str) -> bool:
    """Code beside the weights: ChatGLM's torch side, for align to run if the user says so. Nothing here runs it."""
    return name.endswith(".py") and "/" not in name


def _require_space(cache: Path, needed: int, repository: str) -> None:
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise BadInput(f"no space left for {repository}: {needed:,} bytes to download, {free:,} free where the hub's "
                       "cache lies. Set HF_HOME to a larger disk.")
