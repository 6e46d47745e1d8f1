"""Models of other programs in, models for other programs out: tensor by tensor, and nothing of a file is executed."""
