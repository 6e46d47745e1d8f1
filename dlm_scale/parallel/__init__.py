"""Where a process stands among its peers, and the layers that depend on it."""
