"""Values in, numbers out: metrics and the mixture simulation, without torch."""
