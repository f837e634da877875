"""The shelf: module cards (JSON), the small modules that ship (safetensors), their tokenizer. Data only."""
