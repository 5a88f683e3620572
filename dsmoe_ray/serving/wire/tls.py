"""Which certificates the ends of a connection between machines show and trust. Pure data."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """Mutual TLS: both ends show a certificate, and trust what one authority signed. All files are PEM."""

    certificate: Path
    key: Path
    authority: Path
    server_name: str | None = None
    """Whom callers expect, if one certificate is used on all machines; by default the host of the address."""
