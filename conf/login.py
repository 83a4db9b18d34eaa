"""Whether this user is logged in to W&B, which mirrors runs and hosts the dashboards of ablations."""

from __future__ import annotations

import netrc
import os


def wandb_project(project: str | None) -> str:
    """Return the project that was typed (`logger.project`), else that of `WANDB_PROJECT`, else ffn."""
    return project or os.environ.get("WANDB_PROJECT") or "ffn"


def wandb_mode() -> str:
    """Return "online" when logged in to W&B, else "offline"; `WANDB_MODE` overrides that. Makes no network request."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    return "online" if known else "offline"
