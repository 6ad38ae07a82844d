"""Work over several ranks: groups, collectives, losses, the tensor-parallel table, pipeline stages."""
