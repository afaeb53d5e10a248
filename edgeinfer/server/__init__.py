"""The HTTP server: one file per API over one internal request; none knows another."""
