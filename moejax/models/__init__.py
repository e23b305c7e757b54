"""Assembly: how routers, experts, attention and norms become a language model."""
