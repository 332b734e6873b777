"""Presets: one short TOML each, read through importlib.resources."""
