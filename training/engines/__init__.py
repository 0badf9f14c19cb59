"""Other engines than the emulated model itself: each says what it cannot emulate, and refuses it."""
