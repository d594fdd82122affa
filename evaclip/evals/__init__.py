"""Benchmarks: what a card says, what lies on the disk, and the score."""
