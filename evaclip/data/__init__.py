"""From tar shards on disk to batches: indexed, in an order that is a pure function of seed and position."""
