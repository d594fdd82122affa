"""Making and checking shards: the `evaclip data` verbs."""
