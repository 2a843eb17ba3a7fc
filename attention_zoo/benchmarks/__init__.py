"""How fast the mechanisms are, against dense attention measured in the same run."""
