"""What a run's metrics say: routing statistics, warnings in words, pictures and the report."""
