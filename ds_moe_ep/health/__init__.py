"""Knowledge of the other ranks: signs of life, diagnosis, and what follows from it."""
