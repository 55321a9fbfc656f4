"""Everything that can be chosen: frozen dataclasses, presets, and what makes a config possible."""
