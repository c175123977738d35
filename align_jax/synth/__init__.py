"""A model makes its own preference data: it responds, its code is run, verdicts become pairs."""
