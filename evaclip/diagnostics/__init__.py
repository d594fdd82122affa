"""What a trained image tower does inside: its attention, and the loss around its weights (`evaclip diagnose`)."""
