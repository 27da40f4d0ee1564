"""The only door to DeepSpeed: the layer that its engine recognises, and the way in."""
