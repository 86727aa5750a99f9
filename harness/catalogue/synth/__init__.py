"""The demo catalogue: drawn products, photos of them, and a click log."""
