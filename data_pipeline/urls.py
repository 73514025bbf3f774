"""What lies behind a URL: an fsspec file system, a path in it, and what it says of a file."""

from datetime import datetime
from typing import Any

import fsspec

from data_pipeline.errors import DataError


def file_system(url: str) -> tuple[Any, str]:
    """The file system that a URL is in, and the path there. Raises DataError for a URL that cannot be opened."""
    if url.startswith(("http://", "https://")) and "?" in url:
        raise DataError(f"{url} has a query, so that it does not say what kind of file it is: download the file first")
    if "::" in url:
        raise DataError(f"{url} is a chain of URLs: give the URL of a file, a folder or a glob alone")
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a package that is not installed, or no such protocol
        raise DataError(f"cannot open {url}: {error}. See fsspec's documentation for the packages it needs") from error


def mtime_ns(info: dict[str, Any]) -> int | None:
    """When a file was changed last, as far as the file system says: those of fsspec name it as they like."""
    keys = ("mtime", "LastModified", "last_modified", "updated", "created")
    time = next((info[key] for key in keys if info.get(key) is not None), None)
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    if isinstance(time, datetime):
        time = time.timestamp()
    return None if time is None else int(time * 1e9)


def described(error: Exception) -> str:
    """What an error says: storage clients raise their own."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
