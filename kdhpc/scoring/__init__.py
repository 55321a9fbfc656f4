"""Compute log-probabilities of sequences under a model, over the tokens that count."""
