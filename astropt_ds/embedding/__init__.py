"""Catalogues of galaxies to tables of embeddings."""
