"""What keeps a long run safe: signals, and later heartbeats, rollback and the cluster."""
