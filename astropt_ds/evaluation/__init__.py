"""What came of a training: its curves."""
