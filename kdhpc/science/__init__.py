"""Metrics and the mixture simulation: functions from arrays to arrays, without torch."""
