"""Which subspace is picked, when, and what becomes of the optimizer's state: scores, top-k, schedules, carry."""
