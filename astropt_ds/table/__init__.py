"""Tables of embeddings on disk: in parts, by object id."""
