"""What is minimised: `objective(model, variables, batch, ...) -> Result` of (sum, count) terms."""
