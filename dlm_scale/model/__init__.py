"""The bidirectional transformer: plain modules that do not know whether they are distributed."""
