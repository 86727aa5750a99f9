"""The synthetic demo catalogue: products, photos of them, and a click log."""
