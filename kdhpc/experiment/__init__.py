"""The stages of the two experiments, and the names and inputs that they share."""
