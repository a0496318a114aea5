"""The format of KerasHub's presets: configuration and weights."""
