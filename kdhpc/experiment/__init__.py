"""The stages of the two experiments, and what they agree on."""
