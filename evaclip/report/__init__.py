"""Pictures and pages of runs and scores."""
