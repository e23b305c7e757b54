"""Small building blocks that every family of layers may use."""
