"""How a guided forward is launched: CUDA graphs, regional compilation."""
