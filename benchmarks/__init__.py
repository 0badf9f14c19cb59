"""Timings behind a gate that proves the bits of what is timed, each beside a named peer in the same rounds."""
