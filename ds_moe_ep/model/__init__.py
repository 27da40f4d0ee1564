"""The causal language model, written for one device; its feed-forward is a slot."""
