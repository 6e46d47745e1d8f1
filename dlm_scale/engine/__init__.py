"""Training: DeepSpeed's engine behind one train step and one loop."""
