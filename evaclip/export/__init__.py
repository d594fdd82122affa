"""A trained model as folders that other programs load, each with a manifest and a proof that it is the same model."""
