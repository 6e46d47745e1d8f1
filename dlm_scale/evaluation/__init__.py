"""What `dlm evaluate` measures: likelihoods, the quality of generated text, and the sets of MDLM's zero-shot table."""
