"""Experiments on emulated hardware: DAPO with LoRA and AQN, run as `python -m training`."""
