"""The towers: EVA's vision transformer, CLIP's text transformer, and the two together."""
