"""What a run is started with: the processes of one run, and many runs on a cluster."""
