"""The shelf: module cards (JSON), the small modules that ship (safetensors) and their tokenizer. Data only."""
