"""Experts: what is computed on the rows that a router sent, one form per file."""
