"""Where a weight may move: targets, budgets and the kinds of subspaces."""
