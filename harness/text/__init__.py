"""Text: tokenizers, vocabularies, queries made of products."""
