"""Checkpoints: logical tensors on disk in safetensors, under a manifest that hashes them and itself."""
