"""Training heads: the class-parallel classifier with its row-sparse optimizer, and the contrastive loss."""
