"""The door to Hugging Face: folders of safetensors in, at any ep_size, and out again."""
