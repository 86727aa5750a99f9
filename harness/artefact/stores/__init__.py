"""Vector databases that an artefact's documents are published to."""
