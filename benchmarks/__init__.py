"""Timings, each behind a gate that proves the numbers of what is timed first, as ratios to a named peer."""
