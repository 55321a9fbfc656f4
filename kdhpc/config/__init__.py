"""Everything a user can choose: frozen dataclasses, presets, and the checks of their values."""
