"""What simulated clients do, and how a run is judged."""
