"""Configuration: the typed schema, the files that Hydra composes, and what is refused before a run starts."""
