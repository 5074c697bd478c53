"""Presets: TOML files that hold only differences from the defaults in `fastwm.config`."""
