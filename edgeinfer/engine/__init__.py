"""Many generations on one program: scheduling, caches, the plan of memory."""
