"""Knowledge of the other ranks: heartbeats, diagnosis, and what follows from it."""
