"""Training, evaluation and export of retrieval models, from a table of photos to a search artefact."""
