"""Attention: one method per file, called as `attention(x [B, S, D], context) -> [B, S, D]`."""
