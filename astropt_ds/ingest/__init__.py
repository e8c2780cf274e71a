"""Surveys as they lie on disk, into shards."""
