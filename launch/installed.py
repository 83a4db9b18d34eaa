"""Which versions of packages are installed."""

from __future__ import annotations

from importlib import metadata


def installed_versions(*packages: str) -> dict[str, str]:
    """Return {package: version} of those of the packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
