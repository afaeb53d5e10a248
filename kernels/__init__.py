"""How operations run, one folder or file per backend. Knows graph and quant, not the engine."""
