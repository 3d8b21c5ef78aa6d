"""Files ⇄ parameters: the hub, safetensors and PyTorch files, LoRA, tokenizers."""
